"""The rules table: each name maps to one place, collisions and strangers are errors with both names in them."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from swallow_jax import llama, mesh
from tests.helpers import LLAMA31


def test_weights_are_sharded_by_their_names():
    assert mesh.spec(("layers", "ffn", "embed")) == PartitionSpec(None, "tensor", "fsdp")
    assert mesh.spec(("batch", "seq", "features")) == PartitionSpec(("replica", "fsdp"), "context", None)


def test_two_names_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="'heads' and 'ffn' both map to mesh axis 'tensor'"):
        mesh.spec(("heads", "ffn"))
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        mesh.spec(("head",))


def test_every_parameter_has_a_name_for_every_axis():
    shapes, axes = llama.abstract_params(LLAMA31, "float32")
    jax.tree.map(lambda s, a: mesh.spec(a) and len(a) == len(s.shape), shapes, axes, is_leaf=lambda x: isinstance(x, tuple))
    flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert [len(a) for a in flat] == [len(s.shape) for s in jax.tree.leaves(shapes)]


def test_a_mesh_that_does_not_match_the_devices_is_refused():
    with pytest.raises(ValueError, match="wants 8 devices, 1 are here"):
        mesh.build(mesh.MeshConfig(replica=1, fsdp=4, tensor=2, context=1), devices=jax.devices()[:1])


def test_constrain_costs_nothing_without_a_mesh():
    x = jax.numpy.ones((2, 3))
    assert mesh.constrain(x, ("batch", "features")) is x


def test_the_forward_pass_lowers_for_a_mesh_that_is_not_here():
    """Eight devices exist only as an abstract mesh; lowering checks every constraint against its axes."""
    abstract = AbstractMesh((1, 4, 2, 1), mesh.AXES, axis_types=(AxisType.Auto,) * 4)
    shapes, axes = llama.abstract_params(LLAMA31, "float32")
    params = jax.tree.map(
        lambda s, a: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=jax.sharding.NamedSharding(abstract, mesh.spec(a))),
        shapes,
        axes,
    )
    tokens = jax.ShapeDtypeStruct((8, 16), "int32", sharding=jax.sharding.NamedSharding(abstract, mesh.spec(("batch", "seq"))))
    compute = llama.Compute(dtype="float32", remat="none", scan_layers=True, attention="xla")
    with jax.sharding.use_abstract_mesh(abstract):
        traced = jax.jit(lambda p, t: llama.forward(p, LLAMA31, compute, t, t)[0]).trace(params, tokens)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "sharding_constraint" in text
