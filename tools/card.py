"""What a model card says: base, method, data, teachers, evaluation and the terms that come with them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
