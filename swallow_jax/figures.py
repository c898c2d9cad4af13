"""HTML and SVG by small functions: escaped elements, tables, bars, forest plots, curves, and one stylesheet.

Everything that comes from data passes through `h`, which escapes it. Figures are inline SVG; their colours are the
stylesheet's, so they follow the reader's light or dark mode, and need neither script nor network.
"""

import html
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Html(str):
    """Markup that is already safe; every other string is escaped when it enters a tag."""


def h(tag: str, *children: Any, **attributes: Any) -> Html:
    """One element: children are escaped unless they are `Html`; `class_` gives class, `x_y` gives x-y, None is left out."""
    words = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inside = "".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children)
    return Html(f"<{tag}{words}>{inside}</{tag}>")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    head = h("thead", h("tr", *(h("th", cell, scope="col") for cell in header)))
    body = h("tbody", *(h("tr", h("th", row[0], scope="row"), *(h("td", cell) for cell in row[1:])) for row in rows))
    return h("div", h("table", head, body), class_="wide", tabindex="0")


def bar(share: float | None, words: str) -> Html:
    """A figure with a bar behind it; a share is None where there was nothing to count."""
    width = 0 if share is None else round(100 * share, 1)
    return h("span", h("span", class_="fill", style=f"width:{width}%"), h("span", words), class_="bar")


def forest(rows: Sequence[tuple[str, float, float, float]], *, low: float, high: float, caption: str, zero: bool = False) -> Html:
    """Points with intervals, one row each: (name, value, low end, high end) in percent, on one axis."""
    height = 34 * len(rows) + 26

    def x(value: float) -> float:
        return round(8 + 384 * (min(max(value, low), high) - low) / (high - low), 1)

    parts = []
    for tick in _ticks(low, high):
        kind = "zero" if zero and tick == 0 else "grid"
        parts.append(h("line", x1=x(tick), x2=x(tick), y1=0, y2=height - 22, class_=kind))
        parts.append(h("text", f"{tick:g}", x=x(tick), y=height - 8, text_anchor="middle", class_="axis"))
    for number, (name, value, left, right) in enumerate(rows):
        y = 34 * number
        shown = name
        while display_width(shown) > 42:  # what fits beside the figures on a phone
            shown = shown.rstrip("…")[:-1] + "…"
        parts.append(h("text", h("title", name), shown, x=0, y=y + 12))
        # round() + 0.0: a difference of -0.04 is shown as 0.0, not as -0.0
        words = "{:.1f} [{:.1f}, {:.1f}]".format(*(round(number, 1) + 0.0 for number in (value, left, right)))
        parts.append(h("text", words, x=400, y=y + 12, text_anchor="end"))
        parts.append(h("line", x1=x(left), x2=x(right), y1=y + 23, y2=y + 23, class_="interval"))
        parts.append(h("circle", cx=x(value), cy=y + 23, r=4.5, class_="point"))
    svg = h("svg", h("title", caption), *parts, viewBox=f"-4 0 412 {height}", role="img")
    return h("figure", svg, h("figcaption", caption))


def curves(name: str, metrics: Sequence[Mapping[str, Any]]) -> Html:
    """Training loss (mean of up to 150 bins) and held-out loss by step, from metrics.jsonl."""
    points = [(row["step"], row["loss"]) for row in metrics if math.isfinite(row.get("loss", math.nan))]
    heldout = [(row["step"], row["heldout_loss"]) for row in metrics if math.isfinite(row.get("heldout_loss", math.nan))]
    if not points:
        return h("p", f"{name}: metrics.jsonl holds no loss")
    size = math.ceil(len(points) / 150)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    points = [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in bins]
    steps, losses = zip(*points, *heldout, strict=True)
    first, last, low, high = min(steps), max(max(steps), min(steps) + 1), min(losses), max(losses)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (round(34 + 358 * (point[0] - first) / (last - first), 1), round(8 + 130 * (high - point[1]) / (high - low), 1))

    parts = []
    for tick in _ticks(low, high):
        y = place((first, tick))[1]
        parts.append(h("line", x1=34, x2=392, y1=y, y2=y, class_="grid"))
        parts.append(h("text", f"{tick:g}", x=30, y=y + 4, text_anchor="end", class_="axis"))
    for tick in _ticks(first, last):
        parts.append(h("text", f"{tick:g}", x=place((tick, low))[0], y=154, text_anchor="middle", class_="axis"))
    parts.append(h("polyline", points=" ".join(f"{x},{y}" for x, y in map(place, points)), class_="line0"))
    parts.append(h("polyline", points=" ".join(f"{x},{y}" for x, y in map(place, heldout)), class_="line1"))
    parts += [h("circle", cx=x, cy=y, r=2.5, class_="dot1") for x, y in map(place, heldout)]
    end = f", held-out {heldout[0][1]:.3f} → {heldout[-1][1]:.3f}" if heldout else ""
    caption = f"{name}: loss in nats a token by step (solid: training{', dashed with dots: held-out' if heldout else ''}){end}"
    return h("figure", h("svg", h("title", caption), *parts, viewBox="0 0 400 160", role="img"), h("figcaption", caption))


def reliability(curves: Sequence[tuple[str, Sequence[tuple[int, float, float]]]], *, caption: str) -> Html:
    """Accuracy by confidence in groups of equal mass, up to two curves of (items, confidence, accuracy); the diagonal is calm."""

    def x(value: float) -> float:
        return round(34 + 200 * value, 1)

    def y(value: float) -> float:
        return round(208 - 200 * value, 1)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(h("line", x1=x(0), x2=x(1), y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(h("text", f"{100 * tick:g}", x=30, y=y(tick) + 4, text_anchor="end", class_="axis"))
        parts.append(h("text", f"{100 * tick:g}", x=x(tick), y=224, text_anchor="middle", class_="axis"))
    parts.append(h("line", x1=x(0), x2=x(1), y1=y(0), y2=y(1), class_="zero"))
    for number, (name, groups) in enumerate(curves):
        line = [(x(confidence), y(accuracy)) for _, confidence, accuracy in groups]
        parts.append(h("polyline", points=" ".join(f"{a},{b}" for a, b in line), class_=f"line{number}"))
        for (a, b), (items, confidence, accuracy) in zip(line, groups, strict=True):
            words = f"{name}: {items} items, sure {100 * confidence:.0f} %, right {100 * accuracy:.0f} %"
            parts.append(h("circle", h("title", words), cx=a, cy=b, r=3.5, class_=f"dot{number}"))
    parts.append(h("text", "right % by how sure, %", x=x(1), y=236, text_anchor="end", class_="axis"))
    svg = h("svg", h("title", caption), *parts, viewBox="0 0 250 240", role="img", class_="square")
    return h("figure", svg, h("figcaption", caption))


def display_width(text: str) -> int:
    """Columns of a terminal, or half the font size: East Asian wide characters count two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def document(title: str, body: Sequence[Html], *, style: str = "", scripts: Sequence[str] = ()) -> str:
    """A whole page that needs nothing from outside; `scripts` are the hashes of those that may run, all else is forbidden."""
    allowed = " ".join(f"'{name}'" for name in scripts) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'
        f"{h('title', title)}<style>{_STYLE}{style}</style>"
    )
    inside = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>{inside}</main></body></html>\n'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers inside [low, high]."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    return [round(n * step, 10) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --soft: #59626b; --line: #d5dae0;
  --c0: #1f5fa8; --c1: #b4531a; --fill: #cfe0f3; --mark: #ffe28a; --right: 31, 120, 80; --wrong: 190, 70, 50; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #14171a; --soft: #a2abb4; --line: #363d44;
  --c0: #7db4f0; --c1: #f0a172; --fill: #24405f; --mark: #6b5200; --right: 80, 190, 140; --wrong: 240, 120, 95; } }
* { box-sizing: border-box; }
body { margin: 0; overflow-wrap: break-word; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Hiragino Sans", "Noto Sans CJK JP", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin-top: 1.6rem; }
.small, figcaption { color: var(--soft); font-size: .86rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; min-width: 8.5rem; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
.bar { position: relative; display: inline-block; min-width: 9.5rem; padding: 0 .3rem; }
.bar span { position: relative; }
.bar .fill { position: absolute; left: 0; top: 0; bottom: 0; background: var(--fill); border-radius: 2px; }
.confusion td { text-align: center; }
.right { background: rgba(var(--right), calc(.12 + .6 * var(--share))); }
.wrong { background: rgba(var(--wrong), calc(.12 + .6 * var(--share))); }
figure { margin: 1rem 0; }
svg { width: 100%; max-width: 620px; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--ink); }
svg .axis { fill: var(--soft); font-size: 10.5px; }
.grid { stroke: var(--line); } .zero { stroke: var(--ink); }
.interval { stroke: var(--c0); stroke-width: 2.5; } .point { fill: var(--c0); }
.line0, .line1 { fill: none; stroke: var(--c0); stroke-width: 1.6; }
.line1 { stroke: var(--c1); stroke-dasharray: 5 3; } .dot0 { fill: var(--c0); } .dot1 { fill: var(--c1); }
svg.square { max-width: 300px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1rem; }
article { border: 1px solid var(--line); border-radius: 6px; padding: .2rem .9rem; margin: .8rem 0; }
article p { margin: .45rem 0; }
mark { background: var(--mark); color: inherit; padding: 0 .1em; }
blockquote { margin: 0; border-left: 4px solid var(--line); padding-left: 1rem; }
details { margin: .4rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 6px; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
"""
