"""Tensors onto devices: each host reads the bytes that its devices own, straight into the memory they will keep."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from swallow_jax import weights
from swallow_jax.weights import Tensor

_THREADS = 4


def place(tensors: Mapping[str, Tensor], dtype: np.dtype, sharding: Any, *, stacked: bool, check: bool, bar: Any) -> jax.Array:
    """One parameter on its devices: a tensor, or those of all layers stacked. Each host reads the part that it owns.

    On a CPU device the array is the memory that the files were read into. On others at most a block waits on the host.
    """
    one = next(iter(tensors.values())).shape
    shape = (len(tensors), *one) if stacked else one
    shards, pieces = {}, []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if spans not in shards or device.platform != "cpu":
            local = _Shard(list(tensors.items()), dtype, spans, check, bar, stacked)
            shards[spans] = local.on_host() if device.platform == "cpu" else local.on_device(device)
        pieces.append(jax.device_put(shards[spans], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


class _Shard:
    """A device's part of one parameter: [first, last) of each axis."""

    def __init__(self, tensors, dtype, spans, check, bar, stacked):
        self.dtype, self.check, self.bar, self.stacked = dtype, check, bar, stacked
        self.shape = tuple(last - first for first, last in spans)
        layers, rest = (spans[0], spans[1:]) if stacked else ((0, 1), spans)
        self.rows, self.columns = rest[0], tuple(slice(*span) for span in rest[1:])
        self.tensors = tensors[slice(*layers)]
        self.width = tuple(last - first for first, last in rest[1:])

    def jobs(self) -> Iterator[tuple[int, int, int]]:
        """(layer, first row, last row) of each block, counted within this shard."""
        lead = Tensor(shape=(self.rows[1] - self.rows[0], *self.width), dtype=self.dtype, rows=None)  # type: ignore[arg-type]
        return ((layer, a, b) for layer, (a, b) in itertools.product(range(len(self.tensors)), lead.blocks()))

    def read(self, out: np.ndarray, layer: int, first: int, last: int) -> None:
        """Fill `out` with a block."""
        name, tensor = self.tensors[layer]
        a, b = self.rows[0] + first, self.rows[0] + last
        if tensor.dtype == self.dtype and self.width == tensor.shape[1:]:
            tensor.read(a, b, out)
        else:
            weights.convert(tensor.rows(a, b)[:, *self.columns] if self.columns else tensor.rows(a, b), out, name)
        if self.check:
            weights.check_finite(out, name)
        self.bar.update(out.nbytes)

    def on_host(self) -> np.ndarray:
        out = _aligned(self.shape, self.dtype)
        views = out if self.stacked else out[None]
        blocks = [(views[layer, a:b], layer, a, b) for layer, a, b in self.jobs()]
        if len(blocks) == 1 or out.nbytes < weights.BLOCK_BYTES:
            for block in blocks:
                self.read(*block)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                weights.wait_all([pool.submit(self.read, *block) for block in blocks])
        return out

    def on_device(self, device: Any) -> jax.Array:
        """Block by block into an array that lies on the device already; a few blocks wait on the host."""

        def read(layer: int, a: int, b: int) -> tuple[np.ndarray, tuple[int, ...]]:
            block = _aligned((b - a, *self.width), self.dtype)
            self.read(block, layer, a, b)
            return (block[None], (layer, a)) if self.stacked else (block, (a,))

        placement = jax.sharding.SingleDeviceSharding(device)
        whole = jax.jit(lambda: jax.numpy.zeros(self.shape, self.dtype), out_shardings=placement)()
        put = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)
        size = self.dtype.itemsize * math.prod(self.width)
        for block, where in weights.ahead(((b - a) * size, functools.partial(read, layer, a, b)) for layer, a, b in self.jobs()):
            # Waiting for the copy keeps the host's blocks few.
            whole = put(whole, jax.device_put(block, device), where + (0,) * len(self.width)).block_until_ready()
        return whole


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory on a 64-byte boundary: what JAX takes on the CPU without copying."""
    size = dtype.itemsize * math.prod(shape)
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)
