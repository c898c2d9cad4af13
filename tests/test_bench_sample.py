"""The sampler's benchmark runs, prints one JSON object, and compares the same tokens."""

import json

import pytest

from tools.bench import sample


def bench(capsys, *flags):
    assert sample.main(["--case=tiny", "--rounds=1", "--new=6", "--chunk=2", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_measures_each_batch_alone(capsys):
    result = bench(capsys, "--peer=none", "--batches=1,3", "--dtypes=float32")
    assert result["float32"].keys() == {"1", "3"} and result["ratio"] == {}
    assert all(row["ours"]["tok_s"] > 0 for row in result["float32"].values())


@pytest.mark.live
def test_transformers_writes_the_same_tokens_behind_a_shared_prefix_too(capsys):
    for flags in ((), ("--prefix=40",)):
        result = bench(capsys, "--batches=1,3", "--dtypes=float32", *flags)
        assert result["ratio"].keys() == {"1", "3"}
        assert all(row["same_tokens"] == 1.0 and row["ratio_cpu"] > 0 for row in result["float32"].values())
