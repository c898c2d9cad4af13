"""One command on a cluster: queued on Slurm, or the exact commands that bring it to a Cloud TPU pod or to GKE.

    python -m tools.launch --to=tpu --name=cpt8b --accelerator=v5p-16 --project=MINE --zone=us-east5-a --bucket=gs://MINE \\
        --command="python -m experiments.cpt --config=configs/cpt/llama31_swallow_8b.py:v5p-16 --workdir=runs/cpt8b"
    python -m tools.launch --to=slurm --slurm="nodes=2 gpus_per_node=8 timeout_min=720" --command="..."

--to=tpu and --to=gke print and start nothing. The bucket is mounted on every worker, and the checkout's runs/, models/ and data/
lead into it, so that checkpoints outlive the machines. Many commands at once: experiments.sweep --submit=slurm.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import door
from swallow_jax import launch

_TO = flags.DEFINE_enum("to", "slurm", ["slurm", "tpu", "gke"], "where")
_COMMAND = flags.DEFINE_string("command", "", "what would run here: 'python -m experiments.cpt --config=... --workdir=...'")
_SLURM = flags.DEFINE_string("slurm", "", "resources of the job by submitit's names")
_LOGS = flags.DEFINE_string("logs", "runs/slurm", "folder for the job's script and output, on a disk that all nodes share")
_REQUEUES = flags.DEFINE_integer("requeues", 3, "how often a Slurm job that failed is queued again")
_NAME = flags.DEFINE_string("name", "swallow-jax", "of the job, the pod or the cluster")
_PROJECT = flags.DEFINE_string("project", "", "Google Cloud project")
_ZONE = flags.DEFINE_string("zone", "", "its zone")
_ACCELERATOR = flags.DEFINE_string("accelerator", "", "v5p-16, v5litepod-16, v6e-64 ...")
_BUCKET = flags.DEFINE_string("bucket", "", "gs://NAME")
_SLICES = flags.DEFINE_integer("slices", 1, "number of pods of this accelerator (mesh axis `replica`)")
_SPOT = flags.DEFINE_bool("spot", False, "capacity that may be taken back")
_IMAGE = flags.DEFINE_string("image", "", "GKE: container image with this checkout (default: xpk makes one of this folder)")


def main() -> dict[str, Any]:
    """Submit or print; returns the job ids or the commands."""
    command = shlex.split(_COMMAND.value)
    if not command:
        raise ValueError("--command is missing; --help shows an example")
    if _TO.value == "slurm":
        folder = Path(_LOGS.value)
        words = [sys.executable if Path(command[0]).name.startswith("python") else command[0], *command[1:]]
        settings = launch.Slurm(resources=launch.read_resources(_SLURM.value), requeues=_REQUEUES.value, at_once=1)
        jobs = launch.submit([words], folder, _NAME.value, settings)
        print(f"queued as {jobs[0]}; its output comes to {folder}", flush=True)
        return {"jobs": jobs, "folder": str(folder)}
    given = {"project": _PROJECT.value, "zone": _ZONE.value, "accelerator": _ACCELERATOR.value, "bucket": _BUCKET.value}
    if empty := [f"--{name}" for name, value in given.items() if not value]:
        raise ValueError(f"--to={_TO.value} needs {', '.join(empty)}; --help shows an example")
    cloud = launch.Cloud(name=_NAME.value, slices=_SLICES.value, spot=_SPOT.value, image=_IMAGE.value, **given)
    steps = (launch.tpu_commands if _TO.value == "tpu" else launch.gke_commands)(command, cloud)
    print(launch.script(steps), flush=True)
    return {"commands": [words for _, words in steps]}


if __name__ == "__main__":
    door.tool(main, __doc__)
