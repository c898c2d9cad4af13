"""The objective and the step: what is summed, what is divided, and what resuming repeats."""

import dataclasses
import functools
import json
import signal

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from swallow_jax import checkpoint, hf, llama, mesh, optim, run, train
from tests.helpers import FLOAT32, LLAMA31, model_logits, random_params

SMALL = dataclasses.replace(LLAMA31, num_layers=2, vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=8)
TRAIN = train.TrainConfig(
    steps=8,
    micro_batches=1,
    loss_chunk=0,
    targets_per_row=0,
    z_loss=0.0,
    grad_dtype="float32",
    eval_every=2,
    log_every=100,
    per_source=False,
    spike_ratio=0.0,
    profile=(),
    tensorboard=False,
)
OPTIM = optim.OptimConfig(
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=2,
    decay_steps=0,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    mu_dtype=None,
    frozen=(),
)


def make_batch(seed: int, rows: int = 4, length: int = 16) -> dict[str, np.ndarray]:
    """Rows of two documents and padding, with weights that differ from row to row."""
    rng = np.random.default_rng(seed)
    cut = rng.integers(4, 9, rows)
    index = np.arange(length)[None]
    segments = np.where(index < cut[:, None], 1, np.where(index < 13, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, index - cut[:, None], np.where(segments == 1, index, 0)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.4).astype(np.float32) * np.arange(1, rows + 1, dtype=np.float32)[:, None]
    return {
        "tokens": rng.integers(1, 64, (rows, length)).astype(np.int32),
        "segments": segments,
        "positions": positions,
        "weights": weights,
    }


def one_step(config: train.TrainConfig, batch, optimizer_config=OPTIM):
    optimizer = optim.make_optimizer(optimizer_config, 8)
    step = jax.jit(functools.partial(train.train_step, config=SMALL, compute=FLOAT32, train=config, optimizer=optimizer))
    return step(train.init_state(random_params(SMALL), optimizer), batch)


def test_the_loss_is_the_weighted_mean_written_out():
    """By hand: log-softmax of each position, summed over targets inside a document, over the sum of their weights."""
    batch, params = make_batch(0), random_params(SMALL)
    logits = model_logits(params, SMALL, batch["tokens"], segments=batch["segments"], positions=batch["positions"])
    logp = np.asarray(jax.nn.log_softmax(logits))
    total = weight = 0.0
    for b in range(4):
        for t in range(15):
            if batch["segments"][b, t] == batch["segments"][b, t + 1] > 0:
                total -= batch["weights"][b, t + 1] * logp[b, t, batch["tokens"][b, t + 1]]
                weight += batch["weights"][b, t + 1]
    _, metrics = one_step(TRAIN, batch)
    assert float(metrics["targets"]) == weight
    assert float(metrics["loss"]) == pytest.approx(total / weight, rel=1e-5)


def test_the_gradient_is_that_of_the_mean():
    """Adam hides a factor in the gradient; clipping and the logged norm do not."""

    def mean(params):
        total, weight = train.loss_sums(params, SMALL, FLOAT32, TRAIN, make_batch(0))
        return total / weight

    _, metrics = one_step(TRAIN, make_batch(0))
    norm = optax.global_norm(jax.grad(mean)(random_params(SMALL)))
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_equals_the_large_batch_although_the_weights_differ(micro_batches):
    whole, metrics = one_step(TRAIN, make_batch(1))
    parts, again = one_step(dataclasses.replace(TRAIN, micro_batches=micro_batches), make_batch(1))
    assert float(metrics["loss"]) == pytest.approx(float(again["loss"]), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(again["grad_norm"]), rel=1e-5)
    # Adam divides by the gradient's size: where it is nearly 0, float32 rounding shows at the scale of the learning rate.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole["params"], parts["params"])


@pytest.mark.parametrize("change", [{"loss_chunk": 4}, {"targets_per_row": 12}, {"loss_chunk": 4, "targets_per_row": 12}])
def test_chunks_and_gathered_targets_change_nothing(change):
    _, wanted = one_step(TRAIN, make_batch(2))
    _, got = one_step(dataclasses.replace(TRAIN, **change), make_batch(2))
    for name in ("loss", "grad_norm", "targets"):
        assert float(got[name]) == pytest.approx(float(wanted[name]), rel=1e-5), name


def test_a_batch_without_targets_moves_nothing_and_is_no_nan():
    batch = make_batch(3) | {"weights": np.zeros((4, 16), np.float32)}
    state, metrics = one_step(TRAIN, batch, dataclasses.replace(OPTIM, weight_decay=0.0))
    assert float(metrics["loss"]) == 0.0 and float(metrics["grad_norm"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, state["params"], random_params(SMALL))


def test_norms_are_not_decayed_and_frozen_parameters_stay():
    mask = optim.decay_mask(random_params(SMALL))
    assert mask["embed"] and mask["layers"]["q"] and not mask["norm"] and not mask["layers"]["post_norm"]
    # At learning rate 0 of the first warm-up step nothing moves; the second step does.
    optimizer = optim.make_optimizer(dataclasses.replace(OPTIM, frozen=("embed",)), 8)
    step = jax.jit(functools.partial(train.train_step, config=SMALL, compute=FLOAT32, train=TRAIN, optimizer=optimizer))
    state = train.init_state(random_params(SMALL), optimizer)
    for seed in (0, 1):
        state, _ = step(state, make_batch(seed))
    before = random_params(SMALL)
    np.testing.assert_array_equal(state["params"]["embed"], before["embed"])
    assert not np.array_equal(state["params"]["lm_head"], before["lm_head"])


def test_schedules_pass_through_their_corners():
    cosine = optim.learning_rate(OPTIM, 8)
    assert float(cosine(0)) == 0.0 and float(cosine(2)) == pytest.approx(1e-2) and float(cosine(8)) == pytest.approx(1e-3)
    wsd = optim.learning_rate(dataclasses.replace(OPTIM, schedule="wsd", decay_steps=4), 10)
    assert [round(float(wsd(s)), 6) for s in (0, 2, 6, 8, 10)] == [0.0, 0.01, 0.01, 0.0055, 0.001]
    with pytest.raises(ValueError, match="warmup_steps=2 leaves nothing of 2 steps"):
        optim.learning_rate(OPTIM, 2)


def fit(folder, steps: int, *, batches=make_batch, stop_after: int | None = None, data="a"):
    """A short run; `stop_after` breaks the stream of batches there, as a crash would."""
    job = run.open_run(folder, {"x": 1}, inputs={})
    saving = checkpoint.CheckpointConfig(save_every=2, keep_last=2, keep_best=1)
    (folder / "model").mkdir(exist_ok=True)
    run.write_json(folder / "model" / "config.json", hf.config_json(SMALL, "float32"))

    def stream(first):
        for step in range(first, steps):
            if step == stop_after:
                raise KeyboardInterrupt
            yield batches(step)

    saved = checkpoint.Checkpoints(folder, saving)
    try:
        return train.fit(
            random_params(SMALL),
            SMALL,
            compute=FLOAT32,
            train=dataclasses.replace(TRAIN, steps=steps),
            optimizer=optim.make_optimizer(OPTIM, 8),
            mesh=mesh.build(mesh.MeshConfig(replica=1, fsdp=1, tensor=1, context=1)),
            open_batches=stream,
            heldout=[make_batch(99)],
            data={"mixture": data},
            checkpoints=saved,
            run=job,
        )
    finally:
        saved.close()


def lines(folder):
    clock = ("tokens_per_s", "mfu", "data_wait_s")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def test_a_resumed_run_is_bitwise_the_straight_run(tmp_path):
    straight = fit(tmp_path / "a", 8)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", 8, stop_after=5)
    assert len(lines(tmp_path / "b")) == 5  # step 5 was logged, its checkpoint was not due
    resumed = fit(tmp_path / "b", 8)
    assert resumed["params_sha256"] == straight["params_sha256"]
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert [row["step"] for row in lines(tmp_path / "b")] == list(range(1, 9))


def test_parameters_open_from_the_best_and_the_last_checkpoint(tmp_path):
    result = fit(tmp_path / "a", 8)
    params, config = checkpoint.open_model(tmp_path / "a", which="last")
    assert config == SMALL and hf.params_sha256(params, config) == result["params_sha256"]
    losses = {row["step"]: row["heldout_loss"] for row in lines(tmp_path / "a") if "heldout_loss" in row}
    best, _ = checkpoint.open_model(tmp_path / "a", which="best")
    heldout, weight = train.loss_sums(best, SMALL, FLOAT32, TRAIN, make_batch(99))
    assert float(heldout / weight) == pytest.approx(min(losses.values()), rel=1e-5)


def test_other_data_on_resume_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "a", 8, stop_after=5)
    with pytest.raises(ValueError, match="was saved with other data"):
        fit(tmp_path / "a", 8, data="b")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    def poisoned(step):
        batch = make_batch(step)
        return batch | {"weights": batch["weights"] * (np.nan if step == 4 else 1)}

    with pytest.raises(ValueError, match=r"not finite at step 5 .* the last good checkpoint is step 4"):
        fit(tmp_path / "a", 8, batches=poisoned)


def test_a_run_killed_before_its_result_was_written_still_reports_its_loss(tmp_path):
    first = fit(tmp_path / "a", 8)
    again = fit(tmp_path / "a", 8)  # all steps are done, the result is not in the manifest
    assert {k: first[k] for k in ("loss", "heldout_loss", "params_sha256")} == {
        k: again[k] for k in ("loss", "heldout_loss", "params_sha256")
    }


def test_an_update_that_breaks_the_parameters_is_not_saved(tmp_path, monkeypatch):
    """The loss of a step is taken before its update; only the held-out loss sees what is saved."""
    real = train.heldout_loss
    seen = []
    monkeypatch.setattr(train, "heldout_loss", lambda *a: seen.append(0) or (np.nan if len(seen) == 4 else real(*a)))
    with pytest.raises(ValueError, match=r"held-out loss is not finite after step 8; the last good checkpoint is step 6"):
        fit(tmp_path / "a", 8)
    assert not (tmp_path / "a" / "checkpoints" / "8").exists()


def test_after_training_sigterm_ends_the_process_again(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path / "a", 4)
    assert signal.getsignal(signal.SIGTERM) == before


def test_moments_lie_where_their_parameters_lie():
    """Else several devices each hold all of Adam, and a resumed run's first step is another program."""
    optimizer = optim.make_optimizer(dataclasses.replace(OPTIM, frozen=("embed",)), 8)
    devices = AbstractMesh((1, 2, 2, 1), mesh.AXES, axis_types=(AxisType.Auto,) * 4)
    shapes, axes = llama.abstract_params(SMALL, np.float32)
    params = jax.tree.map(
        lambda s, names: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=mesh.sharding(devices, names)), shapes, axes
    )
    abstract = jax.eval_shape(functools.partial(train.init_state, optimizer=optimizer), params)
    places = train.state_placements(abstract, params, optimizer, devices)
    assert jax.tree.structure(places) == jax.tree.structure(abstract)
    specs = [p.spec for p in jax.tree.leaves(places["opt_state"])]
    weights = [p.spec for p in jax.tree.leaves(places["params"])]
    assert [s for s in specs if len(s)] == weights * 2  # first and second moments
