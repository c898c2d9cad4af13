"""The script and the style of the review page: long because it is a whole program of its own, and short Python around it.

The script reads the page's JSON and makes text nodes only; it asks for nothing and keeps decisions in localStorage.
"""

STYLE = """
body { height: 100dvh; overflow: hidden; }
main { max-width: none; height: 100%; padding: 0; }
#app { height: 100%; display: flex; flex-direction: column; }
button, select, input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .3rem .55rem; min-height: 2.3rem; max-width: 100%; }
button { cursor: pointer; } button:hover { border-color: var(--c0); }
button kbd { font: 600 .72rem/1 ui-monospace, monospace; border: 1px solid currentColor; border-radius: 3px;
  padding: .1rem .25rem; margin-left: .4rem; opacity: .6; }
.top { display: flex; flex-wrap: wrap; gap: .4rem .8rem; align-items: center; padding: .5rem .8rem;
  border-bottom: 1px solid var(--line); }
.top h1 { font-size: 1.05rem; margin: 0; flex: 1 1 auto; }
.top .who { display: flex; align-items: center; gap: .4rem; font-size: .86rem; color: var(--soft); }
.top .who input { width: 10rem; color: var(--ink); }
.top button { font-size: .88rem; }
.who.missing input { outline: 2px solid rgb(var(--wrong)); }
.progress { display: flex; align-items: center; gap: .5rem; font-size: .86rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
progress { width: 6rem; height: .45rem; appearance: none; border: 0; border-radius: 9px; overflow: hidden;
  background: var(--line); }
progress::-webkit-progress-bar { background: var(--line); } progress::-webkit-progress-value { background: var(--c0); }
progress::-moz-progress-bar { background: var(--c0); }
.filters { display: flex; flex-wrap: wrap; gap: .4rem .6rem; padding: .5rem .8rem; border-bottom: 1px solid var(--line); }
.filters label { font-size: .78rem; color: var(--soft); display: flex; flex-direction: column; min-width: 0; flex: 1 1 8rem; }
.filters select, .filters input { color: var(--ink); width: 100%; font-size: .92rem; }
.filters output { align-self: end; font-size: .86rem; color: var(--soft); padding-bottom: .45rem;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.panes { flex: 1; min-height: 0; display: grid; grid-template-columns: minmax(15rem, 22rem) 1fr; }
.list { overflow-y: auto; border-right: 1px solid var(--line); position: relative; }
.list:focus-visible { outline: 0; box-shadow: inset 0 0 0 1px var(--c0); }
.list:focus-visible li[aria-selected="true"] { box-shadow: inset 0 0 0 2px var(--c0); }
.list ol { list-style: none; margin: 0; padding: 0; position: relative; }
.list li { position: absolute; left: 0; right: 0; height: 72px; padding: .45rem .7rem .4rem 1rem; cursor: pointer;
  border-bottom: 1px solid var(--line); overflow: hidden; border-left: 4px solid transparent; line-height: 1.38; }
.list li[aria-selected="true"] { background: var(--fill); border-left-color: var(--c0); }
.list .line { display: flex; gap: .4rem; align-items: baseline; justify-content: space-between; }
.list .name { font-weight: 600; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.list .words { font-size: .82rem; color: var(--soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  display: block; }
.num { font-variant-numeric: tabular-nums; font-size: .9rem; }
.chip { font-size: .74rem; line-height: 1.2; border-radius: 99px; padding: .12rem .55rem; border: 1px solid var(--line);
  white-space: nowrap; display: inline-block; }
.chip.violation { background: rgba(var(--wrong), .16); border-color: rgba(var(--wrong), .55); }
.chip.needs_review { background: var(--mark); border-color: transparent; }
.chip.audit { border-style: dashed; border-color: var(--c0); color: var(--c0); }
.chip.accept, .chip.reject, .chip.correct { background: rgba(var(--right), .16); border-color: rgba(var(--right), .5); }
.talk { overflow: hidden; display: flex; flex-direction: column; min-width: 0; border: 0; margin: 0; padding: 0;
  border-radius: 0; }
.what { padding: .5rem 1.2rem .45rem; border-bottom: 1px solid var(--line); max-width: 100%; }
.what .past { margin: .2rem 0 0; overflow-wrap: anywhere; }
.scroll { flex: 1; overflow-y: auto; padding: .6rem 1.2rem 1.5rem; }
.scroll > * { max-width: 68rem; }
.plain { list-style: none; padding: 0; margin: .2rem 0; }
.split > section { min-width: 0; }
@media (min-width: 72rem) {
  .split { display: grid; grid-template-columns: minmax(0, 1fr) minmax(17rem, 24rem); gap: 0 1.3rem; align-items: start; }
  .split .side { order: 2; position: sticky; top: 0; } .split h3:first-child { margin-top: .3rem; }
}
.talk h2 { margin: 0; border: 0; padding: 0; font-size: 1.2rem; overflow-wrap: anywhere; }
.talk h3 { margin: 1.2rem 0 .3rem; font-size: .82rem; color: var(--soft); font-weight: 600; }
.heads { display: flex; flex-wrap: wrap; gap: .3rem .7rem; align-items: center; }
.card { border: 1px solid var(--line); border-left: 4px solid rgb(var(--wrong)); border-radius: 6px; padding: .6rem .9rem;
  margin: 0 0 .6rem; }
.card.calm { border-left-color: var(--c0); }
.card .line { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; }
.card .line b { font-size: 1.02rem; }
.card p { margin: .3rem 0; } .card .soft, .soft { color: var(--soft); font-size: .88rem; }
.meter { height: .35rem; border-radius: 9px; background: var(--line); margin: .3rem 0 .5rem; overflow: hidden; }
.meter span { display: block; height: 100%; background: rgb(var(--wrong)); }
.card h4 { margin: .7rem 0 .2rem; font-size: .82rem; color: var(--soft); }
.card ul { margin: 0; padding: 0; list-style: none; }
.card li { margin: .2rem 0; }
.items li { display: inline-block; margin: .1rem .35rem .1rem 0; background: rgba(var(--wrong), .12); border-radius: 4px;
  padding: .08rem .5rem; } .items li::before { content: "✗ "; }
.quotes button { text-align: left; width: 100%; border-color: transparent; background: var(--mark); border-radius: 4px;
  min-height: 0; padding: .2rem .55rem; display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical;
  overflow: hidden; }
.turns { list-style: none; padding: 0; margin: .4rem 0 0; }
.turns li { margin: .45rem 0; padding: .4rem .8rem .5rem; border-radius: 10px; border: 1px solid var(--line); max-width: 88%;
  width: fit-content; scroll-margin: 4rem; }
.turns li.first { background: color-mix(in srgb, var(--fill) 45%, transparent); border-color: transparent; }
.turns li.other { margin-left: auto; }
.turns li.lit { border-color: #c79a00; }
.turns li:focus { outline: 2px solid var(--c0); }
.turns .who { display: flex; gap: .6rem; align-items: center; font-size: .76rem; color: var(--soft); }
.turns .said { white-space: pre-wrap; overflow-wrap: anywhere; }
.turns .who button { min-height: 0; padding: 0 .5rem; font-size: .76rem; }
mark { border-radius: 2px; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.decide { border-top: 1px solid var(--line); padding: .55rem 1.2rem .6rem;
  background: var(--paper); max-height: 62%; overflow-y: auto; }
.acts { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
.acts input { flex: 1 1 14rem; min-width: 0; }
.acts .go { border-color: rgba(var(--right), .7); background: rgba(var(--right), .13); }
.acts .no { border-color: rgba(var(--wrong), .6); background: rgba(var(--wrong), .1); }
.acts .asked { outline: 2px solid rgb(var(--wrong)); }
.fix { margin-bottom: .6rem; }
.fix fieldset { border: 1px solid var(--line); border-radius: 6px; margin: 0 0 .5rem; padding: .2rem .7rem .5rem; min-width: 0; }
.fix legend { font-size: .8rem; color: var(--soft); padding: 0 .3rem; }
.fix label { display: inline-flex; gap: .35rem; align-items: center; margin: .15rem .9rem .15rem 0; min-height: 1.9rem; }
.fix label input { min-height: 0; width: 1.05rem; height: 1.05rem; }
.fix ul { list-style: none; margin: 0; padding: 0; }
.fix li { display: flex; gap: .6rem; align-items: center; margin: .15rem 0; }
.fix li button { min-height: 0; padding: .05rem .5rem; font-size: .8rem; flex: none; }
.foot { font-size: .76rem; color: var(--soft); margin: .35rem 0 0; }
.foot.warn { color: rgb(var(--wrong)); font-weight: 600; }
.empty { padding: 2rem 1.2rem; color: var(--soft); }
dialog { color: var(--ink); background: var(--paper); border: 1px solid var(--line); border-radius: 8px; max-width: 32rem; }
dialog::backdrop { background: rgba(0, 0, 0, .4); }
dialog table td, dialog table th { text-align: left; white-space: normal; }
.back { display: none; } .file { display: none; }
@media (max-width: 46rem) {
  .top { padding: .4rem .6rem; gap: .3rem .5rem; } .top h1 { flex-basis: 100%; font-size: .98rem; }
  .top .who input { width: 8.5rem; }
  .top button { font-size: .84rem; padding: .2rem .45rem; min-height: 2.2rem; } progress { width: 4rem; }
  .top .key { display: none; }
  .filters { padding: .4rem .6rem; gap: .3rem .5rem; } .filters label { flex: 1 1 30%; } .filters .wide { flex-basis: 55%; }
  .panes { grid-template-columns: 1fr; } .list { border-right: 0; }
  .panes .talk { display: none; } .reading .panes .talk { display: flex; } .reading .list, .reading .filters { display: none; }
  .reading .top .later, .reading .top .progress, .reading .top [data-act=download] { display: none; }
  .reading .top .who:not(.missing) { display: none; } .reading .top h1 { flex: 1 1 60%; min-width: 0; white-space: nowrap;
    overflow: hidden; text-overflow: ellipsis; }
  .scroll { padding: .6rem .8rem 1rem; } .what { padding: .4rem .8rem; }
  .decide { padding: .45rem .7rem .5rem; } .back { display: inline-block; }
  .acts button { flex: 1 1 28%; padding: .3rem .3rem; min-height: 2.7rem; } .acts input { flex-basis: 100%; order: -1; }
  button kbd { display: none; } .foot.hint { display: none; } .turns li { max-width: 94%; }
}
"""

SCRIPT = r"""
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const app = document.getElementById('app'), items = data.items, ROW = 72;

// The browser's store; where there is none (a strict policy), decisions live until the page is closed, and the page says so.
const store = (() => {
  const base = 'swallow_check/';
  try {
    localStorage.setItem(base + 'try', '1');
    localStorage.removeItem(base + 'try');
  } catch (error) { return {keeps: false, get: () => null, set: () => false, drop: () => {}, all: () => []}; }
  return {
    keeps: true,
    get: name => localStorage.getItem(base + name),
    set: (name, value) => { try { localStorage.setItem(base + name, value); return true; } catch (error) { return false; } },
    drop: name => localStorage.removeItem(base + name),
    all: prefix => Object.keys(localStorage).filter(k => k.startsWith(base + prefix)).map(k => localStorage.getItem(k)),
  };
})();
let keeps = store.keeps;
let language = store.get('language') || data.language;
if (!data.words[language]) language = data.language;
const t = name => data.words[language][name];
const bySha = new Map(items.map((item, i) => [item.sha, i]));
const decisions = new Map();
const past = {accept: 'accepted', reject: 'rejected', correct: 'corrected'};
const parsed = line => {  // a decision on one of these conversations, or null: files and stores may hold anything
  let row = null;
  try { row = JSON.parse(line); } catch (error) { return null; }
  const fits = row && bySha.has(row.input_sha256) && past[row.decision] && ['labels', 'evidence', 'missing_items'].every(
    name => Array.isArray(row[name])) && ['reason', 'reviewer', 'decided_at'].every(name => typeof row[name] === 'string')
    && row.evidence.every(e => e && typeof e.quote === 'string');
  return fits ? row : null;
};
for (const row of store.all(data.key + '/').map(parsed)) if (row) decisions.set(row.input_sha256, row);
const texts = items.map(item => (item.id + ' ' + item.turns.map(turn => turn[1]).join(' ')).toLowerCase());
const state = {reviewer: store.get('reviewer') || '', current: items.length ? 0 : -1, fix: null, reason: '', asked: '', note: '',
  status: 'all', kind: 'all', category: '', order: 'score', words: '', lit: -1};
let shown = [];

const make = (tag, attributes, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (['value', 'checked', 'disabled', 'tabIndex'].includes(name)) node[name] = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
};
const nameOf = c => data.categories[c][language];
const labelName = id => { const c = data.categories.findIndex(x => x.id === id); return c < 0 ? id : nameOf(c); };
const percent = score => score === null ? '–' : (100 * score).toFixed(score < .1 ? 2 : 1) + ' %';
const decided = i => decisions.get(items[i].sha);

// Decisions

const predictedLabels = item => item.found.map(f => data.categories[f.c].id);
const decide = (kind, more) => {
  const i = state.current;
  if (i < 0) return;
  const item = items[i], reason = state.reason.trim();
  if (!state.reviewer.trim()) {
    who.classList.add('missing');
    say(t('reviewer_needed'));
    return who.querySelector('input').focus();
  }
  if (kind !== 'accept' && !reason) {
    state.asked = kind;
    say(t('reason_needed'));
    draw();
    return focusReason();
  }
  const found = {
    accept: {labels: predictedLabels(item), missing_items: [...new Set(item.found.flatMap(f => f.missing))],
      evidence: item.found.flatMap(f => f.quotes.map(q => ({category: data.categories[f.c].id, turn: q[0], quote: q[1]})))},
    reject: {labels: [], evidence: [], missing_items: []},
    correct: more,
  }[kind];
  const row = {conversation_id: item.id, input_sha256: item.sha, decision: kind, ...found, reason,
    reviewer: state.reviewer.trim(), decided_at: new Date().toISOString(), model: data.model, taxonomy: data.taxonomy,
    predicted: {verdict: item.verdict, score: item.score, labels: predictedLabels(item), audit: item.audit}};
  decisions.set(item.sha, row);
  if (keeps && !store.set(data.key + '/' + item.sha, JSON.stringify(row))) keeps = false;
  Object.assign(state, {fix: null, reason: '', asked: ''});
  say(item.id + ': ' + t(past[kind]));
  const place = shown.indexOf(i);
  filter();
  const next = shown.slice(shown[place] === i ? place + 1 : place).find(n => !decided(n));
  go(next !== undefined ? next : shown.includes(i) ? i : shown.length ? shown[Math.min(place, shown.length - 1)] : -1);
};
const undo = () => {
  if (state.current < 0 || !decided(state.current)) return;
  decisions.delete(items[state.current].sha);
  store.drop(data.key + '/' + items[state.current].sha);
  filter();
  draw();
};
const say = words => { live.textContent = words; state.note = words; };

const download = () => {
  const lines = items.map(item => decisions.get(item.sha)).filter(Boolean).map(row => JSON.stringify(row) + '\n');
  const safe = text => text.replace(/[^\p{L}\p{N}_.-]+/gu, '_').slice(0, 40);
  const link = make('a', {href: URL.createObjectURL(new Blob(lines, {type: 'application/jsonl'})),
    download: 'decisions_' + safe(data.name) + (state.reviewer ? '_' + safe(state.reviewer) : '') + '.jsonl'});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
};
const load = async file => {
  let count = 0;
  for (const line of (await file.text()).split('\n')) {
    const row = parsed(line), mine = row && decisions.get(row.input_sha256);
    if (!row || (mine && mine.decided_at >= row.decided_at)) continue;
    decisions.set(row.input_sha256, row);
    if (keeps && !store.set(data.key + '/' + row.input_sha256, JSON.stringify(row))) keeps = false;
    count++;
  }
  filter();
  draw();
  say(count + ' ' + t('loaded'));
};

// The list: only the rows in sight exist.

const fits = i => {
  const item = items[i], row = decided(i), {status, kind, category} = state;
  if (status === 'open' ? row : status === 'done' ? !row : status !== 'all' && !(row && row.decision === status)) return false;
  if (kind === 'audit' ? !item.audit : kind !== 'all' && item.verdict !== kind) return false;
  if (category !== '' && !item.found.some(f => f.c === +category)) return false;
  return !state.words || texts[i].includes(state.words);
};
const byId = items.map((item, i) => i).sort((a, b) => items[a].id < items[b].id ? -1 : items[a].id > items[b].id ? 1 : a - b);
const byScore = items.map((item, i) => i);
const filter = () => {
  shown = (state.order === 'score' ? byScore : byId).filter(fits);
  drawList();
};
const drawList = () => {
  ol.style.height = shown.length * ROW + 'px';
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(shown.length, first + Math.ceil((list.clientHeight || 600) / ROW) + 9);
  const rows = [];
  for (let place = first; place < last; place++) rows.push(rowOf(place));
  ol.replaceChildren(...rows);
  list.setAttribute('aria-activedescendant', shown.includes(state.current) ? 'row' + state.current : '');
  output.value = shown.length.toLocaleString() + ' / ' + items.length.toLocaleString() + ' ' + t('count');
  const total = decisions.size;
  bar.max = Math.max(1, items.length);
  bar.value = total;
  progressWords.textContent = t('decided') + ' ' + total.toLocaleString() + ' / ' + items.length.toLocaleString();
};
const rowOf = place => {
  const i = shown[place], item = items[i], row = decided(i);
  const found = item.found.length ? item.found.map(f => nameOf(f.c)).join('、') : t(item.verdict);
  const node = make('li', {id: 'row' + i, role: 'option', 'aria-selected': String(i === state.current), 'data-item': i,
    'aria-setsize': shown.length, 'aria-posinset': place + 1},
    make('div', {class: 'line'}, make('span', {class: 'name'}, item.id),
      row ? make('span', {class: 'chip ' + row.decision}, '✓ ' + t(past[row.decision]))
        : item.audit ? make('span', {class: 'chip audit'}, t('audit')) : make('span', {class: 'num'}, percent(item.score))),
    make('span', {class: 'words'}, found),
    make('span', {class: 'words'}, item.turns.length ? (item.found[0]?.quotes[0]?.[1] || item.turns[0][1]) : ''));
  node.style.top = place * ROW + 'px';
  return node;
};
const reveal = () => {
  const place = shown.indexOf(state.current);
  if (place < 0) return;
  const top = place * ROW, high = list.clientHeight;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + high) list.scrollTop = top + ROW - high;
};
const go = i => {
  if (i !== state.current) Object.assign(state, {fix: null, reason: '', asked: '', lit: -1});
  state.current = i;
  reveal();
  drawList();
  draw();
  scroll.scrollTop = 0;
};
const step = by => {
  if (!shown.length) return;
  const place = shown.indexOf(state.current);
  go(shown[place < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, place + by))]);
};

// One conversation

const parts = (text, quotes) => {
  const lit = new Uint8Array(text.length);
  for (const quote of quotes)
    for (let at = text.indexOf(quote); quote && at >= 0; at = text.indexOf(quote, at + 1)) lit.fill(1, at, at + quote.length);
  const found = [];
  for (let from = 0, k = 1; k <= text.length; k++)
    if (k === text.length || lit[k] !== lit[from]) { found.push([lit[from], text.slice(from, k)]); from = k; }
  return found;
};
const quotesNow = item => state.fix ? state.fix.evidence.map(e => [e.turn, e.quote])
  : (row => row ? row.evidence.map(e => [e.turn, e.quote]) : item.found.flatMap(f => f.quotes))(decided(state.current));
const cardOf = f => {
  const rules = f.rules.map(n => data.rules[n]), c = data.categories[f.c];
  return make('section', {class: 'card'},
    make('div', {class: 'line'}, make('b', {}, nameOf(f.c)),
      f.score === null ? null : make('span', {class: 'num'}, percent(f.score))),
    f.score === null ? null : (() => {
      const fill = make('span');
      fill.style.width = 100 * f.score + '%';
      return make('div', {class: 'meter', 'aria-hidden': 'true'}, fill);
    })(),
    make('p', {class: 'soft', lang: data.language}, c.definition),
    f.why ? make('p', {lang: data.language}, t('rationale') + ': ' + f.why) : null,
    f.missing.length ? make('h4', {}, t('missing')) : null,
    f.missing.length ? make('ul', {class: 'items', lang: data.language}, ...f.missing.map(m => make('li', {}, m))) : null,
    f.quotes.length ? make('h4', {}, t('evidence')) : null,
    f.quotes.length ? make('ul', {class: 'quotes', lang: data.language}, ...f.quotes.map(q => make('li', {},
      make('button', {type: 'button', onclick: () => jump(q[0]),
        title: q[2] === null || q[2] === undefined ? undefined : t('drop') + ' ' + percent(q[2])},
        '#' + (q[0] + 1) + ' ' + q[1])))) : null,
    make('h4', {}, t('legal')),
    rules.length ? make('ul', {lang: data.language}, ...rules.map(r => make('li', {}, r.text, ' ',
      make('span', {class: 'soft'}, t('from') + ' ' + r.effective_from
        + (r.effective_to ? ' – ' + t('to') + ' ' + r.effective_to : '')
        + (r.note ? ' · ' + r.note : ''))))) : make('p', {class: 'soft'}, t('no_rule')));
};
const sideOf = item => {
  const unsaid = new Set(item.found.flatMap(f => f.missing)), others = item.required.filter(([name]) => !unsaid.has(name));
  return make('section', {class: 'side'},
    ...(item.found.length ? item.found.map(cardOf) : [make('section', {class: 'card calm'},
      make('p', {}, item.audit ? t('audit_note') : item.verdict === 'needs_review' ? t('invalid') : t('no_finding')))]),
    ...(others.length ? [make('h3', {}, t('required')), make('ul', {lang: data.language, class: 'soft plain'},
      ...others.map(([name, status]) => make('li', {}, {missing: '✗ ', explained: '✓ '}[status] || '– ', name,
        ' (' + t(status === 'missing' ? 'missing_status' : status) + ')')))] : []));
};
const turnsOf = (item, quotes) => make('ol', {class: 'turns', lang: data.language}, ...item.turns.map(([speaker, text], n) => {
  const mine = quotes.filter(q => q[0] === n).map(q => q[1]), side = speaker === 0 ? 'first' : 'other';
  return make('li', {class: side + (mine.length ? ' lit' : ''), 'data-turn': n, tabIndex: -1},
    make('div', {class: 'who'}, make('span', {}, (n + 1) + ' ' + data.speakers[speaker]),
      state.fix ? make('button', {type: 'button', lang: language, onmousedown: e => e.preventDefault(), onclick: () => cite(n)},
        t('add')) : null),
    make('div', {class: 'said'}, ...parts(text, mine).map(([lit, part]) => make(lit ? 'mark' : 'span', {}, part))));
}));
const jump = turn => {
  const node = scroll.querySelector('[data-turn="' + turn + '"]');
  if (node) { node.scrollIntoView({block: 'center'}); node.focus({preventScroll: true}); }
};
const nextEvidence = () => {
  if (state.current < 0) return;
  const turns = [...new Set(quotesNow(items[state.current]).map(q => q[0]))].sort((a, b) => a - b);
  if (!turns.length) return;
  const after = turns.find(n => n > state.lit);
  state.lit = after === undefined ? turns[0] : after;
  jump(state.lit);
};
const draw = () => {
  const i = state.current, place = scroll.scrollTop;
  app.classList.toggle('correcting', Boolean(state.fix));
  if (i < 0) {
    scroll.replaceChildren(make('p', {class: 'empty'}, t('nothing')));
    what.replaceChildren();
    acts.replaceChildren();
    return;
  }
  const item = items[i], quotes = quotesNow(item), row = decided(i);
  what.replaceChildren(
    make('div', {class: 'heads'}, make('h2', {}, item.id), make('span', {class: 'chip ' + item.verdict}, t(item.verdict)),
      item.audit ? make('span', {class: 'chip audit'}, t('audit')) : null,
      row ? make('span', {class: 'chip ' + row.decision}, '✓ ' + t(past[row.decision])) : null,
      make('span', {class: 'soft'}, t('score') + ' ' + percent(item.score)),
      item.date ? make('span', {class: 'soft'}, item.date) : null,
      make('span', {class: 'soft'}, (shown.indexOf(i) + 1 || '–') + ' / ' + shown.length)),
    row ? make('p', {class: 'soft past'}, [row.reviewer, new Date(row.decided_at).toLocaleString(language),
      row.labels.map(labelName).join('、') || t('compliant'), row.reason].filter(Boolean).join(' · ')) : '');
  scroll.replaceChildren(
    make('div', {class: 'split'}, sideOf(item), make('section', {}, make('h3', {}, t('conversation')), turnsOf(item, quotes))));
  scroll.scrollTop = place;
  drawActs(item, row);
};
const drawActs = (item, row) => {
  const button = (kind, words, key, act, title) =>
    make('button', {type: 'button', class: kind, onclick: act, 'data-act': key, title}, words, make('kbd', {}, key));
  const reason = make('input', {type: 'text', class: state.asked ? 'asked' : '', value: state.reason,
    placeholder: t('reason'), 'aria-label': t('reason'), list: 'reasons', 'data-control': 'reason', autocomplete: 'off',
    oninput: e => { state.reason = e.target.value; }});
  const foot = make('p', {class: 'foot' + (keeps ? ' hint' : ' warn')}, keeps ? t('saved_here') : t('not_saved'));
  if (state.fix) {
    acts.replaceChildren(fixOf(), make('div', {class: 'acts'}, reason,
      make('button', {type: 'button', class: 'go', onclick: saveFix, 'data-act': 'save'}, t('save')),
      make('button', {type: 'button', onclick: () => { state.fix = null; state.asked = ''; draw(); }}, t('cancel'))));
    return;
  }
  acts.replaceChildren(make('div', {class: 'acts'},
    ...(item.found.length
      ? [button('go', t('accept'), 'A', () => decide('accept')),
        button('no', t('reject'), 'R', () => decide('reject'), t('reject_hint'))]
      : [button('go', t('confirm'), 'A', () => decide('accept'))]),
    button('', t('correct'), 'C', startFix), row ? button('', t('undo'), 'U', undo) : null, reason), foot,
    make('datalist', {id: 'reasons'}, ...[...new Set([...decisions.values()].map(d => d.reason).filter(Boolean))].slice(-30)
      .map(value => make('option', {value}))));
};
const focusReason = () => acts.querySelector('[data-control=reason]')?.focus();

// Correcting

const startFix = () => {
  if (state.current < 0) return;
  const item = items[state.current], row = decided(state.current);
  state.fix = row ? {labels: [...row.labels], missing: [...row.missing_items], evidence: row.evidence.map(e => ({...e}))}
    : {labels: predictedLabels(item), missing: [...new Set(item.found.flatMap(f => f.missing))],
      evidence: item.found.flatMap(f => f.quotes.map(q => ({category: data.categories[f.c].id, turn: q[0], quote: q[1]})))};
  if (row) state.reason = row.reason;
  draw();
  (acts.querySelector('input:checked') || acts.querySelector('input')).focus();
};
const keepFix = () => {  // evidence and items of a category that is no longer chosen go with it
  const {fix} = state, kind = id => data.categories.find(c => c.id === id);
  fix.evidence = fix.evidence.filter(e => fix.labels.includes(e.category));
  const possible = new Set(fix.labels.flatMap(id => kind(id).required));
  if (!fix.labels.some(id => kind(id).kind === 'omission')) fix.missing = [];
  else fix.missing = fix.missing.filter(m => possible.has(m) || items[state.current].found.some(f => f.missing.includes(m)));
};
const fixOf = () => {
  const {fix} = state, type = data.several ? 'checkbox' : 'radio';
  const choose = (id, on) => {
    if (id === null) fix.labels = [];
    else if (data.several) fix.labels = data.categories.map(c => c.id).filter(c => c === id ? on : fix.labels.includes(c));
    else {
      if (fix.evidence.length) fix.evidence = fix.evidence.map(e => ({...e, category: id}));  // what was quoted stays quoted
      fix.labels = [id];
    }
    keepFix();
    draw();
    acts.querySelector('[data-label="' + (id === null ? '' : id) + '"]').focus();
  };
  const option = (id, words) => make('label', {}, make('input', {type, name: 'label', 'data-label': id === null ? '' : id,
    checked: id === null ? !fix.labels.length : fix.labels.includes(id), onchange: e => choose(id, e.target.checked)}), words);
  const omitted = data.categories.filter(c => fix.labels.includes(c.id) && c.kind === 'omission').flatMap(c => c.required);
  const possible = [...new Set([...omitted, ...fix.missing])];
  return make('div', {class: 'fix'},
    make('fieldset', {}, make('legend', {}, t('which')), option(null, t('compliant')),
      ...data.categories.map((c, n) => option(c.id, nameOf(n)))),
    possible.length ? make('fieldset', {}, make('legend', {}, t('which_missing')), ...possible.map(name => make('label',
      {lang: data.language}, make('input', {type: 'checkbox', checked: fix.missing.includes(name), onchange: e => {
        fix.missing = possible.filter(m => m === name ? e.target.checked : fix.missing.includes(m));
      }}), name))) : null,
    fix.labels.length ? make('fieldset', {}, make('legend', {}, t('which_evidence')), make('p', {class: 'soft'}, t('add_hint')),
      make('ul', {lang: data.language}, ...fix.evidence.map((e, n) => make('li', {}, make('button', {type: 'button',
        lang: language, onclick: () => { fix.evidence.splice(n, 1); draw(); }}, t('remove')),
        '#' + (e.turn + 1) + ' ' + e.quote)))) : null);
};
const cite = turn => {
  const {fix} = state, text = items[state.current].turns[turn][1], chosen = String(getSelection()).trim();
  if (!fix.labels.length) return;
  const quote = chosen && text.includes(chosen) ? chosen : text;
  const category = fix.labels[fix.labels.length - 1];
  if (!fix.evidence.some(e => e.turn === turn && e.quote === quote)) fix.evidence.push({category, turn, quote});
  fix.evidence.sort((a, b) => a.turn - b.turn);
  getSelection().removeAllRanges();
  draw();
  scroll.querySelector('[data-turn="' + turn + '"] button').focus();
};
const saveFix = () => {
  const {labels, evidence, missing} = state.fix;
  decide('correct', {labels, evidence, missing_items: missing});
};

// The frame

const live = make('div', {class: 'foot', role: 'status', 'aria-live': 'polite'});
live.style.cssText = 'position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)';
const output = make('output'), bar = make('progress'), progressWords = make('span');
const ol = make('ol', {role: 'presentation'});
const list = make('div', {class: 'list', role: 'listbox', tabIndex: 0}, ol);
const what = make('div', {class: 'what'}), scroll = make('div', {class: 'scroll', tabIndex: -1});
const acts = make('div', {class: 'decide'});
const who = make('label', {class: 'who'});
const head = make('header', {class: 'top'}), filters = make('div', {class: 'filters'}), dialog = make('dialog');
const file = make('input', {type: 'file', class: 'file', accept: '.jsonl', onchange: e => {
  if (e.target.files[0]) load(e.target.files[0]);
  e.target.value = '';
}});
const talk = make('article', {class: 'talk'}, what, scroll, acts);
app.append(head, filters, make('div', {class: 'panes'}, list, talk), dialog, file, live);

const select = (name, options) => make('label', {}, t(name), make('select', {'data-control': name, oninput: e => {
  state[name] = e.target.value;
  list.scrollTop = 0;
  filter();
  if (!shown.includes(state.current)) go(shown.length ? shown[0] : -1); else draw();
}}, ...options.map(([value, words]) => make('option', {value, selected: state[name] === value}, words))));
const frame = () => {
  document.documentElement.lang = language;
  document.title = t('title') + ': ' + data.name;
  list.setAttribute('aria-label', t('kind'));
  who.replaceChildren(t('reviewer'), make('input', {type: 'text', value: state.reviewer, placeholder: t('reviewer_hint'),
    'data-control': 'reviewer', autocomplete: 'off', oninput: e => {
      state.reviewer = e.target.value;
      store.set('reviewer', state.reviewer);
    }, onchange: () => who.classList.remove('missing')}));
  head.replaceChildren(
    make('button', {type: 'button', class: 'back', onclick: () => app.classList.remove('reading')}, '◀ ' + t('back')),
    make('h1', {}, t('title') + '  ', make('span', {class: 'soft'}, data.name + ' · ' + data.checked.toLocaleString() + ' '
      + t('checked'))),
    make('span', {class: 'progress'}, bar, progressWords), who,
    make('button', {type: 'button', 'data-act': 'download', onclick: download}, t('download')),
    make('button', {type: 'button', class: 'later', onclick: () => file.click()}, t('load')),
    make('button', {type: 'button', class: 'later', 'data-act': 'language', onclick: switchLanguage}, t('other')),
    make('button', {type: 'button', class: 'later key', 'data-act': 'help', onclick: help}, t('help') + ' ?'));
  filters.replaceChildren(
    select('status', [['all', t('all')], ['open', t('open')], ['done', t('done')], ['accept', t('accepted')],
      ['reject', t('rejected')], ['correct', t('corrected')]]),
    select('kind', [['all', t('all')], ['violation', t('violation')], ['needs_review', t('needs_review')], ['audit', t('audit')],
      ['no_violation', t('no_violation')]]),
    select('category', [['', t('all')], ...data.categories.map((c, n) => [String(n), nameOf(n)])]),
    select('order', [['score', t('by_score')], ['file', t('by_file')]]),
    make('label', {class: 'wide'}, t('search'), make('input', {type: 'search', 'data-control': 'words', value: state.words,
      autocomplete: 'off', oninput: e => {
        state.words = e.target.value.trim().toLowerCase();
        list.scrollTop = 0;
        filter();
        if (!shown.includes(state.current)) go(shown.length ? shown[0] : -1); else draw();
      }})),
    output);
};
const switchLanguage = () => {
  language = language === 'ja' ? 'en' : 'ja';
  store.set('language', language);
  frame();
  drawList();
  draw();
};
const help = () => {
  dialog.replaceChildren(make('h2', {}, t('keys_title')),
    make('table', {}, make('tbody', {}, ...t('keys').map(([key, what]) => make('tr', {}, make('th', {scope: 'row'}, key),
      make('td', {}, what))))),
    make('p', {class: 'soft'}, t('confidential')),
    ...data.notes.map(note => make('p', {class: 'soft', lang: data.language}, note)),
    make('button', {type: 'button', onclick: () => dialog.close()}, t('close')));
  dialog.showModal();
};

list.addEventListener('scroll', () => drawList());
list.addEventListener('click', event => {
  const row = event.target.closest('li');
  if (!row) return;
  go(+row.dataset.item);
  app.classList.add('reading');
});
list.addEventListener('keydown', event => {
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const by = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9}[event.key];
  if (event.key === 'Enter') { app.classList.add('reading'); scroll.focus(); }
  if (by === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  step(by);
});
document.addEventListener('keydown', event => {
  if (event.isComposing || event.keyCode === 229 || event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
  const typing = event.target.matches?.('input:not([type=radio]):not([type=checkbox]), select, textarea');
  if (event.key === 'Escape') {
    if (typing) event.target.blur(); else if (state.fix) { state.fix = null; draw(); } else app.classList.remove('reading');
    return list.focus();
  }
  if (event.target.dataset?.control === 'reason' && event.key === 'Enter') {
    event.preventDefault();
    state.reason = event.target.value;
    if (state.fix) saveFix(); else if (state.asked) decide(state.asked);
    return;
  }
  if (typing || (event.target.matches?.('button, input') && (event.key === 'Enter' || event.key === ' '))) return;
  if (event.target.matches?.('input') && event.key.startsWith('Arrow')) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const act = {j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1), a: () => decide('accept'),
    r: () => items[state.current]?.found.length && decide('reject'), c: startFix, u: undo, e: nextEvidence, l: switchLanguage,
    '?': help, '/': () => filters.querySelector('[data-control=words]').focus()}[key];
  if (!act || (state.fix && 'jkaruc'.includes(key))) return;  // a slip of the finger must not throw a correction away
  event.preventDefault();
  act();
});
window.addEventListener('storage', event => {  // the same page in another tab
  if (!event.key?.startsWith('swallow_check/' + data.key + '/')) return;
  const sha = event.key.slice(event.key.lastIndexOf('/') + 1);
  const row = event.newValue && parsed(event.newValue);
  if (row) decisions.set(sha, row); else decisions.delete(sha);
  filter();
  if (!state.fix) draw();
});
window.addEventListener('resize', drawList);
frame();
filter();
draw();
"""
