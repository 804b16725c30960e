"""`losa bench`: every kind of values beside dense, in one process, beside the limit."""

import pytest

from losa.cli.tables import sparsity_json
from losa.commands.inspect import inspect
from losa.runtime import dispatch
from losa.runtime.bench import compare
from losa.runtime.values import TYPES


def test_bench_compares_in_one_process(llama):
    for directory, names in (
        (llama / "sparse", ["dense", *sorted(f"sparse {values}" for values in TYPES)]),
        (llama / "int4", ["dense", "sparse int4"]),
    ):
        result = compare(directory, prompt=4, new=3, rounds=1)
        assert [row["name"] for row in result["rows"]] == names
        assert result["zeros"] == pytest.approx(sparsity_json(inspect(directory))["sparsity"], abs=1e-6)
        for row in result["rows"]:
            assert row["tokens_per_second"] > 0
            compiled = row["name"] != "dense" and len(dispatch.available()) > 1
            assert row["road"] == ("compiled step" if compiled else "transformers")
            assert row["limit_tokens_per_second"] == pytest.approx(result["bandwidth"] / row["weight_bytes"])
    with pytest.raises(ValueError, match="1 new tokens"):
        compare(llama / "packed", new=1)
    with pytest.raises(ValueError, match="more than the model's 64; ask for fewer"):
        compare(llama / "packed", prompt=63, new=2)
