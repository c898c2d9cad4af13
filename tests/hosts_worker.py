"""One process of a small training run; test_hosts.py starts several. It speaks JSON lines: `rows` of a batch, then the result.

python -m tests.hosts_worker RUN_FOLDER SHARDS STEPS [hang_s=S] [sleep_at=STEP]
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax

from swallow_jax import checkpoint, hf, hosts, mesh, optim, run, train
from swallow_jax.data import loader
from tests.helpers import FLOAT32, random_params
from tests.test_train import OPTIM, SMALL, TRAIN

BATCH = 8


def main(folder: str, shards: str, steps: int, *, sleep_at: int = 0, step_s: float = 0.0, **options: float) -> None:
    settings = hosts.start({"heartbeat_s": 5, "start_s": 60, **options})
    devices = mesh.build(mesh.MeshConfig(replica=1, fsdp=jax.device_count(), tensor=1, context=1))
    place = mesh.sharding(devices, ("batch", "seq"))
    rows = hosts.local_rows(place, BATCH)
    job = hosts.open_run(Path(folder), {"steps": steps}, inputs={}, free=())
    if hosts.first():
        run.write_json(job.folder / "model" / "config.json", hf.config_json(SMALL, "float32"))

    def stream(first: int):
        for number, batch in enumerate(loader.open_batches([(shards, 1)], batch_size=BATCH, seed=0, start_step=first, rows=rows)):
            if number == 0:
                whole = hosts.place(batch, place)
                for shard in whole["tokens"].addressable_shards:
                    told = {"row": shard.index[0].start or 0, "tokens": shard.data.tolist()}
                    print(json.dumps(told), flush=True)
            if first + number + 1 == sleep_at:
                time.sleep(3600)
            time.sleep(step_s)
            yield batch

    with hosts.peers():
        result = train.fit(
            random_params(SMALL),
            SMALL,
            compute=FLOAT32,
            train=dataclasses.replace(TRAIN, steps=steps),
            optimizer=optim.make_optimizer(OPTIM, steps),
            mesh=devices,
            open_batches=stream,
            heldout=list(loader.epoch_batches(shards, batch_size=BATCH, rows=rows)),
            data={"x": 1},
            checkpoints=checkpoint.Checkpoints(job.folder, checkpoint.CheckpointConfig(save_every=4, keep_last=2, keep_best=1)),
            run=job,
            watch=hosts.Watch(settings, job.folder / "metrics.jsonl"),
        )
        print(json.dumps(hosts.agree(lambda: job.finish(result))), flush=True)


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[4:])
    numbers = {name: float(value) if "_s" in name else int(value) for name, value in given.items()}
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), **numbers)
