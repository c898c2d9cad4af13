"""One HTML page about a prepared corpus: what went in, what was dropped and why, under which licence, and what experts said."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from swallow_jax import figures, run
from swallow_jax.figures import Html, bar, h, table


def write(folder: str | Path) -> Path:
    """report.html from report.json, and from review.json where tools.review put one."""
    folder = Path(folder)
    if not (folder / "report.json").is_file():
        raise FileNotFoundError(f"{folder / 'report.json'} does not exist; run experiments.prepare with --workdir={folder} first")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    review = folder / "review.json"
    opinions = json.loads(review.read_text(encoding="utf-8")) if review.is_file() else None
    run.write_text(folder / "report.html", page(report, opinions))
    return folder / "report.html"


def page(report: dict[str, Any], review: dict[str, Any] | None) -> str:
    """The whole page; `review` is what tools.review made of the experts' corrections."""
    failed = sum(report["failed_by_reason"].values())
    dropped = sum(report["dropped_by_reason"].values())
    words = (
        f"{report['documents_in']:,} documents in = {report['kept']:,} kept + {dropped:,} dropped + {failed:,} that could not be "
        f"read; {report['tokens']:,} tokens in {sum(report['rows'].values()):,} rows."
    )
    body = [h("h1", "The corpus"), h("p", words)]
    body += _funnel(report)
    body += _rules(report)
    body += _make_up(report)
    body += _privacy(report)
    body += _contamination(report)
    if review:
        body += _review(review)
    body += _licences(report)
    if report.get("mixture"):
        body += _mixture(report["mixture"])
    body += _samples(report["samples"])
    return figures.document("The corpus", body)


def _funnel(report: dict[str, Any]) -> list[Html]:
    sources = report["sources"]
    totals = Counter()
    for counts in sources.values():
        totals.update(counts)
    steps = ["documents_in", *sorted(name for name in totals if name.startswith(("failed", "dropped"))), "kept"]
    rows = [
        [step.replace("_", " "), _number(totals[step]), *(_number(counts.get(step, 0)) for counts in sources.values())]
        for step in steps
    ]
    sizes = ["characters", "tokens"]
    rows += [[size, _number(totals[size]), *(_number(counts.get(size, 0)) for counts in sources.values())] for size in sizes]
    return [h("h2", "Funnel by reason and source"), table(["documents", "all", *sources], rows)]


def _rules(report: dict[str, Any]) -> list[Html]:
    would = report["would_fall_by_swallow_v1"]
    rules = sorted({rule for counts in would.values() for rule in counts})
    rows = []
    for rule in rules:
        cells = []
        for source, counts in would.items():
            read = sum(report["sources"][source].get(name, 0) for name in ["documents_in"]) - sum(
                count for name, count in report["sources"][source].items() if name.startswith("failed")
            )
            share = counts.get(rule, 0) / read if read else None
            cells.append(bar(share, _number(counts.get(rule, 0))))
        rows.append([rule, *cells])
    note = (
        "Every document is measured by every published rule of the Swallow Corpus v1, whatever its profile: this many would fall."
    )
    return [h("h2", "The published rules"), h("p", note, class_="small"), table(["documents", *would], rows)] if rules else []


def _make_up(report: dict[str, Any]) -> list[Html]:
    parts = [h("h2", "Sectors, lengths, words")]
    sectors = report["characters_by_sector"]
    total = sum(sectors.values()) or 1
    parts.append(
        table(
            ["sector", "characters kept"],
            [[name, bar(n / total, f"{n:,} ({100 * n / total:.1f} %)")] for name, n in sorted(sectors.items())],
        )
    )
    lengths = {int(size): n for size, n in report["documents_by_length"].items()}
    most = max(lengths.values(), default=1)
    parts.append(
        table(["characters up to", "documents"], [[f"{size:,}", bar(n / most, f"{n:,}")] for size, n in sorted(lengths.items())])
    )
    glossary = report["glossary"]
    if glossary["terms"]:
        share = f"{glossary['found']:,} of {glossary['terms']:,} terms of the glossary occur in the kept documents."
        missing = "、".join(glossary["missing"][:100])
        parts += [
            h("p", share),
            h("details", h("summary", f"{len(glossary['missing']):,} terms do not"), h("p", missing, lang="ja")),
        ]
    words = report["documents_with_seed_word"]
    if words:
        parts.append(
            table(
                ["seed word", "documents"], [[word, _number(n)] for word, n in sorted(words.items(), key=lambda item: -item[1])]
            )
        )
    return parts


def _privacy(report: dict[str, Any]) -> list[Html]:
    rows = [[f"masked: {kind}", _number(n)] for kind, n in sorted(report["personal_data_masked"].items())]
    rows += [[f"rewritten: {kind} (characters)", _number(n)] for kind, n in sorted(report["characters_rewritten"].items())]
    rows += [[f"paragraphs dropped: {kind}", _number(n)] for kind, n in sorted(report["paragraphs_dropped"].items())]
    return [h("h2", "Personal data, rewrites, paragraphs"), table(["kind", "count"], rows)] if rows else []


def _contamination(report: dict[str, Any]) -> list[Html]:
    hits = report["contaminated"]
    documents = len({(hit["source"], hit["id"]) for hit in hits})
    left = report["contamination_left"]
    words = f"{documents:,} documents carried text of a test set and were dropped; a second look found {left:,}."
    rows = [
        [hit["id"], hit["source"], hit["test_set"], hit["conversation_id"], hit["turn"], hit["ngram"] or f"{hit['jaccard']:.2f}"]
        for hit in hits
    ]
    shown = table(["document", "source", "test set", "conversation", "turn", "shared text or similarity"], rows[:200])
    return [h("h2", "Test sets"), h("p", words), *([h("details", h("summary", f"{len(hits):,} finds"), shown)] if hits else [])]


def _review(review: dict[str, Any]) -> list[Html]:
    words = (
        f"Experts looked at {review['reviewed']:,} documents and disagreed with {review['disagreed']:,} decisions "
        f"({100 * review['share']:.1f} %, 95 % interval {100 * review['ci95'][0]:.1f} to {100 * review['ci95'][1]:.1f})."
    )
    rows = [
        [row["rule"], row["reviewed"], bar(row["disagreed"] / row["reviewed"], row["disagreed"])] for row in review["by_rule"]
    ]
    return [h("h2", "What experts say"), h("p", words), table(["decision", "reviewed", "disagreed"], rows)]


def _licences(report: dict[str, Any]) -> list[Html]:
    rows = [[row["source"], row["licence"], row["attribution"], row.get("reason", "")] for row in report["licences"]]
    return [h("h2", "Licences and attributions"), table(["source", "licence", "attribution", "used all the same because"], rows)]


def _mixture(lines: list[dict[str, Any]]) -> list[Html]:
    rows = [
        [
            row["source"],
            row["folder"],
            row["weight"],
            f"{100 * row['share_of_rows']:.1f}",
            _number(row["tokens"]),
            f"{row['epochs']:.2f}",
        ]
        for row in lines
    ]
    return [
        h("h2", "What training will read"),
        table(["source", "folder", "weight", "share of rows %", "tokens", "epochs"], rows),
    ]


def _samples(samples: dict[str, list]) -> list[Html]:
    parts = [h("h2", "Samples")]
    for kind in ["kept", *sorted(set(samples) - {"kept"})]:
        drawn = [
            h("article", h("p", f"{row['source']}: {row['id']}", class_="small"), h("p", row["text"], lang="ja"))
            for row in samples.get(kind, [])
        ]
        if drawn:
            parts.append(h("details", h("summary", kind if kind == "kept" else f"dropped: {kind}"), *drawn))
    return parts


def _number(value: Any) -> str:
    return f"{value:,}" if value else ""
