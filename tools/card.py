"""What a model card says (base, method, data, teachers, evaluation, terms; tools.export writes it), and data cards.

    python -m tools.export --run=runs/demo/cpt_sft_0 --out=runs/demo/model --scores=runs/demo/evaluate
    python -m tools.card --data=runs/demo/prepare --out=runs/demo/corpus_card.md
    python -m tools.card --data=runs/demo/synthesize --out=runs/demo/conversations_card.md

A data card is made of the folder of experiments.prepare or .synthesize: what it holds, where that comes from and under which
terms, what was left out and why, what was looked for of the test sets, and what it must not be used for.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swallow_jax import run

# Pattern of a licence's name or hub id -> what its owner asks of those who pass a derived model on.
_TERMS = (
    (
        r"llama[-_ ]?(3(?:\.\d)?|4)",
        'Name begins with "{rule}"; "Built with {built}" is shown; a copy of the licence and this notice go along: "Llama {0} is'
        ' licensed under the Llama {0} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."',
    ),
    (
        r"llama[-_ ]?(2)",
        'A copy of the licence and this notice go along: "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c)'
        ' Meta Platforms, Inc. All Rights Reserved."; its outputs may not improve other language models.',
    ),
    (
        r"gemma",
        'This notice goes along: "Gemma is provided under and subject to the Gemma Terms of Use found at'
        ' ai.google.dev/gemma/terms"; its use restrictions bind whoever receives the model, also one trained on its outputs.',
    ),
    (r"apache", "A copy of the licence and the notices go along; changes are stated (this card states them)."),
    (r"not stated", "The source names no licence: find it before the model is passed on."),
    (r"gpl|gfdl|cc-by-sa|mpl", "Texts under a copyleft licence; keep the attributions below."),
    (r"", "See its text; keep the attributions below."),
)


def naming_warnings(name: str, licences: Sequence[str]) -> list[str]:
    """Sentences on a name that the licences of Llama 3 and later do not allow (section 1.b.i)."""
    found = []
    for licence in licences:
        rule = _naming_rule(licence)
        if rule and not re.sub(r"[-_ ]+", " ", name).startswith(rule):
            found.append(
                f'the name {name!r} does not begin with "{rule}", as {licence} asks of models made from Llama or its outputs'
            )
    return found


def _naming_rule(licence: str) -> str | None:
    if match := re.search(r"llama[-_ ]?(3(?:\.\d)?|4)", licence, re.IGNORECASE):
        return "Llama 3" if match[1] == "3" else "Llama"
    return None


def _terms(licence: str) -> str:
    for pattern, terms in _TERMS:
        if match := re.search(pattern, licence, re.IGNORECASE):
            rule = _naming_rule(licence) or ""
            return terms.format(*match.groups(), rule=rule, built="Meta Llama 3" if rule == "Llama 3" else "Llama")
    raise AssertionError(licence)


def history(source: str | Path) -> tuple[list[dict[str, Any]], str | None]:
    """(steps of training from the base on, name of the base) as far as the run folders and manifests named are still there."""
    source = Path(source)
    manifest = _read(source / "manifest.json")
    if not (source / "checkpoints").is_dir():
        if "method" in manifest:  # an export of ours: it tells its own history
            return list(manifest["method"]), manifest.get("base")
        return [], manifest.get("name") or model_name(source)
    config, result = _read(source / "config.json"), manifest.get("result", {})
    init = config.get("init") or None
    before, base = history(init) if init else ([], None)
    tuned = "samples" in manifest.get("inputs", {})
    step = {
        "kind": "supervised fine-tuning" if tuned else "continued pre-training" if init else "pre-training from random weights",
        "run": str(source),
        "steps": result.get("steps"),
        "tokens": result.get("tokens"),
        "batch_size": config.get("data", {}).get("batch_size"),
        "learning_rate": config.get("optim", {}).get("learning_rate"),
        "heldout_loss": result.get("heldout_loss"),
        "data": {name.removeprefix("shards:"): entry["sha256"] for name, entry in manifest.get("inputs", {}).items()},
        "git_commit": manifest.get("git_commit"),
    }
    return [*before, step], base


def model_name(path: str | Path) -> str:
    """ORGANISATION/NAME of a folder in the Hugging Face cache, else the folder's (or file's) name."""
    path = Path(path).absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def read_scores(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a scores.json (or results.json), or of the folder that holds one."""
    path = Path(path)
    files = [path / "scores.json", path / "results.json"] if path.is_dir() else [path]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path} holds no scores.json; run experiments.evaluate, or leave --scores out")
    rows = _read(file).get("scores")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and {"model", "metric", "value"} <= set(r) for r in rows):
        raise ValueError(f"{file}: no list of scores with model, metric and value; experiments.evaluate writes such a file")
    return rows


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error}); mend or remove it") from None
    return value if isinstance(value, dict) else {}


def text(manifest: Mapping[str, Any], *, scores: Sequence[Mapping[str, Any]], warnings: Sequence[str]) -> str:
    """README.md of an exported folder, with the head that the Hugging Face hub reads."""
    licences, base = manifest["licences"], manifest["base"]
    single = licences[0].lower() if len(licences) == 1 and re.fullmatch(r"[a-z0-9.-]+", licences[0].lower()) else None
    head = [f"license: {single or 'other'}"]
    if single is None:
        head.append(f"license_name: {json.dumps(', '.join(licences) or 'not stated', ensure_ascii=False)}")
    if base:
        head.append(f"base_model: {json.dumps(base, ensure_ascii=False)}")
    parts = ["---", *head, "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {manifest['name']}", ""]
    parts += [line for warning in warnings for line in (f"> **Warning:** {warning}.", "")]
    if any(_naming_rule(licence) for licence in licences):
        parts += [
            "Built with Meta Llama 3" if {_naming_rule(x) for x in licences} == {"Llama 3", None} else "Built with Llama",
            "",
        ]
    parts += [
        "| | |",
        "|---|---|",
        f"| base | {base or 'none: random weights'} |",
        f"| weights | {manifest['dtype']} safetensors |",
    ]
    parts += [f"| params_sha256 | `{manifest['params_sha256']}` |", ""]
    parts += ["## Method", "", *(_step(number, step) for number, step in enumerate(manifest["method"], 1))]
    parts += ["" if manifest["method"] else "Weights as they came, written in another form.\n"]
    if manifest["teachers"]:
        parts += [
            "## Teachers",
            "",
            "Models that wrote training data.",
            "",
            *_table(
                ["teacher", "kind", "licence", "sha256"],
                [
                    [t.get("model"), t.get("kind"), t.get("licence") or "not stated", t.get("sha256")]
                    for t in manifest["teachers"].values()
                ],
            ),
        ]
    if manifest["attributions"]:
        columns = ["source", "licence", "attribution"]
        rows = [row if isinstance(row, Mapping) else {"attribution": row} for row in manifest["attributions"]]
        parts += ["## Data", "", *_table(columns, [[row.get(c) for c in columns] for row in rows])]
    parts += ["## Evaluation", ""]
    if scores:
        parts += _table(
            ["model", "test set", "metric", "n", "value", "95 % interval"],
            [
                [r["model"], r.get("test_set"), r["metric"], r.get("n"), _number(r["value"]), _interval(r.get("ci95"))]
                for r in scores
            ],
        )
    else:
        parts += ["Not evaluated here.", ""]
    parts += ["## Terms inherited", "", *_table(["licence", "what it asks"], [[name, _terms(name)] for name in licences])]
    return "\n".join(parts).rstrip() + "\n"


def data(folder: str | Path) -> str:
    """The data card of a finished prepare or synthesize folder, in Markdown with the head that the Hugging Face hub reads."""
    folder = Path(folder)
    manifest, config = _read(folder / "manifest.json"), _read(folder / "config.json")
    result = manifest.get("result") or {}
    if "documents_in" not in result and "accepted_by_class" not in result:
        raise ValueError(f"{folder} is no finished folder of experiments.prepare or experiments.synthesize")
    sections = _conversations(folder, config, manifest, result) if "accepted" in result else _corpus(folder, config, result)
    licences = manifest["licences"]
    single = licences[0].lower() if len(licences) == 1 and re.fullmatch(r"[a-z0-9.-]+", licences[0].lower()) else "other"
    named = [] if single != "other" else [f"license_name: {json.dumps(', '.join(licences) or 'not stated', ensure_ascii=False)}"]
    parts = ["---", f"license: {single}", *named, "---", "", *sections]
    if manifest.get("attributions"):
        columns = ["source", "licence", "attribution"]
        rows = [[row.get(c) for c in columns] for row in manifest["attributions"]]
        parts += ["## Where the texts come from", "", *_table(columns, rows)]
    if teachers := manifest.get("teachers"):
        rows = [[t.get("model"), t.get("kind"), t.get("revision"), t.get("licence") or "not stated"] for t in teachers.values()]
        parts += ["## Who wrote them", "", *_table(["teacher", "kind", "revision", "licence"], rows)]
    parts += ["## Terms inherited", "", *_table(["licence", "what it asks"], [[name, _terms(name)] for name in licences])]
    made = [
        ["folder", str(folder)],
        ["commit", manifest.get("git_commit") or "unknown"],
        ["finished", manifest.get("finished_at")],
        *([f"input {name}", f"`sha256 {entry['sha256'][:16]}`"] for name, entry in manifest["inputs"].items()),
    ]
    parts += ["## How it was made", "", "Runs again with `python -m experiments.report --remake=FOLDER`.", ""]
    parts += _table(["", ""], made)
    return "\n".join(parts).rstrip() + "\n"


def _corpus(folder: Path, config: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    report = _read(folder / "report.json")
    what = config.get("corpus") or config.get("dialogues") or {}
    rows = [
        ["documents read", result["documents_in"]],
        ["documents kept", result["kept"]],
        ["tokens", result["tokens"]],
        *([f"rows, {split}", count] for split, count in result["rows"].items()),
        *([f"dropped: {reason}", count] for reason, count in result["dropped_by_reason"].items()),
        *([f"could not be read: {reason}", count] for reason, count in result.get("failed_by_reason", {}).items()),
        *([f"personal data masked: {kind}", count] for kind, count in sorted(report.get("personal_data_masked", {}).items())),
        ["overlaps with a test set left", result["contamination_left"]],
    ]
    named = ", ".join(map(str, what.get("domains", what.get("files", ()))))
    tests = (config.get("contamination") or {}).get("test_sets")
    held = f"Held against the test sets {', '.join(tests)}." if tests else "**Not held against any test set.**"
    return [
        f"# Corpus of {named}", "", "Texts as packed tokens for training, by filter profiles in the domain's folder.", "",
        *_table(["", "number"], [[name, f"{count:,}"] for name, count in rows]), held,
        "Not for publication as texts: packed rows and `documents/` hold their sources' words.", "",
    ]  # fmt: skip


def _conversations(folder: Path, config: Mapping[str, Any], manifest: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    classes = [[name, f"{count:,}"] for name, count in result["accepted_by_class"].items()]
    reasons = [[name.replace("_", " "), f"{count:,}"] for name, count in result["rejected_by_reason"].items()]
    probed, kappa = result.get("probes", {}), result.get("kappa")

    def figure(value: Any) -> str:
        return "not measured" if value is None else f"{value:.3f}"

    looked = [
        ["overlap of accepted ones with a test set", result["contamination"]],
        ["agreement of a blind second reader (Cohen's kappa)", figure(kappa)],
        ["violating twin told by length alone", figure(probed.get("length"))],
        ["violating twin told by n-grams beside the deciding turns (AUC)", figure(probed.get("ngram_auc"))],
    ]
    splits = ", ".join(f"{count:,} {split}" for split, count in result["samples"].items())
    return [
        f"# Synthetic conversations for {config['task']}", "",
        f"{result['accepted']:,} of {result['planned']:,} planned ({splits}); {result.get('statement', '')}. Nobody said these "
        "words: a teacher wrote them to a plan, so that the label is known by construction.", "",
        *_table(["class", "accepted"], classes), *_table(["rejected because of", "number"], reasons or [["nothing", 0]]),
        *_table(["looked at", "found"], looked), *(f"> **Warning:** {warning}.\n" for warning in probed.get("warnings", ())),
        "Not for estimating how often violations occur: the shares of the classes were planned. Not for judging persons.", "",
    ]  # fmt: skip


def main(folder: str | None, out: str | None) -> dict[str, Any]:
    """Write a data card; returns where it is."""
    if not folder or not out:
        raise ValueError("--data and --out are needed; --help shows an example")
    run.write_text(out, data(folder))
    return {"card": out, "of": folder}


def _step(number: int, step: Mapping[str, Any]) -> str:
    facts = {k: v for k, v in step.items() if k not in ("kind", "data") and v is not None}
    said = ", ".join(f"{k.replace('_', ' ')} {_number(v)}" for k, v in facts.items())
    data = "".join(f"\n   - {name} (`sha256 {sha[:16]}`)" for name, sha in step.get("data", {}).items())
    return f"{number}. **{step['kind']}**: {said}{data}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [["" if c is None else str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in rows]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in cells), ""]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _interval(ci95: Any) -> str:
    return f"{ci95[0]:.3f} to {ci95[1]:.3f}" if ci95 else ""


if __name__ == "__main__":
    from absl import flags

    from experiments import door

    source = flags.DEFINE_string("data", None, "finished folder of experiments.prepare or experiments.synthesize")
    target = flags.DEFINE_string("out", None, "Markdown file to write")
    door.tool(lambda: main(source.value, target.value), __doc__)
