"""AdamW with the schedules and masks of continued pre-training, as one optax chain."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Numbers of the optimiser; steps are optimiser steps."""

    learning_rate: float  # peak
    final_learning_rate: float
    schedule: str  # "cosine": decays over all steps; "wsd": stays at the peak, decays linearly over the last decay_steps
    warmup_steps: int
    decay_steps: int  # "wsd" alone
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # not applied to norms
    clip_norm: float  # of the global gradient, in float32, after accumulation
    mu_dtype: str | None  # dtype of the first moment; None: that of the parameters
    frozen: tuple[str, ...]  # top-level parameter names that stay as they are, e.g. ("embed",)


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate at optimiser step 0..steps-1: linear warm-up, then the schedule down to the final rate."""
    if config.warmup_steps >= steps:
        raise ValueError(f"optim.warmup_steps={config.warmup_steps} leaves nothing of {steps} steps; lower it")
    c = config
    if c.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, c.learning_rate, c.warmup_steps, steps, c.final_learning_rate)
    if c.schedule == "wsd":
        start = steps - c.decay_steps
        if not c.warmup_steps <= start <= steps:
            raise ValueError(f"optim.decay_steps={c.decay_steps} and warmup_steps={c.warmup_steps} do not fit in {steps} steps")
        parts = [
            optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps),
            optax.constant_schedule(c.learning_rate),
            optax.linear_schedule(c.learning_rate, c.final_learning_rate, c.decay_steps),
        ]
        return optax.join_schedules(parts, [c.warmup_steps, start])
    raise ValueError(f"unknown optim.schedule {c.schedule!r}; known: cosine, wsd")


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: every matrix, no norm."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not str(path[-1].key).endswith("norm"), params)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, learning rate; frozen parameters get no update."""
    mu_dtype = None if config.mu_dtype is None else jnp.dtype(config.mu_dtype)
    chain = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=mu_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    ]
    if config.frozen:
        frozen = set(config.frozen)

        def mask(params: Any) -> Any:
            if unknown := frozen - set(params):
                raise ValueError(f"optim.frozen names unknown parameters {sorted(unknown)}; known: {sorted(params)}")
            return {name: jax.tree.map(lambda _, name=name: name in frozen, tree) for name, tree in params.items()}

        chain.append(optax.masked(optax.set_to_zero(), mask))
    return optax.chain(*chain)
