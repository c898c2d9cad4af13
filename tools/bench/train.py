"""How fast the training step is, beside transformers on PyTorch: same weights, same batches, same AdamW, losses compared.

    python -m tools.bench train --case=cpu-32m --peer=transformers
    python -m tools.bench train --case=h200-full --remat=full,dots --attention=xla,cudnn

A step is forward, backward, clipping and AdamW on `batch` rows of `length` random tokens; ours is the step that `train.fit` runs,
with document masks, theirs SDPA with the causal flag and the fused AdamW. On a CPU the two take turns in one process: `ratio` is
from medians of wall seconds, `ratio_cpu` from CPU seconds (on a machine in use PyTorch's threads spin while they wait, so that
it flatters us), and a loss that differs from theirs by more than 1e-4 of it ends the run with an error. On a GPU each side has
the device to itself, one after the other.

Cases: cpu-32m (D 512, F 1408, N 8, K 4, H 64, L 8, V 8192, untied, 8 x 512, float32), tiny (for tests), and, of the list for one
Hopper GPU, pending until a run on one: h200-correct (isolation to the bit, bf16 against float32, accumulation against the large
batch), h200-full (8B, 8,192 tokens, full fine-tuning; with --peer=transformers the same in PyTorch), h200-lora (8B, 4,096 tokens,
adapters on all matrices).
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shape (vocabulary, D, F, L, N, K, H), size of a step, and how it is computed unless flags say otherwise."""

    shape: tuple[int, ...]
    rows: int
    length: int
    dtype: str
    remat: str
    attention: str
    scan: bool
    loss_chunk: int
    mu_dtype: str | None
    rank: int = 0  # of adapters; 0: full fine-tuning


_8B = (128256, 4096, 14336, 32, 32, 8, 128)
CASES = {
    "cpu-32m": Case(
        shape=(8192, 512, 1408, 8, 8, 4, 64), rows=8, length=512, dtype="float32", remat="none", attention="rows", scan=False,
        loss_chunk=512, mu_dtype=None,
    ),
    "tiny": Case(
        shape=(256, 64, 128, 2, 4, 2, 16), rows=4, length=32, dtype="float32", remat="none", attention="rows", scan=False,
        loss_chunk=32, mu_dtype=None,
    ),
    "h200-correct": Case(
        shape=(*_8B[:3], 2, *_8B[4:]), rows=4, length=2048, dtype="bfloat16", remat="none", attention="xla", scan=True,
        loss_chunk=2048, mu_dtype=None,
    ),
    "h200-full": Case(
        shape=_8B, rows=1, length=8192, dtype="bfloat16", remat="full", attention="cudnn", scan=True, loss_chunk=4096,
        mu_dtype="bfloat16",
    ),
    "h200-lora": Case(
        shape=_8B, rows=2, length=4096, dtype="bfloat16", remat="full", attention="cudnn", scan=True, loss_chunk=4096,
        mu_dtype=None, rank=16,
    ),
}  # fmt: skip
_RATE, _BETAS, _EPS, _DECAY, _CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
_LOSS_GAP = 1e-4  # of the loss: float32 sums in other orders, and a handful of updates between them


def main(argv: list[str]) -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), default="cpu-32m")
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    for name in ("remat", "attention"):
        parser.add_argument(f"--{name}", default="", help="one or several, with commas; default: the case's")
    parser.add_argument("--rows", default="", help="rows a step, one or several")
    parser.add_argument("--side", choices=["both", "transformers"], default="both", help="transformers: the peer alone")
    args = parser.parse_args(argv)
    case = CASES[args.case]
    if args.side == "transformers":
        print(json.dumps(transformers_alone(case, args.rounds)))
        return 0
    import jax

    result: dict[str, Any] = {"case": args.case, "rows": case.rows, "length": case.length, "rounds": args.rounds}
    result |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0))}
    if args.case == "h200-correct":
        result |= correct(case, args.attention.split(",") if args.attention else ["xla", "cudnn"])
    elif args.case.startswith("h200"):
        result |= sweep(case, args)
    else:
        flags = {name: getattr(args, name) for name in ("remat", "attention") if getattr(args, name)}
        result |= turns(dataclasses.replace(case, **flags), args)
    print(json.dumps(result))
    return int("error" in result)


# Our side.


def model(case: Case) -> Any:
    """The config of a case's shape, Llama 3's constants without RoPE scaling."""
    from swallow_jax import llama

    V, D, F, L, N, K, H = case.shape
    return llama.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=L, num_heads=N, num_kv_heads=K, head_dim=H,
        rope_theta=500000.0, rope_scaling=None, rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip


def settings(case: Case, steps: int, micro_batches: int = 1) -> tuple[Any, Any, Any, Any]:
    """(compute, train, optimizer, adapter) of a case, as a program's config would give them."""
    from swallow_jax import llama, lora, optim, train

    compute = llama.Compute(dtype=case.dtype, remat=case.remat, scan_layers=case.scan, attention=case.attention)
    training = train.TrainConfig(
        steps=steps, micro_batches=micro_batches, loss_chunk=case.loss_chunk, targets_per_row=0, z_loss=0.0,
        grad_dtype="float32", eval_every=steps, log_every=steps, per_source=False, spike_ratio=0.0, profile=(), tensorboard=False,
    )  # fmt: skip
    optimizer = optim.make_optimizer(
        optim.OptimConfig(
            learning_rate=_RATE, final_learning_rate=_RATE, schedule="cosine", warmup_steps=0, decay_steps=0, beta1=_BETAS[0],
            beta2=_BETAS[1], eps=_EPS, weight_decay=_DECAY, clip_norm=_CLIP, mu_dtype=case.mu_dtype, frozen=(),
        ),
        steps,
    )  # fmt: skip
    adapter = lora.LoraConfig(rank=case.rank, alpha=2.0 * case.rank, targets=lora.TARGETS) if case.rank else None
    return compute, training, optimizer, adapter


def tokens_of(case: Case, step: int) -> Any:
    """The random tokens [rows, length] of a step."""
    import numpy as np

    return np.random.default_rng(step).integers(0, case.shape[0], (case.rows, case.length)).astype(np.int32)


def batch_of(case: Case, tokens: Any) -> dict[str, Any]:
    """One document a row."""
    import numpy as np

    positions = np.broadcast_to(np.arange(case.length, dtype=np.int32), tokens.shape)
    ones = np.ones(tokens.shape, np.int32)
    return {"tokens": tokens, "segments": ones, "positions": positions, "weights": ones.astype(np.float32)}


class Ours:
    """State and step of a case; calling it takes one step and gives the loss. `params` are donated."""

    def __init__(self, case: Case, params: Any, steps: int):
        import jax
        import jax.numpy as jnp

        from swallow_jax import lora, mesh, train

        self.case, config = case, model(case)
        compute, training, optimizer, adapter = settings(case, steps)
        self.frozen = None
        if adapter:
            self.frozen = jax.tree.map(lambda p: p.astype(case.dtype), params)
            params = lora.init(config, adapter, jax.random.key(0))
        devices = mesh.build(mesh.MeshConfig(replica=1, fsdp=1, tensor=1, context=1), jax.devices()[:1])
        with jax.set_mesh(devices):
            self.state = train.init_state(params, optimizer)
        step = functools.partial(
            train.train_step, config=config, compute=compute, train=training, optimizer=optimizer, adapter=adapter
        )
        batch = batch_of(case, jnp.asarray(tokens_of(case, 0)))
        began = time.perf_counter()
        self.step = jax.jit(step, donate_argnums=0).lower(self.state, batch, self.frozen).compile()
        self.compile_seconds = time.perf_counter() - began

    def __call__(self, tokens: Any) -> float:
        self.state, out = self.step(self.state, batch_of(self.case, tokens), self.frozen)
        return float(out["loss"])


# A CPU: the two take turns.


def turns(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One step of each side in turn, on the same tokens from the same weights."""
    import jax
    import jax.numpy as jnp

    from swallow_jax import llama

    params = llama.init_params(model(case), jax.random.key(0), jnp.float32)
    steps = args.rounds + 1
    sides: dict[str, Callable[[Any], float]] = {}
    if args.peer == "transformers":
        sides["peer"] = transformers_peer(case, params)  # before the weights are donated
    sides["ours"] = ours = Ours(case, params, steps)
    _say(f"compiled in {ours.compile_seconds:.1f} s")
    losses: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(steps):
        tokens = tokens_of(case, step)
        for name, side in sides.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            losses[name].append(side(tokens))
            if step:  # the first warms up
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - began_cpu)
                rate = tokens.size / wall[name][-1]
                _say(f"  {name}: {rate:.1f} tok/s ({cpu[name][-1]:.2f} CPU s), loss {losses[name][-1]:.6f}")
    result: dict[str, Any] = {"attention": case.attention, "remat": case.remat, "compile_s": round(ours.compile_seconds, 1)}
    size = case.rows * case.length
    for name in sides:
        rates = sorted(size / seconds for seconds in wall[name])
        result[f"{name}_tok_s"] = round(statistics.median(rates), 1)
        result[f"{name}_spread"] = [round(rates[0], 1), round(rates[-1], 1)]
        result[f"{name}_cpu_s"] = round(statistics.median(cpu[name]), 3)
    if "peer" in sides:
        result["ratio"] = round(result["ours_tok_s"] / result["peer_tok_s"], 3)
        result["ratio_cpu"] = round(result["peer_cpu_s"] / result["ours_cpu_s"], 3)
        gap = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["peer"], strict=True))
        result["loss_gap"] = gap
        if not gap <= _LOSS_GAP:
            result["error"] = f"losses differ by {gap:.1e} of their value, at most {_LOSS_GAP:.0e} is right: {losses}"
    return result


def transformers_peer(case: Case, params: Any) -> Callable[[Any], float]:
    """The same weights in transformers, read from an export of ours; calling it takes one step and gives the loss."""
    import torch
    import transformers

    from swallow_jax import hf

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="bench_train_") as folder:
        hf.save(Path(folder) / "model", params, model(case), dtype="float32")
        peer = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    return torch_step(peer, torch.device("cpu"))


def torch_step(peer: Any, device: Any) -> Callable[[Any], float]:
    """One step of AdamW (fused; norms are not decayed) after clipping, in PyTorch."""
    import torch

    peer.train()
    matrices = [p for p in peer.parameters() if p.ndim > 1]
    norms = [p for p in peer.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": _DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=_BETAS, eps=_EPS, fused=True)

    def run(tokens: Any) -> float:
        ids = torch.from_numpy(tokens).long().to(device)
        logits = peer(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


# A GPU: one side after the other.


def sweep(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s, causal TFLOP/s, MFU, peak GiB and compile seconds of each choice of remat, attention and rows; the best first."""
    import jax
    import jax.numpy as jnp

    from swallow_jax import llama, mesh

    config, table = model(case), []
    peak = mesh.peak_flops(case.dtype) / jax.device_count()
    for remat in (args.remat or case.remat).split(","):
        for attention in (args.attention or case.attention).split(","):
            for rows in map(int, (args.rows or str(case.rows)).split(",")):
                now = dataclasses.replace(case, remat=remat, attention=attention, rows=rows)
                ours = Ours(now, llama.init_params(config, jax.random.key(0), jnp.float32), args.rounds + 1)
                losses, seconds = [ours(tokens_of(now, 0))], []
                for step in range(1, args.rounds + 1):
                    began = time.perf_counter()
                    losses.append(ours(tokens_of(now, step)))
                    seconds.append(time.perf_counter() - began)
                rate = rows * case.length / statistics.median(seconds)
                flops = rate * llama.train_flops_per_token(config, case.length, frozen=bool(case.rank))
                memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
                # Random targets: a right loss of random weights lies near ln V.
                table.append(
                    {"remat": remat, "attention": attention, "rows": rows, "tok_s": round(rate, 1), "loss": losses[-1]}
                    | {"tflop_s": round(flops / 1e12, 1), "mfu_causal": round(flops / peak, 3)}
                    | {"peak_gib_so_far": round(memory / 2**30, 1), "compile_s": round(ours.compile_seconds, 1)}
                )
                _say(json.dumps(table[-1]))
                del ours  # its state leaves the device before the next one comes
    table.sort(key=lambda row: -row["tok_s"])
    result = {"ours_tok_s": table[0]["tok_s"], "choices": table}
    if args.peer == "transformers" and not case.rank:
        # A process of its own, so that neither allocator stands in the other's way.
        command = [sys.executable, "-m", "tools.bench", "train", f"--case={args.case}", f"--rounds={args.rounds}"]
        done = subprocess.run([*command, "--side=transformers"], capture_output=True, text=True, check=False)
        if done.returncode:
            return result | {"error": f"the peer failed: {done.stderr[-500:]}"}
        result |= json.loads(done.stdout.splitlines()[-1])
        result["ratio"] = round(result["ours_tok_s"] / result["peer_tok_s"], 3)
    return result


def transformers_alone(case: Case, rounds: int) -> dict[str, Any]:
    """PyTorch's full fine-tuning of the case on a GPU: weights and moments bfloat16 (float32 ones do not fit beside their
    gradients), SDPA, gradient checkpointing, torch.compile."""
    import torch
    import transformers

    V, D, F, L, N, K, H = case.shape
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N, num_key_value_heads=K,
        head_dim=H, rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=8192, attn_implementation="sdpa",
    )  # fmt: skip
    device = torch.device("cuda")
    with device:
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    peer.gradient_checkpointing_enable({"use_reentrant": False})
    peer.compile()
    step = torch_step(peer, device)
    step(tokens_of(case, 0))
    seconds = []
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        step(tokens_of(case, number))
        seconds.append(time.perf_counter() - began)
    rate = case.rows * case.length / statistics.median(seconds)
    return {"peer_tok_s": round(rate, 1), "peer_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}


def correct(case: Case, backends: list[str]) -> dict[str, Any]:
    """Case 1: what must be exact, for every attention backend given, and what must be close."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from swallow_jax import llama, train

    config = model(case)
    params = llama.init_params(config, jax.random.key(0), jnp.float32)
    tokens, cut = tokens_of(case, 0), case.length // 3
    first = np.arange(case.length) < cut
    batch = batch_of(case, tokens)
    batch |= {"segments": np.broadcast_to(np.where(first, 1, 2).astype(np.int32), tokens.shape)}
    batch |= {"positions": np.where(first, batch["positions"], batch["positions"] - cut).astype(np.int32)}
    other = batch | {"tokens": np.where(first, (tokens + 1) % config.vocab_size, tokens).astype(np.int32)}
    result: dict[str, Any] = {}
    losses = {}
    for dtype, attention in [("float32", "xla"), *((case.dtype, backend) for backend in backends)]:
        now = dataclasses.replace(case, dtype=dtype, attention=attention)
        compute, training, _, _ = settings(now, 1)
        hidden = jax.jit(
            lambda params, batch, compute=compute: llama.forward(
                params, config, compute, batch["tokens"], batch["positions"], segments_BT=batch["segments"]
            )[0]
        )
        one, two = (np.asarray(hidden(params, b).astype(jnp.float32)) for b in (batch, other))
        loss, weight = jax.jit(lambda p, b, c=compute, t=training: train.loss_sums(p, config, c, t, b))(params, batch)
        losses[dtype, attention] = float(loss / weight)
        result[f"{attention}_{dtype}"] = {
            "isolated": bool(np.array_equal(one[:, cut:], two[:, cut:]) and not np.array_equal(one[:, :cut], two[:, :cut])),
            "loss": losses[dtype, attention],
            "gap_to_float32": abs(losses[dtype, attention] - losses["float32", "xla"]),
        }
        _say(json.dumps(result))
    # Unequal targets a row: the first keeps one in eight, the second one in seven, ...
    keep = np.arange(case.length)[None] % np.arange(8, 8 - case.rows, -1)[:, None] == 0
    uneven = batch | {"weights": keep.astype(np.float32)}
    metrics = []
    for parts in (1, 2):
        compute, training, optimizer, _ = settings(dataclasses.replace(case, dtype="float32"), 4, micro_batches=parts)
        step = functools.partial(train.train_step, config=config, compute=compute, train=training, optimizer=optimizer)
        metrics.append(jax.jit(step)(train.init_state(params, optimizer), uneven)[1])
    result["accumulation"] = {
        name: abs(float(metrics[1][name]) / float(metrics[0][name]) - 1) for name in ("loss", "grad_norm")
    }  # fmt: skip
    right = all(row["isolated"] and row["gap_to_float32"] < 1e-2 for name, row in result.items() if name != "accumulation")
    if not right or max(result["accumulation"].values()) > 1e-5:
        result["error"] = "a number that must be right is not"
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
