"""Accelerator kernels against the reference, run by Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swallow_jax import kernels
from swallow_jax.attention import attend

B, T, K, G, H = 2, 256, 2, 2, 128
SEGMENTS = jnp.asarray([[1] * 100 + [2] * 100 + [0] * 56, [1] * 256], jnp.int32)
POSITIONS = jnp.asarray([[*range(100), *range(100), *range(56)], range(256)], jnp.int32)


def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, T, K, G, H), jnp.float32)
    k, v = (jax.random.normal(key, (B, T, K, H), jnp.float32) for key in keys[1:])
    return q, k, v


def reference(q, k, v):
    kinds = {"q_positions_BT": POSITIONS, "k_positions_BS": POSITIONS, "segments_BT": SEGMENTS}
    return attend(q, k, v, **kinds, aligned=True, backend="xla")


def splash(q, k, v):
    return kernels.splash(q, k, v, SEGMENTS, interpret=True)


def test_splash_equals_the_reference_in_value_and_gradient():
    q, k, v = arrays()
    np.testing.assert_allclose(splash(q, k, v), reference(q, k, v), rtol=2e-5, atol=2e-5)
    weights = jax.random.normal(jax.random.key(1), q.shape)
    ours = jax.grad(lambda *a: jnp.sum(splash(*a) * weights), argnums=(0, 1, 2))(q, k, v)
    theirs = jax.grad(lambda *a: jnp.sum(reference(*a) * weights), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_splash_isolates_packed_documents_to_the_bit():
    q, k, v = arrays()
    other = jnp.where((SEGMENTS == 1)[:, :, None, None], 7.0, 0.0)
    same = SEGMENTS[0] == 2
    before, after = splash(q, k, v)[0, same], splash(q, k + other, v + other)[0, same]
    assert np.array_equal(before, after)
    gradient = jax.grad(lambda v: jnp.sum(splash(q, k, v)[0, same] ** 2))(v)
    assert np.all(gradient[0, :100] == 0) and np.any(gradient[0, 100:200] != 0)


# cuDNN. No GPU is here: what can be checked is what it is told, and that the call is one that JAX lowers for CUDA.


def test_cudnn_is_told_where_documents_begin_and_end():
    rows = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0], [1] * 8, [0] * 8, [1, 2, 3, 4, 5, 6, 7, 8]], jnp.int32)
    lengths, starts = kernels.document_spans(rows, 4)
    assert lengths.tolist() == [[3, 1, 2, -1], [8, -1, -1, -1], [-1] * 4, [1, 1, 1, 1]]
    assert starts.tolist() == [[0, 3, 4, -1, -1], [0, -1, -1, -1, -1], [-1] * 5, [0, 1, 2, 3, -1]]


@pytest.fixture
def hopper(monkeypatch):
    """JAX asks the GPU that is not here; the answers of an H100."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda wanted: float(wanted) <= 9.0)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda wanted: wanted == "9.0")


def test_cudnn_lowers_for_cuda_forward_and_backward(hopper):
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays())
    loss = jax.jit(jax.grad(lambda q, k, v: jnp.sum(kernels.cudnn(q, k, v, SEGMENTS).astype(jnp.float32)), argnums=(0, 1, 2)))
    program = loss.trace(q, k, v).lower(lowering_platforms=("cuda",))
    assert [x.shape for x in program.out_info] == [q.shape, k.shape, v.shape]
    text = program.as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "PADDING_CAUSAL" in text and "max_seg_per_batch\\22: 128" in text.replace("\\0A", "")


def test_cudnn_computes_in_bfloat16_alone():
    with pytest.raises(ValueError, match="attention 'cudnn' computes in bfloat16, not float32; set compute.dtype"):
        kernels.cudnn(*arrays(), SEGMENTS)


def test_rows_with_too_many_documents_for_cudnn_stop_the_run(monkeypatch):
    """cuDNN's part is played by ones: what is added around it is ours."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "dot_product_attention", lambda q, k, v, **_: jnp.ones_like(q))
    monkeypatch.setattr(kernels, "CUDNN_DOCUMENTS", 1)
    out = np.asarray(kernels.cudnn(*(x.astype(jnp.bfloat16) for x in arrays()), SEGMENTS).astype(jnp.float32))
    assert np.isnan(out[0]).all() and np.all(out[1] == 1)
    monkeypatch.setattr(kernels, "CUDNN_DOCUMENTS", 2)
    out = np.asarray(kernels.cudnn(*(x.astype(jnp.bfloat16) for x in arrays()), SEGMENTS).astype(jnp.float32))
    assert np.all(out[0, :200] == 1) and np.all(out[0, 200:] == 0)
