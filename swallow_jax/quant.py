"""Weights laid out for decoding: joined, in XLA:CPU's best orientation, or as int8 with one scale an output channel.

Letters: O outputs, I inputs of a matrix; X rows of activations.

A `Matrix` stands in the place of an array in the decode form of the parameters and brings its own product, as a LoRA
adapter does. int8 is weight-only: w = values * scale with scale = max|w| / 127 over a channel's inputs, activations stay in
the compute dtype, and the scale is applied to the product, so that a converted matrix need never exist.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# XLA:CPU chooses a kernel, and with it the order of its sums, by the number of rows; from 2 to 16 it is one kernel.
_ROWS = 16
_BLOCK_BYTES = 1 << 19  # a block of int8 rows, converted to float32, stays in a core's second-level cache


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["parts", "cpu"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight [O, I], or several with the same input joined along O."""

    values: jax.Array  # [O, I], floating or int8
    scale: jax.Array | None  # float32 [O] of int8 values
    parts: tuple[int, ...]  # rows of what was joined
    cpu: bool  # how the product is written: see __call__

    def __call__(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """x [..., I] times the transpose: [..., O] in `dtype`, or in that of x.

        On a CPU a row has the same bits in any company of two or more, where x is rows of one position ([B, 1, I] or [B, I]).
        """
        dtype = x.dtype if dtype is None else dtype
        x_XI = x.reshape(-1, x.shape[-1])
        if not self.cpu:
            out_XO = self._product(self.values, x_XI)
        elif len(x_XI) <= _ROWS or (x.ndim > 2 and x.shape[-2] > 1):
            out_XO = self._on_cpu(x_XI)
        else:
            groups = jnp.split(jnp.pad(x_XI, ((0, -len(x_XI) % _ROWS), (0, 0))), -(-len(x_XI) // _ROWS))
            out_XO = jnp.concatenate([self._on_cpu(group) for group in groups])[: len(x_XI)]
        if self.scale is not None:
            out_XO = out_XO * self.scale
        return out_XO.astype(dtype).reshape(*x.shape[:-1], -1)

    def split_product(self, x: jax.Array) -> list[jax.Array]:
        """The products with each of the joined weights."""
        return jnp.split(self(x), np.cumsum(self.parts)[:-1].tolist(), axis=-1)

    def __getitem__(self, _: Any) -> "Matrix":  # a Block reads its weights as `weight[...]`
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def _product(self, values_OI: jax.Array, x_XI: jax.Array) -> jax.Array:
        return jnp.einsum("XI,OI->XO", x_XI, values_OI.astype(x_XI.dtype), preferred_element_type=jnp.float32)

    def _on_cpu(self, x_XI: jax.Array) -> jax.Array:
        """The weights as the left operand, which XLA:CPU reads where it stands; as the right one it is packed anew in each
        step (0.6 against 0.9 ms for 2816 x 512 float32 and 2 rows, 1.0 against 1.5 for 16). Without the barrier the
        simplifier turns the product round.
        """
        x_XI = x_XI.astype(jnp.float32)

        def product(values_OI: jax.Array) -> jax.Array:
            return jax.lax.optimization_barrier(jnp.einsum("OI,XI->OX", values_OI.astype(jnp.float32), x_XI))

        O, I = self.values.shape  # noqa: E741
        blocks = 1 if self.scale is None else _divisor(O, O * I * 4 // _BLOCK_BYTES)
        if blocks == 1:
            return product(self.values).T
        return jax.lax.map(product, self.values.reshape(blocks, O // blocks, I)).reshape(O, -1).T


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Joined:
    """Holds the place of a weight that was joined into another."""

    def __getitem__(self, _: Any) -> "Joined":
        return self


def matrix(weights: Sequence[jax.Array], *, dtype: Any, int8: bool, cpu: bool) -> Matrix:
    """Weights [O, I] with one input, joined, in `dtype` or as int8."""
    parts = tuple(weight.shape[0] for weight in weights)
    if not int8:
        values = weights[0] if len(weights) == 1 else jnp.concatenate(weights)
        return Matrix(values=values.astype(dtype), scale=None, parts=parts, cpu=cpu)
    quantised = [quantise(weight) for weight in weights]
    values, scale = (jnp.concatenate(pieces) for pieces in zip(*quantised, strict=True))
    return Matrix(values=values, scale=scale, parts=parts, cpu=cpu)


@jax.jit
def quantise(weight_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 values [O, I], float32 scale [O]); a channel of zeros gets scale 1."""
    weight_OI = weight_OI.astype(jnp.float32)
    largest_O = jnp.max(jnp.abs(weight_OI), axis=-1)
    scale_O = jnp.where(largest_O > 0, largest_O / 127, 1.0)
    return jnp.round(weight_OI / scale_O[:, None]).astype(jnp.int8), scale_O


def _divisor(n: int, wanted: int) -> int:
    """The least divisor of n that is `wanted` or more (1 where one block is enough)."""
    return next(d for d in range(max(1, wanted), n + 1) if n % d == 0)
