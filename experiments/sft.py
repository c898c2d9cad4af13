"""Supervised fine-tuning on chat samples: loss on the assistant's tokens, samples packed and isolated.

    python -m experiments.sft --config=configs/sft/tiny.py --workdir=runs/sft/tiny

Reads an HF folder, GGUF file or run (`init`) and JSONL chat samples {"id", "messages"}; packs them into the run folder
and trains like experiments.cpt. `data.replay` mixes packed text shards in (joint CPT + SFT); with a `lora` section an adapter is
trained (configs/sft/lora_tiny.py).
"""

import functools
import math
from pathlib import Path
from typing import Any

from experiments import cpt, door
from swallow_jax import checkpoint, hosts, run, text, train
from swallow_jax.data import packing, shards


def main(config: Any, workdir: Path) -> dict[str, Any]:
    """Pack the samples, then train for `config.epochs`; returns the same result as CPT, and the number of samples."""
    for name in ("batch_size", "samples_weight", "row_length"):
        if config.data[name] < 1:
            raise ValueError(f"data.{name}={config.data[name]}: at least 1 is wanted")
    inputs = {"samples": config.data.samples, "heldout_samples": config.data.heldout_samples}
    replay = [(str(folder), int(weight)) for folder, weight in config.data.replay]
    shard_files = {f"shards:{folder}": Path(folder) / "index.json" for folder, _ in replay}
    cpt.check_inputs(inputs, made_by="experiments.synthesize")
    cpt.check_inputs(shard_files, made_by="experiments.prepare")
    cpt.check_init(config)
    inputs |= shard_files
    hosts.start(config.get("hosts"))
    checkpoint.pull(workdir, config.checkpoint.get("bucket", ""))
    job = hosts.open_run(workdir, config.to_dict(), inputs=inputs, parents=[config.init], free=cpt.WHERE)
    if job.finished:
        hosts.say(f"{workdir} is finished; nothing to do")
        return job.result
    tokenizer = text.load_tokenizer(checkpoint.model_folder(config.init))
    for name in ("samples", "heldout_samples"):
        folder = job.folder / "data" / name
        arguments = (Path(config.data[name]), folder, tokenizer, config.data.row_length, config.data.train_on)
        hosts.one_after_all(functools.partial(pack, *arguments), (folder / "index.json").is_file)
    packed = job.folder / "data" / "samples"
    index = shards.read_index(packed)
    # Epochs are counted over the samples; replay rows come on top, in the ratio of the weights.
    mixture = [(str(packed), int(config.data.samples_weight)), *replay]
    share = mixture[0][1] / sum(weight for _, weight in mixture)
    steps = math.ceil(config.epochs * index["rows"] / share / config.data.batch_size)
    heldout = job.folder / "data" / "heldout_samples"
    targets = 0 if replay else max(most_targets(packed), most_targets(heldout))
    if chunk := config.train.loss_chunk:  # whole chunks
        targets = min(config.data.row_length, math.ceil(targets / chunk) * chunk)
    job.note(samples=index["sources"])
    settings = {**config.train.to_dict(), "steps": steps, "targets_per_row": targets}
    return cpt.train_model(config, job, mixture, str(heldout), run.build(train.TrainConfig, settings, "train"))


def most_targets(folder: Path) -> int:
    """The largest number of targets in a row of these shards."""
    rows = shards.open_shards(folder)
    return max(int((rows[i].weights > 0).sum()) for i in range(len(rows)))


def pack(samples: Path, folder: Path, tokenizer: text.Tokenizer, row_length: int, train_on: str) -> None:
    """Tokenise and pack chat samples into shards; a sample longer than a row is an error that names it."""
    tokenised = []
    for number, row in run.numbered_jsonl(samples):
        messages = row.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{samples}:{number}: no `messages`; a chat sample is {{'id', 'messages': [{{'role', 'content'}}]}}")
        try:
            tokenised.append(tokenizer.chat_sample(messages, train_on=train_on))
        except ValueError as error:
            raise ValueError(f"{samples}:{number}: {error}") from None
        if (length := len(tokenised[-1][0])) > row_length:
            raise ValueError(f"{samples}:{number}: {length} tokens do not fit data.row_length={row_length}; raise it or shorten")
    if not tokenised:
        raise ValueError(f"{samples} is empty; run experiments.synthesize first")
    rows, _ = packing.pack_samples(tokenised, row_length=row_length, pad_id=tokenizer.pad_id, too_long="error")
    writer = shards.ShardWriter(
        folder,
        row_length=row_length,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        rows_per_shard=65536,
    )
    with writer:
        writer.write(rows)
        writer.add_source(samples.name, documents=len(tokenised), tokens=sum(len(ids) for ids, _ in tokenised))


if __name__ == "__main__":
    door.launch(main, __doc__)
