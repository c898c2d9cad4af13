"""Meshes by name: how many devices lie along each axis, and what one device holds (for tools.plan).

`mesh("v5p-8chips")` gives the section `c.mesh` of a training config. Axes: replica (copies of the weights, across slices), fsdp
(weights and batch split), tensor (heads, feed-forward and vocabulary split), context (one sequence split).
"""

from ml_collections import ConfigDict

# name -> (replica, fsdp, tensor, context)
MESHES = {
    "cpu1": (1, 1, 1, 1),
    "cpu8": (2, 2, 2, 1),
    "h200x1": (1, 1, 1, 1),
    "h100x8": (1, 8, 1, 1),
    "v5e-16": (1, 16, 1, 1),  # 16 chips
    "v5e-16-sample": (1, 1, 16, 1),  # generation: weights stay, split over all chips
    "v5p-8-sample": (1, 1, 4, 1),  # Google counts TensorCores: 4 chips
    "v5p-16": (1, 8, 1, 1),  # 8 chips
    "v5p-64": (1, 32, 1, 1),
    "v5p-128": (1, 64, 1, 1),  # 64 chips
    "v6e-16": (1, 16, 1, 1),
    "v6e-64": (1, 64, 1, 1),
}


def mesh(name: str) -> ConfigDict:
    """The mesh section of a config."""
    if name not in MESHES:
        raise ValueError(f"unknown mesh {name!r}; known: {', '.join(MESHES)}")
    return ConfigDict(dict(zip(("replica", "fsdp", "tensor", "context"), MESHES[name], strict=True)))
