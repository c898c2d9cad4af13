"""Training: the loss, the jitted step, and the one fit loop that CPT and SFT share.

The loss is a sum over weighted targets divided once by the global weight, over micro-batches, devices and hosts: packing,
accumulation and meshes do not change what is minimised. Batches arrive from an iterator as dicts of [batch, T] arrays:
`tokens`, `segments` (0 = padding), `positions` (inside the document) and `weights` (of a token as a target).
"""

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from swallow_jax import hf, llama, lora
from swallow_jax import mesh as meshes
from swallow_jax.checkpoint import Checkpoints
from swallow_jax.llama import Compute, LlamaConfig, Params
from swallow_jax.lora import LoraConfig
from swallow_jax.loss import chunked_cross_entropy
from swallow_jax.run import Metrics, Run

State = dict[str, Any]  # {"params", "opt_state", "step"}; params are those that are trained
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of a run and how a batch is computed."""

    steps: int
    micro_batches: int  # gradient accumulation: the batch is split into this many parts
    loss_chunk: int  # a device's tokens whose logits exist at once (loss.py); 0: all of them
    targets_per_row: int  # most targets a row can have (SFT counts them while packing); 0: any position may be one
    eval_every: int  # steps between held-out losses
    log_every: int  # steps between progress lines


def loss_sums(
    params: Params, config: LlamaConfig, compute: Compute, train: TrainConfig, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted next-token cross-entropies in nats, sum of weights), both float32 scalars.

    The last token of a document predicts nothing: a target counts only when it lies in its query's segment.
    """
    hidden_BTD, _ = llama.forward(params, config, compute, batch["tokens"], batch["positions"], segments_BT=batch["segments"])
    tokens, segments = batch["tokens"], batch["segments"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weights_BT = jnp.where(same, batch["weights"][:, 1:].astype(jnp.float32), 0.0)
    # The last column has no target; it stays, with weight 0, so that shapes keep their powers of two.
    weights_BT = jnp.pad(weights_BT, ((0, 0), (0, 1)))
    targets_BT = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    columns = (hidden_BTD, targets_BT, weights_BT)
    if train.targets_per_row:
        # Only positions with a target need the head: in SFT a few per cent of them.
        _, index = jax.lax.top_k((weights_BT > 0).astype(jnp.int32), train.targets_per_row)
        columns = jax.tree.map(lambda x: jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), 1), columns)

    if train.loss_chunk:
        head_VD = params["embed"] if config.tie_word_embeddings else params["lm_head"]
        return chunked_cross_entropy(columns[0], head_VD, *columns[1:], train.loss_chunk, 0.0)[0], jnp.sum(weights_BT)
    hidden_BTD, targets_BT, weights = columns
    scores_BTV = llama.logits(params, config, hidden_BTD)
    losses = jax.nn.logsumexp(scores_BTV, axis=-1) - jnp.take_along_axis(scores_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * weights), jnp.sum(weights_BT)


def whole(params: Params, frozen: Params | None, adapter: LoraConfig | None) -> Params:
    """The model's parameters: those that are trained, or the frozen ones with the trained adapter beside them."""
    return params if adapter is None else lora.attach(frozen, params, adapter)


def train_step(
    state: State,
    batch: Batch,
    frozen: Params | None = None,
    *,
    config: LlamaConfig,
    compute: Compute,
    train: TrainConfig,
    optimizer: Any,
    adapter: LoraConfig | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """One optimiser step; metrics `loss` (nats a target), `grad_norm`, `update_norm`, `targets`, `tokens`."""

    def loss(params: Params, part: Batch) -> tuple[jax.Array, jax.Array]:
        return loss_sums(whole(params, frozen, adapter), config, compute, train, part)

    objective = jax.value_and_grad(loss, has_aux=True)
    params = state["params"]
    if train.micro_batches == 1:
        (loss, weight), grads = objective(params, batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    else:
        # Interleaved rows, so that each part stays spread over all data shards.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, train.micro_batches, *x.shape[1:]), 0, 1), batch)

        def accumulate(carry, part):
            (loss, weight), grads = objective(params, part)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), carry, (loss, weight, grads)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        (loss, weight, grads), _ = jax.lax.scan(accumulate, (jnp.zeros(()), jnp.zeros(()), zeros), parts)
    weight = jnp.maximum(weight, 1e-9)  # a batch without targets has no gradient instead of a NaN
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state = optimizer.update(grads, state["opt_state"], params)
    metrics = {
        "loss": loss / weight,
        "grad_norm": optax.global_norm(grads),
        "update_norm": optax.global_norm(updates),
        "targets": weight,
        "tokens": jnp.sum(batch["segments"] > 0),
    }
    new = {"params": optax.apply_updates(params, updates), "opt_state": opt_state, "step": state["step"] + 1}
    return new, metrics


def init_state(params: Params, optimizer: Any) -> State:
    """The state before the first step."""
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def state_placements(abstract: State, params: Params, optimizer: Any, mesh: Mesh) -> State:
    """The sharding of each leaf of a state: moments lie where their parameters lie, counters everywhere.

    Left to the compiler they start replicated and move at the first step: more memory, two compilations, and a resumed
    run whose first step is another program than the straight run's.
    """
    places, everywhere = jax.tree.map(lambda p: p.sharding, params), meshes.sharding(mesh, ())
    moments = optax.tree_utils.tree_map_params(
        optimizer, lambda _, place: place, abstract["opt_state"], places, transform_non_params=lambda _: everywhere
    )
    return {"params": places, "opt_state": moments, "step": everywhere}


def fit(
    params: Params,
    config: LlamaConfig,
    *,
    compute: Compute,
    train: TrainConfig,
    optimizer: Any,
    mesh: Mesh,
    open_batches: Callable[[int], Iterator[Batch]],
    heldout: Iterable[Batch],
    data: dict[str, Any],
    checkpoints: Checkpoints,
    run: Run,
    frozen: Params | None = None,
    adapter: LoraConfig | None = None,
) -> dict[str, Any]:
    """Train to `train.steps`, from the run's own last checkpoint if it has one. Returns the result for the last line.

    With `adapter`, `params` are an adapter's (lora.init) and `frozen` the model's, which no checkpoint holds.
    `open_batches(step)` starts the stream at that step; `data` names the mixture and is compared on resume. Raises
    ValueError when a loss is not finite (naming the steps) or the data is not what the checkpoint was made with.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.callback(checkpoints.close)  # also when a step fails: the save under way must end
        axes = llama.abstract_params(config, jnp.float32)[1] if adapter is None else lora.axes(config, adapter)
        params = jax.tree.map(lambda leaf, names: jax.device_put(leaf, meshes.sharding(mesh, names)), params, axes)
        start = functools.partial(init_state, optimizer=optimizer)
        places = state_placements(jax.eval_shape(start, params), params, optimizer, mesh)
        state = jax.jit(start, out_shardings=places)(params)
        first = 0
        if (step := checkpoints.latest_step()) is not None:
            state, position = checkpoints.restore(step, jax.tree.map(_abstract, state))
            if position["data"] != data:
                raise ValueError(
                    f"{run.folder} was saved with other data ({position['data']}), now it is {data}; use the same mixture"
                    " or a new --workdir"
                )
            first = position["step"]
        run.note(steps=train.steps)  # with it a checkpoint tells whether it is the last one
        step_fn = jax.jit(
            functools.partial(train_step, config=config, compute=compute, train=train, optimizer=optimizer, adapter=adapter),
            donate_argnums=0,
            out_shardings=(places, None),
        )
        loss = jax.jit(lambda params, batch, frozen: loss_sums(whole(params, frozen, adapter), config, compute, train, batch))
        eval_fn = functools.partial(loss, frozen=frozen)
        metrics = stack.enter_context(contextlib.closing(Metrics(run.folder / "metrics.jsonl", from_step=first)))
        progress = _Progress(first, train.steps, train.log_every)
        peak = meshes.peak_flops(compute.dtype)
        stop = _StopSignal()
        stack.callback(stop.restore)
        place = meshes.sharding(mesh, ("batch", "seq"))
        batches = open_batches(first)
        last = metrics.last  # of a run that was killed after its last step, before its result was written
        started, waited, trained = time.perf_counter(), 0.0, 0
        for step in range(first + 1, train.steps + 1):
            began = time.perf_counter()
            batch = {k: jax.make_array_from_process_local_data(place, v) for k, v in next(batches).items()}
            arrived = time.perf_counter()
            state, out = step_fn(state, batch, frozen)
            values = {name: float(value) for name, value in jax.device_get(out).items()}
            seconds = time.perf_counter() - began
            if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                raise ValueError(
                    f"the loss is not finite at step {step} (loss {values['loss']}, gradient norm {values['grad_norm']});"
                    f" the last good checkpoint is step {checkpoints.latest_step()}; lower optim.learning_rate"
                    " or look at the rows of that step"
                )
            waited, trained = waited + arrived - began, trained + int(values["tokens"])
            tokens_per_s = values["tokens"] / seconds
            flops = llama.train_flops_per_token(config, batch["tokens"].shape[1], frozen=adapter is not None)
            values |= {"tokens_per_s": tokens_per_s, "mfu": tokens_per_s * flops / peak, "data_wait_s": arrived - began}
            due = step % train.eval_every == 0 or step == train.steps or stop.asked
            if due:
                values["heldout_loss"] = heldout_loss(eval_fn, state["params"], heldout, place)
                if not math.isfinite(values["heldout_loss"]):  # this step's update: such parameters must not be saved
                    raise ValueError(
                        f"the held-out loss is not finite after step {step}; the last good checkpoint is step"
                        f" {checkpoints.latest_step()}; lower optim.learning_rate"
                    )
            metrics.write(step, **values)
            progress.show(step, values)
            if due and (step % checkpoints.save_every == 0 or step == train.steps or stop.asked):
                checkpoints.save(step, state, {"step": step, "data": data}, values["heldout_loss"])
            last = values
            if stop.asked and step < train.steps:
                checkpoints.close()
                print(f"asked to stop: saved step {step} of {train.steps}; the same command goes on from there", flush=True)
                sys.exit(0)
        checkpoints.close()
        trained_sha256 = lora.adapter_sha256(state["params"]) if adapter else hf.params_sha256(state["params"], config)
        return {
            "steps": train.steps,
            "loss": last.get("loss"),
            "heldout_loss": last.get("heldout_loss"),
            "tokens_per_s": round(trained / max(time.perf_counter() - started, 1e-9), 1),
            "tokens": trained,
            "data_wait_s": round(waited, 2),
            "params_sha256": trained_sha256,
        }


def heldout_loss(eval_fn: Callable, params: Params, batches: Iterable[Batch], place: Any) -> float:
    """Mean cross-entropy in nats a target over a fixed set of batches."""
    total = weight = 0.0
    for batch in batches:
        loss, count = eval_fn(params, {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()})
        total, weight = total + float(loss), weight + float(count)
    if not weight:
        raise ValueError("the held-out data has no targets; check the held-out folder")
    return total / weight


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


class _StopSignal:
    """SIGTERM asks for a checkpoint after the current step and a clean exit."""

    def __init__(self):
        self.asked = False
        self._before = signal.signal(signal.SIGTERM, self._ask)

    def restore(self) -> None:
        """Give the signal back: what comes after the loop (the next stage of a pipeline) must end on it."""
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: Any) -> None:
        self.asked = True


class _Progress:
    """A line with step, loss, speed and ETA: rewritten on a terminal, every `log_every` steps elsewhere."""

    def __init__(self, first: int, total: int, every: int):
        self.first, self.total, self.every, self.began = first, total, every, time.perf_counter()

    def show(self, step: int, values: dict[str, float]) -> None:
        terminal = sys.stderr.isatty()
        if not terminal and step % self.every and step != self.total:
            return
        left = (time.perf_counter() - self.began) / max(step - self.first, 1) * (self.total - step)
        heldout = f"  held-out {values['heldout_loss']:.4f}" if "heldout_loss" in values else ""
        line = (
            f"step {step}/{self.total}  loss {values['loss']:.4f}{heldout}  grad {values['grad_norm']:.2f}"
            f"  {values['tokens_per_s']:,.0f} tokens/s  MFU {values['mfu']:.0%}  ETA {int(left // 60)}:{int(left % 60):02d}"
        )
        end = "\n" if not terminal or step == self.total or heldout else "\r"
        print(f"\033[K{line}" if terminal else line, end=end, file=sys.stderr, flush=True)
