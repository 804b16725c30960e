"""Promised: rows that differ in one thing at a time, baselines that are what they are called, a table that goes on where it
stopped, and no row that is made twice."""

import csv
import inspect
import json
import os
import re
import statistics
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import make_tiny_model
from helpers import Stop, save_tasks, save_text, set_up, toy_run, toy_values
from matplotlib.axes import Axes
from torch import nn

from losa import comparison, method
from losa.adapter import attach, masked_linears, merge
from losa.baselines import lift_masks, mask_again
from losa.cli import verbs
from losa.commands.round import round_result
from losa.commands.toy import toy_tokenizer
from losa.comparison import METHODS, SLUGS, CompareConfig, compare
from losa.comparison.rows import MAKERS
from losa.pruning.grid import FORMATS
from losa.report.comparison import cells, latex, markdown, provenance, spread
from losa.report.page import refresh
from losa.report.pareto import front, points, recommendations
from losa.report.plots import write_plots
from losa.system.yaml_tree import parse_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = set_up(tmp_path_factory.mktemp("comparison"))
    save_text(folder / "held.txt", seed=1)
    return folder


def shared(folder):
    """What the rows of a toy comparison share."""
    values = toy_values(folder)
    values["eval"]["data"] = str(folder / "held.txt")
    return {key: value for key, value in values.items() if key not in ("output", "sparsity")}


def config(folder, output, **changes):
    return CompareConfig(output=str(output), run=shared(folder), **changes)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """All methods at 60 %: where, and what was found."""
    output = tmp_path_factory.mktemp("all")
    return output, {row["method"]: row for row in compare(config(folder, output, targets=["0.6"]))}


def test_every_method_is_as_sparse_as_it_says(made):
    for name, row in made[1].items():
        expected = 0.0 if name == "dense" or name.startswith("GPTQ") or name.endswith("+ LoRA") else 0.6
        assert row["sparsity"] == pytest.approx(expected, abs=1e-3), name
        assert (row["masked_again"] is not None) == name.endswith("+ LoRA")


def test_losa_is_what_a_run_gives(made, folder):
    record = toy_run(folder, output=None, steps=5, eval={"data": str(folder / "held.txt")}).losa_record
    assert made[1]["Wanda + LoSA"]["perplexity"] == record["perplexity"]["losa"]
    assert made[1]["dense"]["perplexity"] == record["perplexity"]["dense"]
    assert made[1]["Wanda"]["perplexity"] == record["perplexity"]["pruned"]


def test_training_helps_and_masking_a_dense_merge_costs(made):
    found = {name: row["perplexity"] for name, row in made[1].items()}
    for pruner in ("Wanda", "SparseGPT"):
        assert found[f"{pruner} + masked LoRA"] < found[pruner]
        assert made[1][f"{pruner} + LoRA"]["masked_again"] > found[f"{pruner} + LoRA"]
    assert found["masked full fine-tuning"] < found["Wanda"]


def test_tables_hold_every_row(made):
    output, rows = made
    with (output / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == list(METHODS) == list(rows)
    assert [float(line["perplexity"]) for line in lines] == [row["perplexity"] for row in rows.values()]
    assert ET.parse(output / "comparison-by-time.svg").getroot().tag.endswith("svg")
    assert not (output / "comparison-by-sparsity.svg").exists()  # one sparsity is no curve
    text = (output / "comparison.md").read_text()
    for part in ("trained on 3,840 tokens", "seed 0", "16 windows of 32 tokens", "text.txt", "model"):
        assert part in text


def test_a_comparison_goes_on_where_it_stopped(made, folder, monkeypatch):
    output, rows = made
    measured = []
    monkeypatch.setattr(comparison, "measure", lambda row, kept: measured.append(row.maker) or rows["Wanda"])
    row = next(row for row in config(folder, output, targets=["0.6"]).rows() if row.name == "Wanda")
    file = output / "rows" / f"{row.key}.json"
    file.rename(file.with_suffix(".partial"))  # killed while it was written
    compare(config(folder, output, targets=["0.6"]))
    assert measured == ["prune"]


def test_only_the_first_of_several_processes_writes(made, folder, monkeypatch):
    output, rows = made
    monkeypatch.setattr(comparison.distributed, "is_main", lambda: False)
    found = compare(config(folder, output, targets=["0.6"], name="second"))
    assert [row["method"] for row in found] == list(rows)
    assert not list(output.glob("second*"))


def test_rows_know_their_bits_and_bytes(made):
    rows = made[1]
    density = 1 - rows["ALPS int4"]["sparsity"]
    assert rows["dense"]["bits"] == 16
    assert rows["Wanda"]["bits"] == pytest.approx(1 + 16 * 0.4, abs=0.02)
    assert rows["ALPS int4"]["bits"] <= FORMATS["int4"].bits_per_weight(density) + 1e-9
    assert rows["GPTQ 3-bit"]["bits"] == 3.25
    assert rows["Wanda + LoRA"]["bits"] == 16  # a merge that is dense again
    order = ("GPTQ 2-bit", "ALPS int4", "GPTQ 3-bit", "GPTQ 4-bit", "Wanda", "dense")
    assert [rows[name]["bytes"] for name in order] == sorted(rows[name]["bytes"] for name in order)
    assert rows["GPTQ 8-bit"]["perplexity"] == pytest.approx(rows["dense"]["perplexity"], rel=0.01)
    assert rows["GPTQ 3-bit + training"]["perplexity"] < rows["GPTQ 3-bit"]["perplexity"]
    assert rows["losa int4"]["perplexity"] < rows["ALPS int4"]["perplexity"]
    head = (made[0] / "comparison.md").read_text()
    assert "| ALPS int4 60 % |" in head and "- Within" in head
    assert r"\toprule" in (made[0] / "comparison.tex").read_text()
    assert ET.parse(made[0] / "comparison-by-bytes.svg").getroot().tag.endswith("svg")


def test_rows_in_common_are_made_once(folder, tmp_path):
    both = config(folder, tmp_path, methods=["Wanda + LoSA", "LoSA without layer rates"], targets=["2:4"], seeds=[0, 1])
    keys = [row.key for row in both.rows()]
    assert len(keys) == 4 and len(set(keys)) == 2  # a pattern fixes all rates
    variants = config(folder, tmp_path, variants={"T = 5": {"steps": 5}}, targets=["2:4"])
    assert variants.rows()[0].key == keys[0]
    assert config(folder, tmp_path, methods=["dense"], targets=["0.5", "2:4"], seeds=[0, 1]).rows()[1:] == []


def test_seeds_are_averaged(folder, tmp_path):
    found = compare(config(folder, tmp_path, methods=["Wanda"], targets=["0.5", "0.6"], seeds=[0, 1, 2]))
    values = [row["perplexity"] for row in found if row["target"] == "0.6"]
    assert len(set(values)) > 1  # other calibration text
    assert f"| {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} |" in markdown(found)
    assert "seeds 0, 1, 2" in provenance(found)
    assert cells(found)[0] == ["method", "50 %", "60 %", "seconds"]
    assert (tmp_path / "comparison-by-sparsity.svg").exists()


def test_context_is_measured_where_it_is_wanted(folder, tmp_path):
    found = compare(config(folder, tmp_path, methods=["dense", "Wanda"], targets=["0.5"], context=True))
    assert [band[:2] for band in found[1]["context"]["by_context"]] == [[1, 15], [16, 31]]
    table = (tmp_path / "comparison-context.md").read_text().splitlines()
    assert table[0].split(" | ")[2:] == ["1-15 tokens", "16-31 tokens", "a passage", "the same again |"]
    assert table[2].startswith("| dense | 0 % |") and table[3].startswith("| Wanda | 50 % |")
    assert compare(config(folder, tmp_path, methods=["dense"], targets=["0.5"]))[0]["context"] is None  # another row


def test_spread_of_one_is_the_value():
    assert spread([3.14159]) == "3.14"


def test_a_variant_may_start_from_a_method(folder, tmp_path):
    row = config(folder, tmp_path, variants={"protected": {"method": "SparseGPT", "protect": [0]}}, targets=["0.4"]).rows()[0]
    assert (row.maker, row.config.pruner, row.config.protect, row.config.steps) == ("prune", "sparsegpt", [0], 1)


def test_from_a_file_with_changes_on_top(folder, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "output: here\ntargets: [0.5, 2:4]\nmethods: [dense]\nrun: {steps: 4, train: {lr: 1e-3}}\n"
    )
    run = {f"{part}.data": str(folder / "text.txt") for part in ("train", "eval")} | parse_set(["train.lr=2e-3"])
    loaded = CompareConfig.load(str(tmp_path / "mine.yaml"), run, seeds="3,4")
    row = loaded.rows()[0]
    assert (loaded.name, loaded.output, loaded.targets, loaded.seeds) == ("mine", "here", ["0.5", "2:4"], [3, 4])
    assert (row.config.steps, row.config.train.lr) == (4, 2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["LoSAA"]}, "methods is 'LoSAA', expected some of dense"),
        ({"methods": []}, "at least one, or variants"),
        ({"variants": {"dense": {}}}, "names that no method has"),
        ({"variants": {"mine": {"stepps": 1}}}, "did you mean steps"),
        ({"variants": {"mine": {"method": "Wandaa"}}}, "variants.mine.method is 'Wandaa'"),
        ({"variants": {"mine": 3}}, "variants.mine is 3, expected a mapping"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [0, 1], "run": {}}, "run.eval.data is None, expected a text"),
        ({"targets": []}, "targets is"),
        ({"targets": ["1.5"]}, "a ratio between 0 and 1"),
    ],
)
def test_what_a_user_got_wrong(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**{"output": str(tmp_path), "run": shared(folder)} | changes)


def test_a_missing_text_and_an_output_of_rows_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        CompareConfig(output=str(tmp_path), run=shared(folder) | {"train": {"data": "./nowhere.txt"}})
    with pytest.raises(ValueError, match="kept with keep_models only"):
        CompareConfig(output=str(tmp_path), run=shared(folder) | {"output": "there"})
    with pytest.raises(ValueError, match="output is None, expected a directory"):
        CompareConfig.load(None, {})


# baselines


@pytest.fixture
def pruned():
    """A model with masks and adapters, in float64."""
    model = attach(make_tiny_model("llama").double(), max_rank=4)
    generator = torch.Generator().manual_seed(1)
    for layer in masked_linears(model).values():
        layer.set_solution(torch.rand(layer.weight.shape, generator=generator) > 0.6)
    return model


def test_lifted_masks_count_what_a_solver_changed_once():
    model = attach(make_tiny_model("llama").double(), whole=True)
    for layer in masked_linears(model).values():
        layer.set_solution(torch.rand(layer.weight.shape) > 0.6, layer.weight * 1.5)
    before = {name: layer.merged() for name, layer in masked_linears(model).items()}
    lift_masks(model)
    for name, layer in masked_linears(model).items():
        assert torch.equal(layer.merged(), before[name]) and layer.keep_OI.all() and not layer.delta_OI.any()


def test_lifted_masks_leave_plain_lora_on_the_pruned_weights(pruned):
    before = {name: (layer.effective(), layer.keep_OI) for name, layer in masked_linears(pruned).items()}
    masks = lift_masks(pruned)
    x = torch.randn(3, 1, dtype=torch.float64)
    for name, layer in masked_linears(pruned).items():
        weight, keep = before[name]
        assert torch.equal(masks[f"{name}.weight"], keep)
        nn.init.normal_(layer.lora_B)
        A, B = layer.factors
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        expected = x @ weight.T + layer.scale * (x @ A.T) @ B.T  # as peft computes it
        torch.testing.assert_close(layer(x), expected)
    merge(pruned)
    mask_again(pruned, masks)
    for name, keep in masks.items():
        assert not pruned.get_parameter(name)[~keep].any()
        assert pruned.get_parameter(name)[keep].all()


def test_a_text_that_was_written_to_since_is_named(folder, tmp_path, caplog):
    compare(config(folder, tmp_path, methods=["dense"]))
    compare(config(folder, tmp_path, methods=["dense"]))
    assert "was written to" not in caplog.text
    (row,) = (tmp_path / "rows").iterdir()
    os.utime(row, (0, 0))
    compare(config(folder, tmp_path, methods=["dense"]))
    assert f"held.txt was written to after {row.name}" in caplog.text


def test_rows_that_end_dense_are_not_rounded(folder, tmp_path):
    run = shared(folder) | {"values": "int4"}
    rows = CompareConfig(output=str(tmp_path), run=run, methods=["dense", "Wanda", "Wanda + LoRA", "losa"]).rows()
    assert [row.config.values for row in rows] == [None, "int4", None, "int4"]


def test_what_is_pruned_and_trained_once_has_one_step(folder, tmp_path):
    variants: dict = {"mine": {"method": "sparsegpt-lora", "reconstruct": {"epochs": 1}}}
    with pytest.raises(ValueError, match=r"reconstruct\.epochs of mine is 1, expected 0: this method has no reconstruction"):
        config(folder, tmp_path, methods=[], variants=variants).rows()
    variants = {"mine": {"method": "sparsegpt-lora", "steps": 5}}
    with pytest.raises(ValueError, match="steps of mine is 5, expected 1"):
        config(folder, tmp_path, methods=[], variants=variants)


def test_a_table_without_targets_has_perplexities(made):
    rows = [row for name, row in made[1].items() if name == "dense" or name.startswith("GPTQ 4")]
    first, second, *lines = markdown(rows).splitlines()
    assert first == "| method | perplexity | seconds |" and second.count("|") == first.count("|")
    assert all(f"| {row['perplexity']:.2f} |" in line for row, line in zip(rows, lines, strict=False))


def test_a_damaged_row_is_made_again(folder, tmp_path, caplog):
    wanted = compare(config(folder, tmp_path, methods=["dense"]))[0]["perplexity"]
    (row,) = (tmp_path / "rows").iterdir()
    for damage in ("", row.read_text()[:100], "[1]", "[" * 100_000, "{}", '{"perplexity": "low"}'):
        row.write_text(damage)
        assert compare(config(folder, tmp_path, methods=["dense"]))[0]["perplexity"] == wanted
        assert json.loads(row.read_text())["perplexity"] == wanted
    assert caplog.text.count("; the row is made again") == 6


def test_a_kept_model_is_measured_later_without_being_made_again(folder, tmp_path, monkeypatch):
    methods = ["dense", "Wanda", "losa int4", "Wanda + LoRA"]
    first = compare(config(folder, tmp_path, methods=methods, targets=["0.6"], keep_models=True))
    kept = sorted(path.name for path in (tmp_path / "models").iterdir())
    rows = config(folder, tmp_path, methods=methods, targets=["0.6"]).rows()
    assert kept == sorted(row.model_key for row in rows if row.name in ("Wanda", "losa int4"))
    assert all(rows_file["config"]["output"] is None for rows_file in first)
    for maker in ("prune", "losa"):
        monkeypatch.setitem(MAKERS, maker, lambda session: pytest.fail("the model was made again"))
    more = compare(config(folder, tmp_path, methods=["Wanda", "losa int4"], targets=["0.6"], context=True))
    for row, again in zip(first[1:3], more, strict=True):
        assert again["context"]["by_context"]
        different = {key for key in row if row[key] != again[key]}
        assert different == {"context"}


def test_a_kept_model_is_rounded_and_reported_on_like_any_other(folder, tmp_path):
    methods = ["Wanda", "losa", "GPTQ 4-bit", "GPTQ 4-bit + training"]
    asked = config(folder, tmp_path, methods=methods, targets=["0.6"], keep_models=True)
    rows = dict(zip(methods, zip(asked.rows(), compare(asked), strict=True), strict=True))
    for row, found in rows.values():
        page = refresh(tmp_path / "models" / row.model_key).read_text()
        assert f"{found['perplexity']:.2f}" in page
    for name in ("Wanda", "losa"):
        row, found = rows[name]
        record = round_result(tmp_path / "models" / row.model_key, tmp_path / name, {"values": "int8"})
        assert record["perplexity"]["unrounded"] == pytest.approx(found["perplexity"])
        assert list(record["perplexity"])[-2:] == ["unrounded", "made"]


def test_a_kept_row_that_was_killed_goes_on(folder, tmp_path, monkeypatch):
    asked = config(folder, tmp_path, methods=["losa"], targets=["0.6"], keep_models=True)
    whole = compare(config(folder, tmp_path / "whole", methods=["losa"], targets=["0.6"]))[0]
    monkeypatch.setattr("losa.method.train", lambda *args, **kwargs: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        compare(asked)
    monkeypatch.undo()
    pruned, sparsify = [], method.sparsify
    monkeypatch.setattr(method, "sparsify", lambda session, step: pruned.append(step) or sparsify(session, step))
    assert compare(asked)[0]["perplexity"] == whole["perplexity"]
    assert pruned == [2, 3]


@pytest.mark.parametrize("values", [{"run": {"eval": "text.txt"}}, {"variants": {"mine": {"method": []}}, "run": {}}])
def test_values_of_another_type_are_refused(tmp_path, values):
    with pytest.raises(ValueError, match=r"run\.eval is 'text\.txt'|variants\.mine\.method is \[\]"):
        CompareConfig(output=str(tmp_path), **values)


def test_methods_are_typed_as_slugs_in_any_case(folder, tmp_path):
    assert config(folder, tmp_path, methods=["WANDA", "wanda-masked-lora", "losa", "Wanda + LoSA"]).methods == [
        "Wanda",
        "Wanda + masked LoRA",
        "losa",
        "Wanda + LoSA",
    ]
    assert len(SLUGS) == len(METHODS)
    help_ = inspect.signature(verbs.compare).parameters["methods"].annotation.__metadata__[0].help
    listed = set(re.findall(r"[a-z0-9-]+", help_))
    assert {name for name in SLUGS if not name.endswith("-training")} <= listed


def test_speed_and_tasks_are_measured_where_they_are_wanted(folder, paper_tasks, tmp_path):
    methods = ["dense", "ALPS int4", "GPTQ 3-bit"]
    tasks = {"tasks": "piqa,arc_easy", "task_data": str(save_tasks(tmp_path / "tasks")), "limit": 2}
    found = compare(config(folder, tmp_path / "out", methods=methods, targets=["0.5"], speed=True, **tasks))
    assert found[0]["speed"]["of_dense"] == 1 and found[1]["speed"]["tokens_per_second"] > 0
    assert found[2]["speed"] is None  # not ours to run
    assert set(found[0]["tasks"]["tasks"]) == {"piqa", "arc_easy"} and found[0]["tasks"]["mean"] is None
    assert (tmp_path / "out" / "comparison-by-speed.svg").exists()
    assert "| tokens/s | of dense |" in (tmp_path / "out" / "comparison.md").read_text()
    with pytest.raises(ValueError, match="limit is 0, expected at least 1"):
        config(folder, tmp_path, methods=["dense"], limit=0)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("piqaa", "lm-eval has no task 'piqaa'; did you mean: piqa"), ("piqa,mrpc", "no data for the task 'mrpc': expected")],
)
def test_tasks_that_do_not_load_are_known_before_a_row_is_made(folder, paper_tasks, tmp_path, monkeypatch, tasks, message):
    monkeypatch.setattr(comparison, "measure", lambda *_: pytest.fail("a row was made"))
    data = str(save_tasks(tmp_path / "tasks"))
    with pytest.raises(ValueError, match=message):
        compare(config(folder, tmp_path / "out", methods=["losa"], tasks=tasks, task_data=data))


def test_a_tokenizer_that_tasks_cannot_use_is_known_before_a_row_is_made(folder, paper_tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "measure", lambda *_: pytest.fail("a row was made"))
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    monkeypatch.setattr("losa.comparison.rows.open_tokenizer", lambda *_: tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has neither BOS nor EOS"):
        compare(config(folder, tmp_path / "out", methods=["losa"], tasks="rte", task_data=str(save_tasks(tmp_path / "tasks"))))


def row(method, target, perplexity, bits, values=None, of_dense=None):
    speed = None if of_dense is None else {"tokens_per_second": 10 * of_dense, "of_dense": of_dense}
    about = {"method": method, "target": target, "perplexity": perplexity, "bits": bits, "bytes": bits * 1000, "speed": speed}
    return about | {"tasks": None, "config": {"values": values}}


def test_what_to_use_is_said_for_every_loss_of_quality():
    rows = [
        row("dense", "", 10.0, 16.0, of_dense=1.0),
        row("GPTQ 4-bit", "", 10.9, 4.25, "dense4"),
        row("losa int4", "0.5", 12.0, 3.1, "int4", of_dense=5.0),
        row("losa", "0.5", 10.8, 9.0, of_dense=3.0),
        row("Wanda", "0.5", 30.1, 9.0, of_dense=3.0),
    ]
    near, far, *rest = recommendations(rows)
    assert near.startswith("Within 1.1 times") and "smallest is GPTQ 4-bit, 4.25 bits" in near and "llama.cpp" in near
    assert "fastest is losa 50 %, 3.0x dense" in near
    assert far.startswith("Within 1.25 times") and "smallest is losa int4 50 %" in far and "5.0x" in far
    assert rest == []  # nothing else at a greater loss
    assert [point.name for point in front(points(rows), lambda point: point.bits)] == [
        "losa int4 50 %",
        "GPTQ 4-bit",
        "losa 50 %",
        "dense",
    ]
    assert "keep more weights" in recommendations([rows[0], rows[4]])[0]
    assert recommendations(rows[1:]) == []


@pytest.mark.parametrize("half", ["0.5", "0.50", ".5"])
def test_a_target_is_drawn_however_it_is_written(half, tmp_path, monkeypatch):
    drawn, errorbar = [], Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda axes, *xy, **how: drawn.append(xy[:2]) or errorbar(axes, *xy, **how))
    about = {"masked_again": None, "seconds": {}, "model": "m"}
    targets = {half: 12.0, "0.7": 20.0, "0.1234567": 10.5, "2:4": 15.0}
    write_plots(tmp_path / "c", [row("Wanda", target, value, 9.0) | about for target, value in targets.items()])
    assert drawn == [(pytest.approx((12.34567, 50.0, 70.0)), (10.5, 12.0, 20.0))]


def test_a_table_in_latex():
    assert latex("| method | 50 % |\n|---|---|\n| a | 1.00 ± 0.10 |\n").splitlines() == [
        r"\begin{tabular}{lr}", r"\toprule", r"method & 50 \% \\", r"\midrule", r"a & 1.00 $\pm$ 0.10 \\", r"\bottomrule",
        r"\end{tabular}",
    ]  # fmt: skip
