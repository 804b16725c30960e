"""Promised: tables on the terminal fit 80 columns, have no empty column, two decimals, and shorten paths in the middle."""

import pytest
from rich.console import Console

from losa.cli.tables import bench_table, evaluation_tables, grid, middle, sparsity_table
from losa.commands.inspect import LayerSparsity

PATH = "/home/somebody/with/a/long/directory/name/and/more/of/it/texts/held-out/[a].jsonl"
ROW = {"model": "m", "data": PATH, "window": 4096, "perplexity": 12345.6789}
TASK = {"acc": 0.512345, "acc_stderr": 0.01234, "acc_norm": 0.6, "acc_norm_stderr": 0.02, "items": 10_042, "truncated": 0}
ABOUT = {"split": "validation", "shots": 0, "version": 1, "data": "local"}
LAMBADA = {"perplexity": 123.456, "perplexity_stderr": 1.2, "acc": 0.4, "acc_stderr": 0.01, "items": 5153, "truncated": 0} | ABOUT
MEAN = {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.5, "acc_norm_stderr": 0.01, "tasks": ["a"]}
EVALUATION = {
    "perplexity": [
        ROW | {"definition": "token, windowed", "windows": 1196},
        ROW | {"definition": "word, lm-eval", "documents": 12_345},
    ],
    "tasks": {"arc_challenge": TASK | ABOUT, "lambada_openai": LAMBADA},
    "mean_acc": MEAN,
    "lm_eval": "0.4.13",
}
MODEL = {"tokens_per_second": 12.34, "first_token_seconds": 1.2, "resident_bytes": 2**30, "limit_tokens_per_second": 40.0}
BENCH = {
    "prompt": 128,
    "new": 32,
    "machine": "a machine",
    "bandwidth": 3e10,
    "rows": [MODEL | {"name": name} for name in ("dense", "sparse bfloat16", "sparse int8")],
}
LAYERS = [
    LayerSparsity(f"model.decoder.layers.{index}.feed_forward.gate_up_projection.weight", index, 70, 100, ()) for index in (0, 11)
]
TABLES = {
    "eval": lambda: evaluation_tables(EVALUATION),
    "bench": lambda: bench_table(BENCH),
    "inspect": lambda: sparsity_table(LAYERS, False),
    "inspect --layers": lambda: sparsity_table(LAYERS, True),
}


def lines(table, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


@pytest.mark.parametrize("name", TABLES)
def test_tables_fit_80_columns(name):
    """As they are: a wider terminal shows the same lines, so nothing was folded."""
    narrow = [line.rstrip() for line in lines(TABLES[name]()) if line[:1] in "│┃"]
    wide = [line.rstrip() for line in lines(TABLES[name](), 200) if line[:1] in "│┃"]
    assert narrow == wide
    assert max(map(len, narrow)) <= 80


def test_a_bench_says_how_many_zeros_it_is_of():
    assert "weights 70% are zero." in " ".join(lines(bench_table(BENCH | {"zeros": 0.7}), 200))


def test_paths_lose_their_middle_and_brackets_are_no_markup():
    found = "\n".join(lines(TABLES["eval"]()))
    assert "/home…" in found and "[a].jsonl" in found
    assert "12345.68" in found and "51.23 ±1.23" in found and "123.46 ±1.20" in found
    assert middle("a/b.txt") == "a/b.txt"
    assert len(middle(PATH)) == 24


def test_a_wide_terminal_shows_the_whole_name_of_a_text():
    assert PATH in "\n".join(lines(evaluation_tables(EVALUATION, 150), 150))


def test_accuracies_alone_are_in_percent():
    metrics = {"exact_match,strict": 0.25, "exact_match,strict_stderr": 0.05, "bits_per_byte": 0.8712, "byte_perplexity": 1.8291}
    task = metrics | {"items": 7, "truncated": 0} | ABOUT
    found = " ".join(lines(evaluation_tables(EVALUATION | {"perplexity": [], "tasks": {"mine": task}, "mean_acc": None}), 200))
    assert all(f" {value} " in found for value in ("25.00 ±5.00", "0.87", "1.83"))


def test_empty_columns_are_left_out():
    found = "\n".join(lines(grid("t", ("a", "b", "c"), [("1", "", "2"), ("3", "", "")], ("a",))))
    assert "b" not in found and "c" in found
    assert "pattern" not in "\n".join(lines(TABLES["inspect"]()))
