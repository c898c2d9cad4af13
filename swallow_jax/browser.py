"""The conversation browser of the page: filters, the list, one conversation with gold and predicted labels of two models.

The data stand in the page as inert JSON; the script puts them on the screen as text nodes only, so nothing that a model or a
customer wrote can become markup. It asks for nothing: the page's security policy allows this script, by its hash, and no
network. Without the script the page's tables and figures are whole.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from swallow_jax.figures import Html, h

OUTCOMES = (
    ("all", "all"),
    ("right", "A right"),
    ("wrong", "A wrong"),
    ("missed", "A missed a violation"),
    ("alarm", "A raised a false alarm"),
    ("category", "A named another category"),
    ("invalid", "A gave no valid answer"),
    ("differ", "A and B differ"),
    ("gained", "A wrong, B right"),
    ("broken", "A right, B wrong"),
)


def data(
    labels: Sequence[Mapping[str, str]],
    conversations: Sequence[Mapping[str, Any]],
    marks: Sequence[Mapping[int, Sequence[str]]],
    runs: Mapping[str, Mapping[str, Mapping[str, Any]]],
    several: bool,
) -> dict[str, Any]:
    """What the script reads. `marks[i]` are the quotes of conversation i by turn; `runs[name][conversation_id]` is a row.

    `labels` are {id, name} in the task's order, the compliant one last; answers name them by number, null for invalid.
    `several`: whether all labels count, or the first.
    """
    place = {label["id"]: number for number, label in enumerate(labels)}
    compliant = len(labels) - 1

    def numbers(ids: Sequence[str]) -> list[int]:
        return [place[label] for label in ids] or [compliant]

    items = [
        {
            "id": row["conversation_id"], "pair": row.get("pair_id"), "gold": numbers(row["labels"]),
            "turns": [[turn["speaker"], turn["text"]] for turn in row["turns"]],
            "marks": [[turn, quote] for turn, quotes in sorted(marked.items()) for quote in quotes],
            "missing": row["missing_items"], "why": str(row.get("meta", {}).get("rationale") or ""),
        }
        for row, marked in zip(conversations, marks, strict=True)
    ]  # fmt: skip

    def answer(row: Mapping[str, Any]) -> dict[str, Any]:
        given = row.get("preds") or ([] if row["pred"] in ("compliant", "invalid") else [row["pred"]])
        found: dict[str, Any] = {"pred": numbers(given) if row["valid"] else None}
        if row.get("probs") and row["valid"]:
            found["sure"] = round(100 * row["probs"][row["pred"]])
        if row.get("evidence"):
            found["quotes"] = [[item["turn"], item["quote"]] for item in row["evidence"]]
        if row.get("missing_items"):
            found["missing"] = row["missing_items"]
        if not row["valid"]:
            found["raw"] = row["raw"][:300]
        return found

    answers = [[answer(by_id[item["id"]]) for item in items] for by_id in runs.values()]
    names = [label["name"] for label in labels]
    return {"labels": names, "models": list(runs), "items": items, "answers": answers, "several": several}


def section(title: str, content: Mapping[str, Any], language: str, number: int) -> Html:
    """The markup; `number` keeps the ids of several browsers on one page apart."""

    def choice(name: str, label: str, options: Sequence[tuple[str, str]]) -> Html:
        inside = [h("option", text, value=value) for value, text in options]
        return h("label", h("span", label), h("select", *inside, data_control=name))

    models = [(str(n), name) for n, name in enumerate(content["models"])]
    labels = [(str(n), name) for n, name in enumerate(content["labels"])]
    controls = h(
        "div",
        choice("a", "Model A", models),
        choice("b", "Model B", [("", "none"), *models]),
        choice("gold", "Gold category", [("", "all"), *labels]),
        choice("pred", "A answered", [("", "all"), *labels]),
        choice("outcome", "Outcome", OUTCOMES),
        h("label", h("span", "Words"), Html('<input type="search" data-control="words" autocomplete="off">')),
        class_="controls",
    )
    steps = h(
        "p", h("button", "◀ previous", type="button", data_step="-1"), " ",
        h("button", "next ▶", type="button", data_step="1"), " ", h("output", "", aria_live="polite"), class_="steps",
    )  # fmt: skip
    inert = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        inert = inert.replace(character, f"\\u{ord(character):04x}")
    return h(
        "section",
        h("h3", title),
        h("noscript", h("p", "The list of conversations needs the script of this page; the tables do not.")),
        controls,
        steps,
        h("div", h("ol", aria_label="conversations", class_="list"),
          h("article", class_="detail", lang=language, tabindex="-1", aria_live="polite"), class_="panes"),
        h("p", "Keys in the list: arrows, Home, End; Enter goes to the conversation. Marked: gold evidence, or, in a "
          "compliant twin, where it differs. Underlined: what model A (solid) or B (dotted) quoted.", class_="small"),
        Html(f'<script type="application/json">{inert}</script>'),
        class_="browser", id=f"browser-{number}",
    )  # fmt: skip


def script() -> Html:
    return Html(f"<script>{_SCRIPT}</script>")


def script_hash() -> str:
    """For the page's security policy: the only script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()


STYLE = """
.controls { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.2rem, 1fr)); gap: .5rem .8rem; }
.controls label span { display: block; color: var(--soft); font-size: .82rem; }
.controls select, .controls input, .browser button { width: 100%; font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: 5px; padding: .35rem .5rem; min-height: 2.4rem; }
.steps button { width: auto; cursor: pointer; }
.steps output { color: var(--soft); font-size: .9rem; }
.panes { display: grid; grid-template-columns: minmax(13rem, 19rem) 1fr; gap: 1rem; align-items: start; }
.list { list-style: none; margin: 0; padding: 2px; max-height: 34rem; overflow-y: auto; }
.browser .list button { text-align: left; border-color: transparent; min-height: 2.2rem; overflow-wrap: anywhere;
  cursor: pointer; }
.browser .list button[aria-current="true"] { border-color: var(--c0); background: var(--fill); }
.list small { display: block; color: var(--soft); }
.detail { margin: 0; min-height: 12rem; }
.detail table { width: 100%; }
.detail table td, .detail table th { white-space: normal; text-align: left; min-width: 4rem; }
.detail td.good::before { content: "\\2713\\a0"; } .detail td.bad::before { content: "\\2717\\a0"; }
td.good { background: rgba(var(--right), .2); } td.bad { background: rgba(var(--wrong), .2); }
.qa { text-decoration: underline 2px var(--c0); } .qb { text-decoration: underline dotted 3px var(--c1); }
.qa.qb { text-decoration: underline double 3px var(--c0); }
@media (max-width: 46rem) { .panes { grid-template-columns: 1fr; } .list { max-height: 15rem; } main { padding: .7rem; } }
"""

_SCRIPT = r"""
'use strict';
for (const root of document.querySelectorAll('.browser')) {
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const control = name => root.querySelector('[data-control="' + name + '"]');
  const list = root.querySelector('.list'), detail = root.querySelector('.detail'), said = root.querySelector('output');
  const make = (tag, text, kind) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  const compliant = data.labels.length - 1;
  const names = numbers => numbers === null ? 'no valid answer' : numbers.map(n => data.labels[n]).join(', ');
  const same = (gold, pred) => pred !== null && (data.several
    ? gold.length === pred.length && gold.every(n => pred.includes(n)) : gold[0] === pred[0]);
  const outcome = (item, answer) => {
    if (answer.pred === null) return 'invalid';
    if (same(item.gold, answer.pred)) return 'right';
    if (answer.pred[0] === compliant) return 'missed';
    return item.gold[0] === compliant ? 'alarm' : 'category';
  };
  const words = {right: 'right', missed: 'missed', alarm: 'false alarm', category: 'another category', invalid: 'invalid'};
  const texts = data.items.map(item => (item.id + ' ' + item.turns.map(t => t[1]).join(' ')).toLowerCase());
  let shown = [], current = -1;

  const fits = (i, a, b) => {
    const item = data.items[i], x = data.answers[a][i], y = b === null ? null : data.answers[b][i];
    const gold = control('gold').value, pred = control('pred').value, want = control('outcome').value;
    if (gold !== '' && !(data.several ? item.gold : item.gold.slice(0, 1)).includes(+gold)) return false;
    if (pred !== '' && !(x.pred !== null && x.pred.includes(+pred))) return false;
    const query = control('words').value.trim().toLowerCase();
    if (query && !texts[i].includes(query)) return false;
    const now = outcome(item, x), then = y && outcome(item, y);
    if (want === 'all') return true;
    if (want === 'wrong') return now !== 'right';
    if (want === 'differ') return y !== null && names(x.pred) !== names(y.pred);
    if (want === 'gained') return y !== null && now !== 'right' && then === 'right';
    if (want === 'broken') return y !== null && now === 'right' && then !== 'right';
    return now === want;
  };

  const parts = (text, layers) => {
    const flags = new Array(text.length).fill(0);
    layers.forEach((quotes, layer) => quotes.forEach(quote => {
      for (let at = text.indexOf(quote); quote && at >= 0; at = text.indexOf(quote, at + 1))
        for (let k = at; k < at + quote.length; k++) flags[k] |= 1 << layer;
    }));
    const found = [];
    for (let k = 0; k < text.length; k++) {
      const last = found[found.length - 1];
      if (last && last[0] === flags[k]) last[1] += text[k]; else found.push([flags[k], text[k]]);
    }
    return found;
  };

  const verdict = (title, item, answer) => {
    const row = make('tr'), kind = outcome(item, answer);
    const sure = answer.sure === undefined ? '' : ' (' + answer.sure + ' %)';
    const missing = answer.missing ? '; left unsaid: ' + answer.missing.join('、') : '';
    const raw = answer.raw === undefined ? '' : ': ' + answer.raw;
    const head = make('th', title);
    head.scope = 'row';
    const judged = make('td', words[kind], kind === 'right' ? 'good' : 'bad');
    row.append(head, make('td', names(answer.pred) + sure + missing + raw), judged);
    return row;
  };

  const show = i => {
    current = i;
    detail.replaceChildren();
    for (const button of list.querySelectorAll('button')) {
      const here = +button.dataset.item === i;
      button.setAttribute('aria-current', here);
      button.tabIndex = here ? 0 : -1;
      if (here) {
        const top = button.parentNode.offsetTop - list.offsetTop;
        if (top < list.scrollTop || top > list.scrollTop + list.clientHeight - 60) list.scrollTop = top - 60;
      }
    }
    if (i < 0) return detail.append(make('p', 'No conversation fits these filters.'));
    const item = data.items[i], a = +control('a').value, b = control('b').value === '' ? null : +control('b').value;
    detail.append(make('h3', item.id));
    const table = make('table'), gold = make('tr'), head = make('th', 'Gold');
    head.scope = 'row';
    const unsaid = item.missing.length ? '; left unsaid: ' + item.missing.join('、') : '';
    const truth = make('td', names(item.gold) + unsaid);
    truth.colSpan = 2;
    gold.append(head, truth);
    table.append(gold, verdict('A: ' + data.models[a], item, data.answers[a][i]));
    if (b !== null) table.append(verdict('B: ' + data.models[b], item, data.answers[b][i]));
    const wide = make('div', undefined, 'wide');
    wide.append(table);
    detail.append(wide);
    if (item.why) detail.append(make('p', item.why, 'small'));
    const quotes = [item.marks, data.answers[a][i].quotes || [], b === null ? [] : data.answers[b][i].quotes || []];
    item.turns.forEach(([speaker, text], n) => {
      const line = make('p');
      line.append(make('b', speaker), ' ');
      for (const [flag, part] of parts(text, quotes.map(layer => layer.filter(q => q[0] === n).map(q => q[1])))) {
        const node = flag & 1 ? make('mark', part) : make('span', part);
        if (flag & 2) node.classList.add('qa');
        if (flag & 4) node.classList.add('qb');
        line.append(node);
      }
      detail.append(line);
    });
    const twins = data.items.map((other, n) => n).filter(n => n !== i && item.pair && data.items[n].pair === item.pair);
    for (const n of twins) {
      const button = make('button', 'twin: ' + data.items[n].id + ' (' + names(data.items[n].gold) + ')');
      button.type = 'button';
      button.addEventListener('click', () => {
        if (!shown.includes(n)) {
          for (const name of ['gold', 'pred', 'words']) control(name).value = '';
          control('outcome').value = 'all';
          refresh();
        }
        show(n);
        detail.focus();
      });
      detail.append(button);
    }
  };

  const refresh = () => {
    const a = +control('a').value, b = control('b').value === '' ? null : +control('b').value;
    shown = data.items.map((item, i) => i).filter(i => fits(i, a, b));
    list.replaceChildren(...shown.map(i => {
      const line = make('li'), button = make('button', data.items[i].id);
      button.type = 'button';
      button.dataset.item = i;
      button.append(make('small', names(data.items[i].gold) + ' → ' + names(data.answers[a][i].pred)));
      line.append(button);
      return line;
    }));
    said.value = shown.length + ' of ' + data.items.length;
    show(shown.includes(current) ? current : shown.length ? shown[0] : -1);
  };

  const step = by => {
    if (!shown.length) return;
    const place = Math.min(shown.length - 1, Math.max(0, shown.indexOf(current) + by));
    show(shown[place]);
  };

  root.addEventListener('input', event => { if (event.target.dataset.control) refresh(); });
  root.addEventListener('click', event => {
    const button = event.target.closest('button');
    if (button && button.dataset.item !== undefined) show(+button.dataset.item);
    if (button && button.dataset.step) step(+button.dataset.step);
  });
  list.addEventListener('keydown', event => {
    const by = {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9}[event.key];
    if (event.key === 'Enter' && shown.length) { event.preventDefault(); show(current); detail.focus(); }
    if (by === undefined) return;
    event.preventDefault();
    step(by);
    const now = list.querySelector('[aria-current="true"]');
    if (now) now.focus();
  });
  if (data.models.length > 1) control('b').value = String(data.models.length - 1);
  refresh();
}
"""
