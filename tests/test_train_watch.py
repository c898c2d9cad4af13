"""What the loop watches and reports, and what it refuses: sources, spikes, broken rows, traces, other models."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import optax
import pytest

from experiments import cpt
from swallow_jax import checkpoint, hf, mesh, optim, run, text, train, vocabulary
from swallow_jax.data import loader, packing, shards, sources
from tests.helpers import FLOAT32, random_params
from tests.test_train import OPTIM, SMALL, TRAIN, lines, make_batch

OF_ROW = np.array([0, 1, 1, 0])


@functools.partial(jax.jit, static_argnums=0, static_argnames="sources")
def sums_of(settings, batch, *, sources=0):
    return train.all_sums(random_params(SMALL), SMALL, FLOAT32, settings, batch, sources)


def with_sources(batch):
    rows = np.broadcast_to(OF_ROW[:, None], batch["tokens"].shape).astype(np.int32)
    return batch | {"sources": rows, "bytes": (batch["tokens"] % 5).astype(np.int32)}


def fit(folder, steps: int, *, batches=make_batch, model=SMALL, **changes):
    job = run.open_run(folder, {"x": 1}, inputs={})
    (folder / "model").mkdir(exist_ok=True)
    if not (folder / "model" / "config.json").exists():
        run.write_json(folder / "model" / "config.json", hf.config_json(model, "float32"))
    saved = checkpoint.Checkpoints(folder, checkpoint.CheckpointConfig(save_every=2, keep_last=1, keep_best=0))
    extra = {name: changes.pop(name) for name in ("sources", "row_names", "params") if name in changes}
    try:
        return train.fit(
            extra.pop("params", None) or random_params(model),
            model,
            compute=FLOAT32,
            train=dataclasses.replace(TRAIN, steps=steps, **changes),
            optimizer=optim.make_optimizer(dataclasses.replace(OPTIM, learning_rate=3e-2), max(steps, 8)),
            mesh=mesh.build(mesh.MeshConfig(replica=1, fsdp=1, tensor=1, context=1)),
            open_batches=lambda first: map(batches, itertools.count(first)),
            heldout=[make_batch(99)],
            data={"mixture": "a"},
            checkpoints=saved,
            run=job,
            **extra,
        )
    finally:
        saved.close()


# Sources.


@pytest.mark.parametrize("change", [{}, {"loss_chunk": 4}, {"targets_per_row": 12}], ids=["whole", "chunks", "gathered"])
def test_a_source_s_loss_is_that_of_its_rows_alone(change):
    settings, batch = dataclasses.replace(TRAIN, **change), with_sources(make_batch(0))
    sums = sums_of(settings, batch, sources=3)
    for source in (0, 1):
        alone = batch | {"weights": batch["weights"] * (source == OF_ROW)[:, None]}
        found = sums_of(settings, alone, sources=3)
        np.testing.assert_allclose(sums["by_source"][source, :2], [found["loss"], found["targets"]], rtol=1e-5)
    same = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0)
    size = (batch["bytes"] * batch["weights"])[:, 1:] * same
    np.testing.assert_allclose(sums["by_source"][:2, 2], [size[s == OF_ROW].sum() for s in (0, 1)], rtol=1e-6)
    assert np.array_equal(sums["by_source"][2], [0, 0, 0])


def test_sources_add_up_over_micro_batches_and_a_broken_row_spoils_only_its_own():
    optimizer = optim.make_optimizer(OPTIM, 8)
    settings = dataclasses.replace(TRAIN, micro_batches=2)
    kinds = {"config": SMALL, "compute": FLOAT32, "train": settings, "optimizer": optimizer, "sources": 3}
    step, state = jax.jit(functools.partial(train.train_step, **kinds)), train.init_state(random_params(SMALL), optimizer)
    batch = with_sources(make_batch(1))
    whole = np.asarray(sums_of(TRAIN, batch, sources=3)["by_source"])
    np.testing.assert_allclose(step(state, batch)[1]["by_source"], whole, rtol=1e-5)
    broken = batch | {"weights": batch["weights"] * np.where(np.arange(4) == 1, np.nan, 1.0)[:, None].astype(np.float32)}
    found = np.asarray(step(state, broken)[1]["by_source"])
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-5)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """(folder, parameters given) of a run of four steps with everything watched."""
    folder, params = tmp_path_factory.mktemp("watched") / "a", random_params(SMALL)
    settings = {"per_source": True, "tensorboard": True, "profile": (2, 3), "sources": ("news", "law", "unread")}
    fit(folder, 4, batches=lambda i: with_sources(make_batch(i)), params=params, **settings)
    return folder, params


def test_metrics_have_a_stream_for_each_source(watched):
    row = lines(watched[0])[0]
    assert row["sources"].keys() == {"news", "law"}
    news, law = row["sources"]["news"], row["sources"]["law"]
    assert news["targets"] + law["targets"] == row["targets"]
    mean = (news["loss"] * news["targets"] + law["loss"] * law["targets"]) / row["targets"]
    assert row["loss"] == pytest.approx(mean, rel=1e-5)
    whole = sums_of(TRAIN, with_sources(make_batch(0)), sources=3)["by_source"][0]
    assert news["bits_per_byte"] == pytest.approx(float(whole[0] / np.log(2) / whole[2]), rel=1e-5)


def write_shards(folder, rows: int, first: int, told: dict[str, int], *, row_length=4, tokenizer="t"):
    """Row i is all tokens first + i; `told`: source -> its first row."""
    with shards.ShardWriter(folder, row_length=row_length, tokenizer_sha256=tokenizer, vocab_size=60, rows_per_shard=3) as writer:
        ones = np.ones(row_length, np.uint16)
        writer.write(packing.Row(np.full(row_length, first + i, np.uint32), ones, ones.astype(np.float16)) for i in range(rows))
        for source, row in told.items():
            writer.add_source(source, documents=1, tokens=8, first_row=row)
    return folder


def test_each_row_of_a_batch_is_known_by_folder_number_and_source(tmp_path):
    told = write_shards(tmp_path / "domain" / "train", 7, 0, {"law": 0, "news": 3})
    untold = write_shards(tmp_path / "chat" / "train", 3, 50, {})
    settings = {"batch_size": 4, "seed": 7}
    found = sources.Sources([(told, 3), (untold, 1)], **settings)
    assert found.names == ("domain/law", "domain/news", "chat")
    batches = loader.open_batches([(told, 3), (untold, 1)], start_step=2, **settings)
    lengths = np.arange(60, dtype=np.int32)
    for step, batch in zip((2, 3, 4), found.annotate(batches, start_step=2, rows=[0, 1, 2, 3], byte_lengths=lengths)):
        tokens = batch["tokens"][:, 0].tolist()
        wanted = [2 if token >= 50 else int(token >= 3) for token in tokens]
        assert batch["sources"][:, -1].tolist() == wanted == found.numbers(step)
        assert np.array_equal(batch["bytes"], batch["tokens"])
        rows = [token - 50 if token >= 50 else token for token in tokens]
        for row, number, words in zip(rows, wanted, found.describe(step), strict=True):
            assert f"row {row} [{found.names[number]}]" in words and str((told, told, untold)[number]) in words


def test_the_ids_of_a_text_have_its_bytes(tmp_path):
    words = "保険の契約、ABC が 12 件。\n次の行 é😀" * 3
    template = vocabulary.LLAMA3_CHAT_TEMPLATE
    files = vocabulary.train_bpe([words], vocab_size=300, chat_template=template, special_tokens=vocabulary.SPECIAL_TOKENS)
    for name, data in files.items():
        run.write_bytes(tmp_path / name, data)
    tokenizer = text.load_tokenizer(tmp_path)
    for sample in (words, "未知の文字 ☃ も"):
        assert tokenizer.byte_lengths[tokenizer.encode(sample, add_bos=True)].sum() == len(sample.encode())
    assert [vocabulary._piece_bytes(p) for p in ("\u2581a", "<0x0A>", "保", "<0xZZ>")] == [2, 1, 3, 6]


# Spikes, broken rows, broken files.


def test_a_spike_is_reported_with_its_rows_and_the_run_goes_on(tmp_path, capsys):
    def one_strange_row(step):
        batch = make_batch(0)
        if step == 19:
            batch["tokens"] = batch["tokens"].copy()
            batch["tokens"][2] = 63 - batch["tokens"][2]
        return batch

    fit(tmp_path / "a", 22, batches=one_strange_row, spike_ratio=1.5, row_names=lambda i: [f"step {i} row {r}" for r in range(4)])
    rows = lines(tmp_path / "a")
    assert [row["step"] for row in rows if "spike" in row] == [20] and len(rows) == 22
    assert rows[19]["spike"]["rows"][0].startswith("step 19 row 2 (")
    assert rows[19]["loss"] > 1.5 * rows[19]["spike"]["median"]
    assert "the loss of step 20 is" in capsys.readouterr().out


def test_a_row_whose_loss_is_not_finite_is_named_by_the_last_good_parameters(tmp_path):
    def poisoned(step):
        batch = make_batch(step)
        if step == 4:
            batch["weights"][1] = np.nan
        return batch

    with pytest.raises(ValueError, match=r"not finite at step 5 .* checkpoint is step 4, by .* parameters b1 \(nan\), b"):
        fit(tmp_path / "a", 8, batches=poisoned, row_names=lambda i: [f"b{r}" for r in range(4)])
    with pytest.raises(ValueError, match=r"not finite at step 1 .* checkpoint is step None; its rows: b0, b1, b2, b3;"):
        fit(tmp_path / "b", 8, batches=lambda i: poisoned(4), row_names=lambda i: [f"b{r}" for r in range(4)])


def test_a_checkpoint_of_another_model_is_refused(watched):
    other = dataclasses.replace(SMALL, rope_theta=10000.0)
    with pytest.raises(ValueError, match="holds checkpoints of another model .*rope_theta=10000.0.*new --workdir"):
        fit(watched[0], 8, model=other)


def test_the_weights_lie_in_memory_once(watched):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(watched[1]))


# What is written beside the metrics.


def test_a_trace_of_the_steps_asked_for_is_written(watched):
    assert list((watched[0] / "profile").rglob("*.xplane.pb"))


def test_tensorboard_gets_the_numbers_of_the_metrics(watched):
    (events,) = (watched[0] / "tensorboard").iterdir()
    written = events.read_bytes()
    for name in (b"heldout_loss", b"tokens_per_s", b"sources/news/bits_per_byte"):
        assert name in written


# Options of the objective and the update.


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_z_loss_is_in_the_gradient_and_beside_the_loss(chunk):
    batch = make_batch(0)

    @jax.jit
    def objective(params):
        found = train.all_sums(params, SMALL, FLOAT32, dataclasses.replace(TRAIN, z_loss=0.1), batch)
        return (found["loss"] + 0.1 * found["squares"]) / found["targets"]

    optimizer = optim.make_optimizer(OPTIM, 8)
    out = {}
    for z_loss in (0.0, 0.1):
        settings = dataclasses.replace(TRAIN, z_loss=z_loss, loss_chunk=chunk)
        kinds = {"config": SMALL, "compute": FLOAT32, "train": settings, "optimizer": optimizer}
        step = jax.jit(functools.partial(train.train_step, **kinds))
        out[z_loss] = step(train.init_state(random_params(SMALL), optimizer), batch)[1]
    assert float(out[0.1]["loss"]) == pytest.approx(float(out[0.0]["loss"]), rel=1e-6) and "z_loss" not in out[0.0]
    norm = float(optax.global_norm(jax.grad(objective)(random_params(SMALL))))
    assert float(out[0.1]["grad_norm"]) == pytest.approx(norm, rel=1e-4) and norm > 1.05 * float(out[0.0]["grad_norm"])
    total = float(objective(random_params(SMALL)))
    assert total == pytest.approx(float(out[0.1]["loss"]) + 0.1 * float(out[0.1]["z_loss"]), rel=1e-5)


@functools.cache
def update(settings, **changes):
    """(state, what was added to the parameters) after two steps."""
    batch = make_batch(1)
    optimizer = optim.make_optimizer(dataclasses.replace(OPTIM, weight_decay=0.0, **changes), 8)
    step = jax.jit(lambda s, b: train.train_step(s, b, config=SMALL, compute=FLOAT32, train=settings, optimizer=optimizer))
    state = train.init_state(random_params(SMALL), optimizer)
    for _ in range(2):  # the first has learning rate 0
        state, _ = step(state, batch)
    return state, jax.tree.map(lambda a, b: np.asarray(a) - b, state["params"], random_params(SMALL))


def test_clipping_comes_after_accumulation():
    """With eps far above the gradient Adam is linear in it, so that its scale shows in the update."""
    linear = {"eps": 1e3, "learning_rate": 1e3, "final_learning_rate": 1e3}
    _, clipped = update(TRAIN, **linear, clip_norm=0.1)
    _, parts = update(dataclasses.replace(TRAIN, micro_batches=4), **linear, clip_norm=0.1)
    _, free = update(TRAIN, **linear, clip_norm=1e9)
    size = [float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))) for tree in (clipped, parts, free)]
    assert size[0] == pytest.approx(size[1], rel=1e-4) and size[2] > 2 * size[0]


def test_a_bfloat16_gradient_is_summed_clipped_and_applied_in_float32():
    exact, _ = update(TRAIN)
    for micro_batches in (1, 2):
        settings = dataclasses.replace(TRAIN, grad_dtype="bfloat16", micro_batches=micro_batches)
        state, _ = update(settings)
        assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {np.dtype("float32")}
        # Adam's first update hides the gradient's size; its moments do not.
        pairs = list(zip(moments(state, "q"), moments(exact, "q"), strict=True))
        assert len(pairs) == 2
        for (_, rough), (_, mean) in pairs:
            assert rough.dtype == mean.dtype == np.float32
            off = np.abs(rough - mean).max() / np.abs(mean).max()
            assert 1e-5 < off < 3e-2, off  # 8 bits, and not 24
    with pytest.raises(ValueError, match="grad_dtype='float16'; known: float32, bfloat16"):
        dataclasses.replace(TRAIN, grad_dtype="float16")


def test_mu_dtype_is_that_of_the_first_moment_alone():
    exact, wanted = update(TRAIN)
    state, got = update(TRAIN, mu_dtype="bfloat16")
    found = {path[-2].name if hasattr(path[-2], "name") else "": leaf.dtype.name for path, leaf in moments(state)}
    assert found == {"mu": "bfloat16", "nu": "float32"}
    assert {leaf.dtype.name for _, leaf in moments(exact)} == {"float32"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, wanted)  # 1 % of the learning rate


def moments(state, parameter="lm_head"):
    """(path, leaf) of one parameter's two moments."""
    leaves = jax.tree_util.tree_leaves_with_path(state["opt_state"])
    return [(path, leaf) for path, leaf in leaves if getattr(path[-1], "key", "") == parameter]


# Refused before weights are loaded.


class _Tokenizer:
    sha256 = "t"


@pytest.mark.parametrize(
    ("made", "devices", "message"),
    [
        ({"tokenizer": "u"}, (1, 1, 1, 1), "made with tokenizer u"),
        ({"row_length": 128}, (1, 1, 1, 1), "rows of 128 tokens, the model's limit is 64"),
        ({"row_length": 6}, (1, 1, 1, 4), "rows of 6 tokens, mesh context=4 does not divide them"),
    ],
)
def test_shards_that_do_not_belong_are_refused(tmp_path, made, devices, message):
    folder = write_shards(tmp_path / "a", 1, 0, {}, **made)
    grid = jax.sharding.AbstractMesh(devices, mesh.AXES)
    with pytest.raises(ValueError, match=message):
        cpt.check_shards([str(folder)], _Tokenizer(), dataclasses.replace(SMALL, max_position_embeddings=64), grid)
    with pytest.raises(ValueError, match="tokenizer has 60 entries, the model's embedding 32"):
        cpt.check_shards([str(folder)], _Tokenizer(), dataclasses.replace(SMALL, vocab_size=32), grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": (3, 2)}, r"train.profile=\(3, 2\)"),
        ({"spike_ratio": 0.5}, "train.spike_ratio=0.5: more than 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAIN, **change)


def test_metrics_lines_are_json_with_nested_sources(tmp_path):
    metrics = run.Metrics(tmp_path / "metrics.jsonl", from_step=0)
    metrics.write(1, loss=1.0, sources={"a": {"loss": 2.0}})
    metrics.close()
    again = run.Metrics(tmp_path / "metrics.jsonl", from_step=1)
    again.close()
    assert again.tail == [json.loads('{"step": 1, "loss": 1.0, "sources": {"a": {"loss": 2.0}}}')]
    assert again.last == again.tail[-1]
