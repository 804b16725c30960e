"""End to end on a toy: a run leaves a plain sparse checkpoint, exact to the bit, with its whole story beside it."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    comparable,
    file_bytes,
    pruned_names,
    record_of,
    save_text,
    save_toy,
    set_up,
    tensors,
    toy_config,
    toy_run,
)
from processes import call, open_without_losa
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

from losa.adapter import masked_linears
from losa.allocation import cubic_sparsity
from losa.api import prune, run
from losa.config import LosaConfig
from losa.models import load
from losa.session.result import verify_zeros
from losa.session.samples import answer, opening
from losa.system.output import read_record
from losa.system.writing import to_json


class Look(TrainerCallback):
    """Notes, at the start of each training, masks, ranks and what is in the output directory."""

    def __init__(self, output: Path) -> None:
        self.output, self.masks, self.ranks, self.stages = output, [], [], []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        layers = masked_linears(kwargs["model"])
        self.masks.append({name: layer.keep_OI.clone() for name, layer in layers.items()})
        self.ranks.append({name: layer.rank for name, layer in layers.items()})
        self.stages.append(sorted(path.name for path in (self.output / ".losa").iterdir() if (path / "stage.json").exists()))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run: its folder, its model, and what a callback saw on the way."""
    folder = set_up(tmp_path_factory.mktemp("run"))
    look = Look(folder / "sparse")
    model = toy_run(folder, callbacks=(look,))
    return folder, model, look


def test_opens_with_transformers_alone(done, tmp_path):
    folder, model, _ = done
    ids = torch.arange(60).view(2, 30)
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(path) for path in (folder / "sparse", tmp_path / "ids.pt", tmp_path / "logits.pt")]
    assert call(tmp_path / "log", open_without_losa, *arguments) == 0, (tmp_path / "log").read_text()
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(input_ids=ids).logits)


def test_returned_model_has_no_trace_of_the_package(done):
    folder, model, _ = done
    assert not masked_linears(model)
    assert all(type(module).__module__.partition(".")[0] in ("torch", "transformers") for module in model.modules())
    file = tensors(folder / "sparse")
    assert model.state_dict().keys() == file.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, file[name])
    source = AutoModelForCausalLM.from_pretrained(folder / "model")
    reopened = AutoModelForCausalLM.from_pretrained(folder / "sparse")
    assert reopened.config.to_dict() == source.config.to_dict() | {"_name_or_path": reopened.config.name_or_path}


def test_generates(done):
    _, model, _ = done
    ids = model.generate(input_ids=torch.tensor([[33, 34]]), max_new_tokens=5, do_sample=False)
    assert ids.shape[1] > 2


def test_sparsity_is_what_was_asked(done):
    folder, _, _ = done
    file, record = tensors(folder / "sparse"), record_of(folder / "sparse")
    names = pruned_names(folder / "sparse")
    assert len(names) == 14
    zeros = sum(int((file[name] == 0).sum()) for name in names)
    total = sum(file[name].numel() for name in names)
    assert zeros / total == pytest.approx(0.6, abs=1e-3)
    assert record["sparsity"] == {"asked": 0.6, "achieved": zeros / total, "weights": total}


def test_rates_of_the_record_are_the_zeros_of_the_file(done):
    folder, _, _ = done
    file, rates = tensors(folder / "sparse"), record_of(folder / "sparse")["steps"][-1]["rates"]
    assert len(set(rates)) == 2  # blocks do differ
    for name in pruned_names(folder / "sparse"):
        block = int(name.split(".")[2])
        assert int((file[name] == 0).sum()) == round(file[name].numel() * rates[block]), name


def test_masks_nest_from_step_to_step(done):
    folder, _, look = done
    file, steps = tensors(folder / "sparse"), record_of(folder / "sparse")["steps"]
    assert len(look.masks) == 3
    for name in look.masks[0]:
        for number, keep in enumerate(mask[name] for mask in look.masks):
            assert int((~keep).sum()) == round(keep.numel() * steps[number]["rates"][int(name.split(".")[2])])
            if number:
                assert not (keep & ~look.masks[number - 1][name]).any()
        last = look.masks[-1][name]
        assert torch.equal(file[f"{name}.weight"] != 0, last)
        assert not file[f"{name}.weight"][~last].view(torch.uint8).any()


def test_ranks_are_used_and_sum_to_the_budget(done):
    folder, _, look = done
    for number, (step, omega) in enumerate(zip(record_of(folder / "sparse")["steps"], (6, 8, 10), strict=True)):
        assert sum(step["ranks"]) == 2 * omega
        assert {name: step["ranks"][int(name.split(".")[2])] for name in look.ranks[number]} == look.ranks[number]


def test_each_stage_replaces_the_one_before(done):
    folder, _, look = done
    assert look.stages == [["01-pruned"], ["02-pruned"], ["03-pruned"]]
    assert not (folder / "sparse" / ".losa").exists()


def test_record_tells_the_whole_story(done):
    folder, model, _ = done
    record = read_record(folder / "sparse")
    assert record["kind"] == "run"
    assert LosaConfig.from_dict(record["config"]) == toy_config(folder).resolve(32, 64)
    assert {"losa", "torch", "transformers", "accelerate", "safetensors", "python", "machine"} <= record["versions"].keys()
    assert record["config"]["seed"] == 0
    held_out = record["evaluation"].pop("held_out")
    assert len(held_out.pop("sha256")) == 64 and held_out == {"source": "../text.txt"}
    assert record["evaluation"] == {
        "data": "held out of the training text",
        "window": 32,
        "windows": 16,
        "counts": "all tokens",
    }
    assert list(record["perplexity"]) == ["dense", "pruned", "losa"]
    assert {"importance", "pruning", "training", "evaluation", "baseline", "saving", "reading text"} <= record["seconds"].keys()
    assert all(seconds >= 0 for seconds in record["seconds"].values())
    assert [step["step"] for step in record["steps"]] == [1, 2, 3]
    for step in record["steps"]:
        assert step["target"] == cubic_sparsity(step["step"], 3, 0.6)
        assert sum(step["rates"]) / 2 == pytest.approx(step["target"], abs=1e-12)
        assert max(abs(rate - step["target"]) for rate in step["rates"]) <= 0.02 + 1e-12
        assert len(step["importance"]) == len(step["errors"]) == len(step["ranks"]) == 2
        assert all(error > 0 for error in step["errors"])
        assert all(math.isfinite(loss) and update > 0 for update, loss in step["loss"])
    assert model.losa_record["perplexity"] == record["perplexity"]


def test_training_recovers_quality(done):
    folder, _, _ = done
    found = record_of(folder / "sparse")["perplexity"]
    assert found["losa"] < found["pruned"]


def test_all_but_the_pruned_layers_is_bitwise_the_source(done):
    folder, _, _ = done
    source, result = tensors(folder / "model"), tensors(folder / "sparse")
    assert source.keys() == result.keys()
    for name in source.keys() - set(pruned_names(folder / "sparse")):
        assert torch.equal(source[name].view(torch.uint8), result[name].view(torch.uint8)), name
    assert all(source[name].dtype == result[name].dtype for name in source)


def test_tokenizer_and_generation_configuration_come_along(done):
    folder, _, _ = done
    tokenizer = AutoTokenizer.from_pretrained(folder / "sparse")
    assert tokenizer("FOX")["input_ids"] == AutoTokenizer.from_pretrained(folder / "model")("FOX")["input_ids"]
    generation = GenerationConfig.from_pretrained(folder / "sparse")
    assert (generation.do_sample, generation.temperature) == (True, 0.25)


def test_model_card_says_what_was_done(done):
    folder, _, _ = done
    card = (folder / "sparse" / "README.md").read_text()
    front, body = card.split("---\n")[1:3]
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["sparse", "losa", "wanda"],
    }
    assert str(folder) not in card  # a card is published, directories are private
    found = record_of(folder / "sparse")
    for text in (
        "# sparse",
        f"{found['sparsity']['achieved']:.2%}",
        *(f"{value:.3f}" for value in found["perplexity"].values()),
        "from_pretrained",
    ):
        assert text in body
    assert f"{found['sparsity']['weights']:,}" in body


def test_equal_runs_give_equal_bytes(done, tmp_path):
    folder, _, _ = done
    values = {"output": str(tmp_path / "sparse")}
    toy_run(folder, **values)
    assert file_bytes(tmp_path / "sparse") == file_bytes(folder / "sparse")
    assert comparable(tmp_path / "sparse") == comparable(folder / "sparse")


def test_another_seed_gives_another_result(done, tmp_path):
    folder, _, _ = done
    toy_run(folder, output=str(tmp_path / "sparse"), seed=20_250_101, steps=1)
    assert record_of(tmp_path / "sparse")["perplexity"] != record_of(folder / "sparse")["perplexity"]


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_every_pruner_and_pattern(done, tmp_path, pruner, pattern):
    folder, _, _ = done
    look, output = Look(tmp_path / "sparse"), tmp_path / "sparse"
    sparsity = 0.6 if pattern == "unstructured" else None
    toy_run(folder, callbacks=(look,), output=str(output), steps=2, pruner=pruner, pattern=pattern, sparsity=sparsity)
    file, record = tensors(output), record_of(output)
    for name in pruned_names(output):
        weight, keep = file[name], look.masks[-1][name.removesuffix(".weight")]
        assert torch.equal(weight != 0, keep)
        assert not (keep & ~look.masks[0][name.removesuffix(".weight")]).any()
        if pattern == "unstructured":
            assert int((weight == 0).sum()) == round(weight.numel() * record["steps"][-1]["rates"][int(name.split(".")[2])])
        else:
            n, m = map(int, pattern.split(":"))
            assert ((weight.view(weight.shape[0], -1, m) != 0).sum(2) == n).all()
    assert record["sparsity"]["achieved"] == pytest.approx(sparsity or 0.5, abs=1e-3 if sparsity else 1e-12)
    assert record["perplexity"]["losa"] < record["perplexity"]["pruned"]


def test_one_shot_baseline_of_the_reviewers(done, tmp_path):
    """One step, uniform rates, uniform ranks: Wanda and masked LoRA."""
    folder, _, _ = done
    output = tmp_path / "sparse"
    toy_run(folder, output=str(output), steps=1, rate_band=0.0, adapter={"allocation": "uniform"})
    (step,) = record_of(output)["steps"]
    assert (step["target"], step["rates"], step["ranks"]) == (0.6, [0.6, 0.6], [10, 10])
    assert step["importance"] is None
    file = tensors(output)
    for name in pruned_names(output):
        assert int((file[name] == 0).sum()) == round(0.6 * file[name].numel())


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_prune_changes_survivors_only_if_the_solver_does(done, tmp_path, pruner):
    folder, _, _ = done
    output = tmp_path / "pruned"
    config = toy_config(folder, output=str(output), pruner=pruner, rate_band=0.0)
    model = prune(*load(config), config)
    source, result, record = tensors(folder / "model"), tensors(output), record_of(output)
    for name in pruned_names(output):
        kept = result[name] != 0
        assert int((~kept).sum()) == round(0.6 * kept.numel())
        assert torch.equal(source[name][kept], result[name][kept]) == (pruner in ("magnitude", "wanda"))
    assert record["kind"] == "prune"
    assert list(record["perplexity"]) == ["dense", "pruned"]
    assert "one-shot pruning" in (output / "README.md").read_text()
    assert model.losa_record["sparsity"] == record["sparsity"]


def test_prune_is_the_baseline_of_a_run(done):
    folder, _, _ = done
    config = toy_config(folder, output=None, rate_band=0.0, train={"data": None}, calibration={"data": str(folder / "text.txt")})
    found = prune(*load(config), config).losa_record["perplexity"]
    assert {name: record_of(folder / "sparse")["perplexity"][name] for name in found} == found


def test_without_output_nothing_is_written(done, tmp_path, monkeypatch):
    folder, model, _ = done
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = sorted(folder.rglob("*"))
    in_memory = toy_run(folder, output=None)
    assert list(here.iterdir()) == []
    assert sorted(folder.rglob("*")) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, in_memory.state_dict()[name])
    assert in_memory.losa_record["perplexity"] == model.losa_record["perplexity"]


def test_model_made_in_memory_can_be_saved(done, tmp_path, monkeypatch):
    """A configuration without `model`, as `losa doctor` uses it."""
    folder, _, _ = done
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load(toy_config(folder))
    run(model, tokenizer, toy_config(folder, model="", output=str(tmp_path / "sparse"), steps=1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def test_float16_is_not_trained_in(tmp_path):
    folder = set_up(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match="gradients underflow in float16"):
        toy_run(folder, dtype="float16")


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_half_precision_base_is_trained_and_saved_in_bfloat16(tmp_path, source):
    folder, dtype = set_up(tmp_path, dtype=source), torch.bfloat16
    look = Look(folder / "sparse")
    toy_run(folder, callbacks=(look,), steps=2)
    file = tensors(folder / "sparse")
    assert {value.dtype for value in file.values()} == {dtype}
    for name, keep in look.masks[-1].items():
        pruned = file[f"{name}.weight"][~keep]
        assert not pruned.view(torch.uint8).any()
    assert record_of(folder / "sparse")["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-3)


def test_tied_embeddings_stay_tied(tmp_path):
    folder = set_up(tmp_path, tie_word_embeddings=True)
    model = toy_run(folder, steps=2)
    assert "lm_head.weight" not in tensors(folder / "sparse")
    reopened = AutoModelForCausalLM.from_pretrained(folder / "sparse")
    assert reopened.lm_head.weight is reopened.model.embed_tokens.weight
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(reopened(input_ids=ids).logits, model(input_ids=ids).logits)


def test_biases_come_along(tmp_path):
    folder = set_up(tmp_path, attention_bias=True)
    source = tensors(folder / "model")
    for name in source:
        if name.endswith("bias"):
            source[name] = torch.linspace(-1, 1, source[name].numel())
    save_file(source, folder / "model" / "model.safetensors", {"format": "pt"})
    toy_run(folder, steps=1)
    result = tensors(folder / "sparse")
    assert sum(name.endswith("bias") for name in result) == 8
    assert all(torch.equal(source[name], result[name]) for name in result if name.endswith("bias"))


def test_offloaded_run_is_the_same_run(done):
    folder, model, _ = done
    offloaded = toy_run(folder, output=None, offload=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, offloaded.state_dict()[name])


def test_result_is_sharded_like_the_source(tmp_path):
    folder = set_up(tmp_path, shard="40KB")
    shards = len(list((folder / "model").glob("*.safetensors")))
    assert shards >= 3
    toy_run(folder, steps=1)
    assert abs(len(list((folder / "sparse").glob("*.safetensors"))) - shards) <= 1
    assert (folder / "sparse" / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(folder / "sparse")


def test_a_second_run_replaces_the_first_whole(tmp_path):
    """No shard of the earlier result survives beside the new one."""
    folder = set_up(tmp_path, shard="40KB")
    toy_run(folder, steps=1)
    assert len(list((folder / "sparse").glob("*.safetensors"))) > 1
    save_toy(tmp_path / "other")
    toy_run(folder, steps=1, model=str(tmp_path / "other"), overwrite=True)
    assert [path.name for path in (folder / "sparse").glob("*.safetensors*")] == ["model.safetensors"]
    assert record_of(folder / "sparse")["config"]["model"] == str(tmp_path / "other")


def test_output_that_is_the_model_is_refused(done):
    folder, _, _ = done
    before = file_bytes(folder / "model")
    for output in (str(folder / "model"), str(folder / "sparse" / ".." / "model")):
        with pytest.raises(ValueError, match="is the model itself; choose another directory"):
            toy_run(folder, output=output)
    assert file_bytes(folder / "model") == before


def test_output_with_files_of_others_is_refused(done, tmp_path):
    folder, _, _ = done
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and not an earlier run"):
        toy_run(folder, output=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_output_that_is_a_file_is_refused(done, tmp_path):
    folder, _, _ = done
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is a file; choose another directory"):
        toy_run(folder, output=str(tmp_path / "file"))


def test_empty_output_directory_is_fine(done, tmp_path):
    folder, _, _ = done
    (tmp_path / "sparse").mkdir()
    toy_run(folder, output=str(tmp_path / "sparse"), steps=1)
    assert (tmp_path / "sparse" / "config.json").exists()


def test_pattern_that_does_not_divide_is_refused_at_once(tmp_path):
    folder = set_up(tmp_path, intermediate_size=66)
    with pytest.raises(ValueError, match=r"down_proj has 66 inputs, not a multiple of 4; pattern 2:4 cannot be applied"):
        toy_run(folder, pattern="2:4", sparsity=None)
    assert not (folder / "sparse").exists()


@pytest.mark.parametrize("train", [{"data": None}, {"data": "nowhere.txt"}, {"length": 65}])
def test_bad_requests_leave_nothing_behind(done, tmp_path, train):
    folder, _, _ = done
    with pytest.raises(ValueError, match=r"--data|nowhere\.txt|train\.length is 65"):
        toy_run(folder, output=str(tmp_path / "sparse"), train=train)
    assert not (tmp_path / "sparse").exists()


def test_documents_can_be_samples(done, tmp_path):
    """The released recipe: padded documents of their own lengths, not packed."""
    folder, _, _ = done
    (tmp_path / "data").mkdir()
    for number in range(60):
        save_text(tmp_path / "data" / f"{number:02d}.txt", 20 + 3 * number, seed=number)
    train = {"data": str(tmp_path / "data"), "samples": 50}
    model = toy_run(folder, output=None, train=train, steps=2, eval={"data": str(folder / "text.txt")})
    found = model.losa_record["perplexity"]
    assert found["losa"] < found["pruned"]


def test_a_model_pruned_in_memory_keeps_its_zeros_through_a_run(tmp_path):
    folder = set_up(tmp_path)
    config = toy_config(folder, output=None, sparsity=0.5, rate_band=0.0, steps=1)
    model = prune(*load(config), config)
    before = model.losa_masks
    config = toy_config(folder, output=None, steps=2)
    after = run(model, load(config)[1], config).losa_masks
    for name, keep in before.items():
        assert not (after[name] & ~keep).any()
        assert not model.get_parameter(name)[~keep].any()


def test_offload_gives_the_same_model(done, tmp_path):
    folder, _, _ = done
    toy_run(folder, output=str(tmp_path / "sparse"), offload=True)
    expected = tensors(folder / "sparse")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(tmp_path / "sparse").items())
    assert record_of(tmp_path / "sparse")["perplexity"] == pytest.approx(record_of(folder / "sparse")["perplexity"], rel=1e-6)


def planted(tmp_path, change) -> tuple[Path, dict[str, torch.Tensor]]:
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[1, 2:5] = False
    weight = torch.ones(4, 6, dtype=torch.bfloat16).masked_fill(~keep, 0.0)
    file = {"a.weight": weight, "b.weight": torch.ones(3)}
    change(file)
    save_file(file, tmp_path / "model.safetensors")
    return tmp_path, {"a.weight": keep}


def test_verify_accepts_true_zeros(tmp_path):
    verify_zeros(*planted(tmp_path, lambda file: None))


def test_verify_accepts_a_layer_that_lost_nothing(tmp_path):
    directory, masks = planted(tmp_path, lambda file: None)
    verify_zeros(directory, masks | {"b.weight": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize("value", [1e-30, -0.0, float("nan")])
def test_verify_finds_one_planted_value(tmp_path, value):
    def plant(file) -> None:
        file["a.weight"][1, 3] = value

    with pytest.raises(RuntimeError, match=r"a\.weight in model\.safetensors: 1 pruned weights are not zero"):
        verify_zeros(*planted(tmp_path, plant))


def test_verify_finds_a_missing_tensor(tmp_path):
    with pytest.raises(RuntimeError, match=r"lacks a\.weight"):
        verify_zeros(*planted(tmp_path, lambda file: file.pop("a.weight")))


def test_verify_reads_every_shard(tmp_path):
    directory, masks = planted(tmp_path, lambda file: None)
    save_file({"c.weight": torch.ones(2, 2)}, directory / "model-2.safetensors")
    with pytest.raises(RuntimeError, match=r"c\.weight"):
        verify_zeros(directory, masks | {"c.weight": torch.zeros(2, 2, dtype=torch.bool)})


def test_result_that_fails_verification_is_never_put_in_place(done, tmp_path, monkeypatch):
    folder, _, _ = done
    output = tmp_path / "sparse"
    save = type(load(toy_config(folder))[0]).save_pretrained

    def damage(self, directory, **kwargs) -> None:
        save(self, directory, **kwargs)
        path = Path(directory) / "model.safetensors"
        file = load_file(path)
        file["model.layers.1.mlp.up_proj.weight"][file["model.layers.1.mlp.up_proj.weight"] == 0] += 1e-8
        save_file(file, path, {"format": "pt"})

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", damage)
    with pytest.raises(RuntimeError, match="pruned weights are not zero; the result is void"):
        toy_run(folder, output=str(output), steps=1)
    assert not (output / "config.json").exists()
    assert not (output / "losa.json").exists()


@pytest.mark.parametrize("where", ["model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dense_model_that_says_nothing_is_refused(tmp_path, where, value):
    """NaN outside of the layers that are pruned."""
    folder = set_up(tmp_path)
    config = toy_config(folder, steps=1)
    for make in (run, prune):
        model, tokenizer = load(config)
        model.get_parameter(where).data[0] = value
        with pytest.raises(ValueError, match=r"the dense model's perplexity is (nan|inf): its weights or their dtype"):
            make(model, tokenizer, config)
        assert not (folder / "sparse").exists()


def test_a_result_that_says_nothing_is_not_saved(done, tmp_path, monkeypatch):
    folder, _, _ = done
    values = iter([40.0, math.nan])
    monkeypatch.setattr("losa.session.session.perplexity", lambda *_, **__: next(values))
    config = toy_config(folder, output=str(tmp_path / "sparse"), calibration={"data": str(folder / "text.txt")})
    with pytest.raises(FloatingPointError, match=r"perplexity is nan \(pruned\), a finite number when dense"):
        prune(*load(config), config)
    assert not (tmp_path / "sparse").exists()


def test_json_holds_no_nan():
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"losa\.json would hold a number that is not finite"):
            to_json({"steps": [{"errors": [1.0, value]}]}, "losa.json")


def test_record_of_a_directory_without_one(tmp_path):
    with pytest.raises(ValueError, match=r"has no losa\.json; it is not a finished LoSA run"):
        read_record(tmp_path)


def test_movement_prunes_by_what_training_told(tmp_path):
    set_up(tmp_path)
    moved = toy_run(tmp_path, pruner="movement", output=None).losa_record
    by_size = toy_run(tmp_path, pruner="magnitude", output=None).losa_record
    assert moved["perplexity"]["pruned"] == by_size["perplexity"]["pruned"]  # nothing was trained yet
    assert moved["steps"][0] == by_size["steps"][0]
    assert moved["steps"][1]["errors"] != by_size["steps"][1]["errors"]
    assert moved["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize("changes", [{"steps": 1}, {"shard": True}, {"offload": True}])
def test_movement_without_training_to_come_is_refused(tmp_path, changes):
    set_up(tmp_path)
    with pytest.raises(ValueError, match="pruner is 'movement'"):
        toy_run(tmp_path, pruner="movement", **changes)
    config = toy_config(tmp_path, pruner="movement")
    with pytest.raises(ValueError, match="pruner is 'movement'"):
        prune(*load(config), config)


def test_a_model_that_is_sparse_already_is_noticed(tmp_path, caplog):
    model = toy_run(set_up(tmp_path), output=None)
    caplog.clear()
    config = toy_config(tmp_path, output=None)
    prune(model, load(config)[1], config)
    assert "zeros already" in caplog.text


def test_protected_blocks_stay_dense(tmp_path):
    set_up(tmp_path)
    model = toy_run(tmp_path, protect=[1], sparsity=0.4, output=None)
    for name, keep in model.losa_masks.items():
        assert keep.all() == (".layers.1." in name)
    assert model.losa_record["sparsity"]["achieved"] == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protect": [2]}, "expected block numbers below 2"),
        ({"protect": [-1]}, "expected block numbers, 0 being the first"),
        ({"protect": [0], "sparsity": 0.6}, "target is 0.6, expected less than 0.5"),
        ({"protect": [0], "pattern": "2:4", "sparsity": None}, "2:4 fixes all rates"),
    ],
)
def test_protection_that_cannot_be_is_refused(tmp_path, changes, message):
    set_up(tmp_path)
    with pytest.raises(ValueError, match=message):
        toy_run(tmp_path, **changes)


def test_importance_by_depth_prunes_late_blocks_more(tmp_path):
    set_up(tmp_path, num_hidden_layers=3)
    record = toy_run(tmp_path, rates="depth", rate_band=0.1, output=None).losa_record
    for step in record["steps"]:
        assert step["rates"] == sorted(step["rates"]) and step["rates"][0] < step["rates"][-1]
    with pytest.raises(ValueError, match="rates is 'width', expected one of rmi, depth, uniform, owl, dlp, error"):
        toy_config(tmp_path, rates="width")


def test_samples_before_and_after_are_in_the_record_and_on_the_card(done):
    folder, _, _ = done
    found = record_of(folder / "sparse")["samples"]
    assert list(found) == ["prompt", "dense", "pruned", "losa"]
    model, tokenizer = load(str(folder / "sparse"))
    _, ids = opening(tokenizer, 64)
    assert answer(model, tokenizer, ids) == found["losa"]
    card = (folder / "sparse" / "README.md").read_text()
    assert "## Samples" in card and found["prompt"] in card
    assert "llama.cpp" in card and "vLLM" in card
