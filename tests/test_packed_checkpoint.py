"""Packed checkpoints: there and back again, through every door that opens a model, and every way a file can be damaged."""

import json
import math
import pickle
import random
import shutil
import struct
from copy import deepcopy

import pytest
import torch
from conftest import FAMILIES, make_tiny_model
from helpers import tensors
from packing import LAYER, change_header, change_tensors, make_sparse, same
from processes import call, open_without_losa
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

import losa
from losa import SparseConfig, SparseLinear
from losa.commands.inspect import inspect
from losa.commands.toy import toy_tokenizer
from losa.evaluation.perplexity import perplexity
from losa.integrations.transformers import SparseQuantizer
from losa.models import find_decoder
from losa.runtime import dispatch
from losa.runtime.bench import weight_bytes
from losa.runtime.card import IMPORT
from losa.runtime.files import pack_checkpoint, unpack_checkpoint
from losa.runtime.generate import generate
from losa.runtime.values import HEADS, TYPES

IDS = torch.arange(1, 41).view(2, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_packed_and_unpacks_bitwise(family, tmp_path):
    sparse = make_sparse(family, tmp_path / "sparse", shards=True)
    result = pack_checkpoint(tmp_path / "sparse", tmp_path / "packed")
    assert result["layers"] == len(find_decoder(sparse).linears())
    assert result["sparsity"] == pytest.approx(0.7, abs=0.05)
    assert unpack_checkpoint(tmp_path / "packed", tmp_path / "again") == result["layers"]
    assert same(tensors(tmp_path / "sparse"), tensors(tmp_path / "again"))
    packed, _ = losa.load(tmp_path / "packed")
    dense, _ = losa.load(tmp_path / "again")
    assert sum(isinstance(module, SparseLinear) for module in packed.modules()) == result["layers"]
    exact = make_exact(dense)
    with torch.no_grad():
        want, ours, torchs = exact(IDS).logits, packed(IDS).logits, dense(IDS).logits
    assert (ours - want).abs().max() <= 2 * (torchs - want).abs().max()


def make_exact(model):
    """The same model in float64."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.double().eval()


def test_sizes_are_what_the_format_says(tmp_path):
    model = make_tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32).bfloat16()
    for linear in find_decoder(model).linears().values():
        linear.weight.data[torch.rand(linear.weight.shape) < 0.7] = 0
    model.save_pretrained(tmp_path / "sparse")
    shapes = [linear.weight.shape for linear in find_decoder(model).linears().values()]
    weights, rows = sum(shape.numel() for shape in shapes), sum(shape[0] for shape in shapes)
    for values, size, scales in (("bfloat16", 2, 0), ("int8", 1, 4 * rows), ("int4", 0.5, 4 * rows + weights // 64)):
        result = pack_checkpoint(tmp_path / "sparse", tmp_path / values, values)
        stored = round(weights * (1 - result["sparsity"]))
        offsets = 8 * sum(shape[0] // 16 + 1 for shape in shapes)
        halves = len(shapes) / 2 if values == "int4" else 0  # an odd number of values fills up its last byte
        assert result["packed_bytes"] == pytest.approx(weights // 8 + size * stored + scales + offsets, abs=halves)
        assert result["dense_bytes"] == 2 * weights


def test_int8_is_close_and_smaller(llama):
    sparse, _ = losa.load(llama / "sparse")
    small, _ = losa.load(llama / "int8")
    with torch.no_grad():
        want, found = sparse(IDS).logits.float(), small(IDS).logits.float()
    assert (found - want).norm() / want.norm() < 0.02
    smaller, _ = losa.load(llama / "int4")
    with torch.no_grad():
        assert (smaller(IDS).logits.float() - want).norm() / want.norm() < 0.2
    assert weight_bytes(smaller) < weight_bytes(small) < weight_bytes(losa.load(llama / "packed")[0]) < weight_bytes(sparse)


@pytest.mark.parametrize("values", [name for name, kind in TYPES.items() if kind.rounds])
def test_rounding_activations_is_allowed_to_the_blocks(llama, tmp_path, values):
    """By the header, on disk or while a checkpoint is opened; the weights stay what they are."""
    pack_checkpoint(llama / "sparse", tmp_path / "packed", values, activations="int8")
    opened, _ = losa.load(tmp_path / "packed")
    made = AutoModelForCausalLM.from_pretrained(llama / "sparse", quantization_config=SparseConfig(values, activations="int8"))
    kernel = dispatch.choose(activations="int8")
    for model in (opened, made):
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
        assert {layer.kernel for name, layer in layers.items() if name != "lm_head"} == {kernel}
        assert layers["lm_head"].kernel == dispatch.choose()
    made.save_pretrained(tmp_path / "saved")
    stored = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("packed", "saved")]
    assert [found["activations"] for found in stored] == ["int8", "int8"]
    exact, _ = losa.load(llama / values)
    assert same(tensors(tmp_path / "packed"), tensors(llama / values))
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, exact(IDS).logits)  # of many tokens none is rounded
        found, want = opened(IDS[:1, :1]).logits.float(), exact(IDS[:1, :1]).logits.float()
    assert (found - want).norm() / want.norm() < 0.05
    assert unpack_checkpoint(tmp_path / "packed", tmp_path / "again") > 0
    with pytest.raises(ValueError, match="activations are int8 with bfloat16 values, expected int8 or int4 values"):
        pack_checkpoint(llama / "sparse", tmp_path / "never", activations="int8")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["int8", "int4"])
def test_the_head_is_packed_and_comes_back(tmp_path, tied, head):
    sparse = make_sparse("llama", tmp_path / "sparse", tie_word_embeddings=tied)
    result = pack_checkpoint(tmp_path / "sparse", tmp_path / "packed", head=head)
    assert (result["head"], result["head_bytes"] > 0) == (head, True)
    packed, _ = losa.load(tmp_path / "packed")
    assert isinstance(packed.lm_head, SparseLinear)
    assert packed.lm_head.values.name == head
    assert torch.equal(packed.get_input_embeddings().weight, sparse.get_input_embeddings().weight)
    with torch.no_grad():
        exactly = torch.nn.functional.linear(packed.model(IDS).last_hidden_state, packed.lm_head.to_linear().weight)
        found, want = packed(IDS).logits, sparse(IDS).logits
    torch.testing.assert_close(found, exactly, rtol=0.02, atol=0.02)
    assert (found.float() - want.float()).norm() / want.float().norm() < (0.02 if head == "int8" else 0.2)
    assert len(inspect(tmp_path / "packed")) == result["layers"]
    packed.save_pretrained(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(tmp_path / "packed"))
    assert unpack_checkpoint(tmp_path / "packed", tmp_path / "again") == result["layers"]
    dense, _ = losa.load(tmp_path / "again")
    assert dense.config.tie_word_embeddings == tied
    before, after = tensors(tmp_path / "sparse"), tensors(tmp_path / "again")
    rounded = {"lm_head.weight"} - ({"lm_head.weight"} if tied else set())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - rounded)
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, want if tied else found, rtol=0.02, atol=0.02)


def test_a_head_that_the_files_call_something_else_stays_dense(tmp_path):
    sparse = make_sparse("gpt_neox", tmp_path / "sparse")
    result = pack_checkpoint(tmp_path / "sparse", tmp_path / "packed", "int8")
    assert (result["head"], result["head_bytes"]) == ("keep", 0)
    packed, _ = losa.load(tmp_path / "packed")
    with torch.no_grad():
        found, want = packed(IDS).logits.float(), sparse(IDS).logits.float()
    assert (found - want).norm() / want.norm() < 0.05
    with pytest.raises(ValueError, match="no linear output head that losa can pack; use --head keep"):
        pack_checkpoint(tmp_path / "sparse", tmp_path / "other", "int8", head="int8")


def test_which_head_is_packed_when_nobody_says(llama):
    for values, head in (("bfloat16", "keep"), ("int8", "int8"), ("int4", "int8")):
        assert SparseConfig(values).head == head
        assert SparseConfig(values, layers={"x": 1}).head == "keep"  # a header that does not speak of it
        assert SparseConfig(values, head="keep").head == "keep"
    assert "head" not in SparseConfig().to_dict()
    with pytest.raises(ValueError, match=f"values of the head are 'bfloat16', expected one of {', '.join(HEADS)}, keep"):
        SparseConfig(head="bfloat16")
    model, _ = losa.load(llama / "int4")
    assert model.lm_head.values.name == "int8"


def test_from_pretrained_packs_a_sparse_checkpoint_and_saves_it(llama, tmp_path):
    for values, packed in (("bfloat16", "packed"), ("int8", "int8"), ("int4", "int4")):
        model = AutoModelForCausalLM.from_pretrained(llama / "sparse", quantization_config=SparseConfig(values))
        wanted, _ = losa.load(llama / packed)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, wanted(IDS).logits)
        model.save_pretrained(tmp_path / packed)
        assert same(tensors(tmp_path / packed), tensors(llama / packed))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / packed)
        with torch.no_grad():
            assert torch.equal(again(IDS).logits, wanted(IDS).logits)


def test_generate_pipeline_perplexity_and_eval(llama, monkeypatch, capsys):
    sparse, tokenizer = losa.load(llama / "sparse")
    packed, _ = losa.load(llama / "packed")
    pieces = []
    first = generate(sparse, tokenizer, "THE OLD MAN", pieces.append, 12)
    second = generate(packed, tokenizer, "THE OLD MAN", lambda piece: None, 12)
    assert first.text == second.text == "".join(pieces)
    assert first.tokens == 12
    text = pipeline("text-generation", model=packed, tokenizer=tokenizer)("THE", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("THE")
    ids = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))
    assert perplexity(packed, ids) == pytest.approx(perplexity(sparse, ids), rel=1e-3)
    with pytest.raises(ValueError, match="found 0 characters"):
        generate(packed, tokenizer, "", pieces.append)


def test_float32_weights_are_rounded_once(tmp_path):
    model = make_tiny_model("llama")
    model.save_pretrained(tmp_path / "float32")
    toy_tokenizer().save_pretrained(tmp_path / "float32")
    pack_checkpoint(tmp_path / "float32", tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    found = tensors(tmp_path / "again")
    for name, linear in find_decoder(model).linears().items():
        assert torch.equal(found[f"{name}.weight"], linear.weight.data.bfloat16())
    assert losa.load(tmp_path / "packed")[0].dtype == torch.bfloat16


def test_plain_transformers_fails_loudly(llama, tmp_path):
    """Without losa, a packed directory must never open as a model with random weights."""
    assert call(tmp_path / "log", open_without_losa, str(llama / "packed"), "", "") != 0
    log = (tmp_path / "log").read_text()
    assert "size" in log
    assert "mismatch" in log
    assert "Unknown quantization type, got losa" in log


def test_the_model_card_says_how_it_opens(tmp_path):
    make_sparse("llama", tmp_path / "sparse")
    (tmp_path / "sparse" / "README.md").write_text("# A model\n")
    pack_checkpoint(tmp_path / "sparse", tmp_path / "packed")
    assert 'losa.load("packed")' in (tmp_path / "packed" / "README.md").read_text()
    assert "After `import losa`, transformers' own" in (tmp_path / "packed" / "README.md").read_text()
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "# A model\n"


def test_a_packed_checkpoint_without_a_card_gets_one(llama, tmp_path):
    assert 'losa.load("packed")' in (llama / "packed" / "README.md").read_text()
    assert not (llama / "sparse" / "README.md").exists()
    unpack_checkpoint(llama / "packed", tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()


def test_training_and_pruning_a_packed_model_is_refused(llama):
    packed, tokenizer = losa.load(llama / "packed")
    with pytest.raises(ValueError, match="load the original checkpoint"):
        losa.prune(packed, tokenizer, losa.LosaConfig.from_dict({"output": "x", "calibration": {"data": "x"}}))


def test_a_gradient_is_refused_and_not_made_up(llama):
    model, _ = losa.load(llama / "packed")
    logits = model(IDS).logits  # embeddings may want gradients; as long as nobody asks for them, all is well
    with pytest.raises(RuntimeError, match="packed layers have no gradient"):
        logits.sum().backward()


def test_generating_ends_with_the_window(llama):
    model, tokenizer = losa.load(llama / "packed")
    assert generate(model, tokenizer, "THE", lambda _: None, tokens=1000).tokens <= 61
    with pytest.raises(ValueError, match=r"the prompt has 64 tokens, the model's window 64"):
        generate(model, tokenizer, "A" * 64, lambda _: None)


@pytest.mark.parametrize("name", ["packed", "sparse"])
def test_offloading_is_refused(llama, tmp_path, name):
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    config = {} if name == "packed" else {"quantization_config": SparseConfig()}
    with pytest.raises(ValueError, match="packed layers are not offloaded"):
        AutoModelForCausalLM.from_pretrained(llama / name, device_map=places, offload_folder=tmp_path, **config)


@pytest.mark.parametrize("name", ["packed", "sparse"])
def test_a_transformers_that_does_not_ask_the_type_is_found_out(llama, monkeypatch, name):
    monkeypatch.setattr(SparseQuantizer, "update_dtype", lambda self, dtype: dtype)  # before 5.17 its answer is dropped
    config = {} if name == "packed" else {"quantization_config": SparseConfig()}
    with pytest.raises(ValueError, match=r"opens the model in torch.float32.*pass dtype=torch.bfloat16"):
        AutoModelForCausalLM.from_pretrained(llama / name, dtype=torch.float32, **config)


def test_output_must_not_exist_and_source_must_be_a_checkpoint(llama, tmp_path):
    with pytest.raises(ValueError, match="exists; choose another"):
        pack_checkpoint(llama / "sparse", llama / "packed")
    with pytest.raises(ValueError, match="is not a directory"):
        pack_checkpoint(tmp_path / "nothing", tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed already"):
        pack_checkpoint(llama / "packed", tmp_path / "twice")
    with pytest.raises(ValueError, match="is not packed"):
        unpack_checkpoint(llama / "sparse", tmp_path / "again")
    with pytest.raises(ValueError, match="packed values are 'int3'"):
        pack_checkpoint(llama / "sparse", tmp_path / "packed", "int3")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_pack_leaves_nothing(llama, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("losa.runtime.files._finish", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(llama / "sparse", tmp_path / "packed")
    assert not list(tmp_path.iterdir())


# ---- damage -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(llama, tmp_path):
    shutil.copytree(llama / "packed", tmp_path / "copy")
    return tmp_path / "copy"


def both_doors_refuse(directory, message: str):
    with pytest.raises(ValueError, match=message):
        losa.load(directory)
    with pytest.raises(ValueError, match=message):
        unpack_checkpoint(directory, directory.parent / "again")
    assert not (directory.parent / "again").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "int3"}, "values of the head are 'int3'"),
        ({"head": "int8", "tied": 1}, "tied is 1"),
        ({"activations": "int3"}, "activations are 'int3', expected one of bfloat16, int8"),
        ({"activations": 8}, "activations are 8, expected"),
        ({"version": 2}, "packed format 2, expected 1"),
        ({"version": "1"}, "packed format '1', expected 1"),
        ({"values": "int3"}, "packed values are 'int3'"),
        ({"extra": 1}, "unknown keys in the packed header: extra"),
        ({"layers": [1]}, "layers is a list"),
        ({"layers": {LAYER: -1}}, "claims -1 stored values"),
        ({"layers": {LAYER: 1.5}}, r"claims 1\.5 stored values"),
        ({"layers": {LAYER: True}}, "claims True stored values"),
        ({"layers": {"model.norm": 3}}, "model.norm"),
        ({"layers": {"../../etc": 3}}, "etc"),
    ],
)
def test_a_header_that_cannot_be_believed(copy, changes, message):
    change_header(copy, **changes)
    both_doors_refuse(copy, message)


def test_a_header_that_claims_too_much_allocates_nothing(copy):
    change_header(copy, layers={LAYER: 10**15})
    with pytest.raises(ValueError, match="more than its 1536 weights"):
        losa.load(copy)


def test_a_header_that_counts_one_value_less_in_the_same_byte(llama, tmp_path):
    shutil.copytree(llama / "int4", tmp_path / "copy")
    layers = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]["layers"]
    name = next(name for name, count in layers.items() if count % 2 == 0 and name != "lm_head")  # which is int8
    change_header(tmp_path / "copy", layers=layers | {name: layers[name] - 1})
    both_doors_refuse(tmp_path / "copy", f"the header claims {layers[name] - 1} stored values, the masks mark {layers[name]}")


def _drop(key):
    return lambda found: found.pop(key)


def _replace(key, value):
    return lambda found: found.__setitem__(key, value(found[key]))


@pytest.mark.parametrize("part", ["weight", "weight_mask", "weight_offsets"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("missing", lambda tensor: None),
        ("short", lambda tensor: tensor[:-1].clone()),
        ("long", lambda tensor: torch.cat([tensor, tensor[:1]])),
        ("other type", lambda tensor: tensor.to(torch.float32)),
        ("empty", lambda tensor: tensor[:0].clone()),
    ],
)
def test_tensors_that_do_not_fit_the_header(copy, part, name, change):
    key = f"{LAYER}.{part}"

    def damage(found):
        changed = change(found.pop(key))
        if changed is not None:
            found[key] = changed

    change_tensors(copy, damage)
    both_doors_refuse(copy, LAYER)


def test_masks_that_disagree_with_offsets_and_values(copy):
    change_tensors(copy, _replace(f"{LAYER}.weight_mask", lambda mask: mask ^ 1))
    both_doors_refuse(copy, "the offsets do not count the bits of the masks")


@pytest.mark.parametrize(("values", "part"), [("int8", "scale"), ("int4", "scale"), ("int4", "groups")])
def test_a_missing_scale(llama, tmp_path, values, part):
    shutil.copytree(llama / values, tmp_path / "copy")
    change_tensors(tmp_path / "copy", _drop(f"{LAYER}.weight_{part}"))
    both_doors_refuse(tmp_path / "copy", LAYER)


def test_truncated_files(copy):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        both_doors_refuse(copy, "damaged|cannot open")
    file.unlink()
    both_doors_refuse(copy, "cannot open|no .safetensors")


def test_wrong_method_is_refused_by_us_and_not_mistaken_by_transformers(copy):
    change_header(copy, quant_method="other")
    with pytest.raises((ValueError, RuntimeError)):
        losa.load(copy)
    with pytest.raises(ValueError, match="is not packed"):
        unpack_checkpoint(copy, copy.parent / "again")


@pytest.mark.parametrize("values", ["packed", "int4"])
def test_fuzzed_files_are_refused_or_open_unchanged(llama, tmp_path, values):
    """Any byte of the safetensors header or of masks and offsets changed: an error, or a model that still runs."""
    generator = random.Random(0)
    copy = shutil.copytree(llama / values, tmp_path / "copy")
    file = copy / "model.safetensors"
    whole = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", whole[:8])
    opened = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4])):
            damaged[generator.randrange(8 + header if generator.random() < 0.5 else len(damaged))] = generator.randrange(256)
        file.write_bytes(damaged)
        try:
            model, _ = losa.load(copy)
        except (ValueError, RuntimeError):
            continue
        opened += 1
        with torch.no_grad():
            assert model(IDS[:, :4]).logits.shape == (2, 4, 64)  # a changed value is not noticed, and harms nobody
    assert opened < 60


def test_fuzzed_configs_are_refused_or_open(copy):
    generator = random.Random(1)
    text = (copy / "config.json").read_text()
    start = text.index("quantization_config")
    for _ in range(40):
        place = generator.randrange(start, len(text))
        (copy / "config.json").write_text(text[:place] + generator.choice('0{}[]",:-x9') + text[place + 1 :])
        try:
            model, _ = losa.load(copy)
        except (ValueError, RuntimeError):
            continue
        assert all(math.isfinite(value) for value in model(IDS[:1, :4]).logits.flatten().tolist())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_weights_that_are_not_finite_are_not_packed(tmp_path, value, values):
    make_sparse("llama", tmp_path / "sparse")
    change_tensors(tmp_path / "sparse", lambda found: found[f"{LAYER}.weight"].view(-1)[:1].fill_(value))
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight holds NaN or infinity in bfloat16; the checkpoint is damaged"):
        pack_checkpoint(tmp_path / "sparse", tmp_path / "packed", values)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("name", ["packed", "int8"])
def test_a_packed_model_and_its_state_can_be_saved_by_torch(llama, name, tmp_path):
    model, _ = losa.load(llama / name)
    with torch.no_grad():
        expected = model(IDS).logits
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 2 * sum(file.stat().st_size for file in (llama / name).glob("*.safetensors"))
    again, _ = losa.load(llama / name)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)  # a file of our own
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)
        assert torch.equal(whole(IDS).logits, expected)


@pytest.mark.parametrize(("directory", "asked"), [("packed", "int8"), ("int8", "bfloat16")])
def test_other_values_than_the_packed_ones_are_refused(llama, directory, asked):
    with pytest.raises(ValueError, match=f"of {asked} values"):
        AutoModelForCausalLM.from_pretrained(llama / directory, quantization_config=SparseConfig(asked))


def test_a_configuration_can_be_copied_and_pickled():
    config = SparseConfig("int8", {"a": 3}, head="int4", tied=True, activations="int8")
    for again in (deepcopy(config), pickle.loads(pickle.dumps(config)), SparseConfig.from_dict(config.to_dict())):
        assert isinstance(again, SparseConfig)
        assert again.to_dict() == config.to_dict()


def test_dequantize_gives_the_dense_model(llama, tmp_path):
    packed, _ = losa.load(llama / "packed")
    packed.save_pretrained(tmp_path / "saved")  # which leaves the type of its weights in letters
    dense = packed.dequantize()
    expected, _ = losa.load(llama / "sparse")
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), expected.parameters(), strict=True))
    assert getattr(dense.config, "quantization_config", None) is None
    assert "generate" not in vars(dense) and "forward" not in vars(dense.model)
    assert torch.equal(dense.generate(IDS[:1, :8], max_new_tokens=4), expected.generate(IDS[:1, :8], max_new_tokens=4))


@pytest.mark.parametrize(
    ("family", "sizes", "found"),
    [("mamba", {}, "never calls its mixer.dt_proj"), ("mixtral", {"num_local_experts": 4}, "keeps fused experts")],
)
def test_opening_packs_what_pack_would_and_refuses_the_rest(family, sizes, found, tmp_path):
    make_tiny_model(family, **sizes).bfloat16().save_pretrained(tmp_path / "dense")
    toy_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=found):
        pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(ValueError, match=found):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=SparseConfig())


def test_the_card_opens_what_is_there_and_says_what_was_rounded(llama, tmp_path):
    shutil.copytree(llama / "sparse", tmp_path / "sparse")
    code = (
        '```python\n{}from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{}")\n```\n'
    )
    (tmp_path / "sparse" / "README.md").write_text(f"# sparse\n\n{code.format('', 'sparse')}\nPerplexity 7.\n")
    pack_checkpoint(tmp_path / "sparse", tmp_path / "packed")
    pack_checkpoint(tmp_path / "sparse", tmp_path / "int4", "int4")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    unpack_checkpoint(tmp_path / "int4", tmp_path / "rounded")
    pack_checkpoint(tmp_path / "rounded", tmp_path / "twice")
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("packed", "int4", "again", "rounded", "twice")}
    for name, card in cards.items():
        packed = name not in ("again", "rounded")
        assert code.format(IMPORT if packed else "", name) in card and card.count(IMPORT) == packed
        assert card.count("## Packed") == packed
        assert card.count("rounded the weights to int4") == (name in ("int4", "rounded", "twice"))
    assert cards["again"] == f"# sparse\n\n{code.format('', 'again')}\nPerplexity 7.\n"


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_a_model_without_its_head_opens(llama, tmp_path, values):
    pack_checkpoint(llama / "sparse", tmp_path / "packed", values)
    whole, inner = losa.load(tmp_path / "packed")[0], AutoModel.from_pretrained(tmp_path / "packed")
    packed = [[module for module in model.modules() if isinstance(module, SparseLinear)] for model in (inner, whole.model)]
    assert len(packed[0]) == len(packed[1]) > 0
    with torch.no_grad():
        assert torch.equal(inner(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    inner.save_pretrained(tmp_path / "inner")
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "inner")(IDS).last_hidden_state, inner(IDS).last_hidden_state)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_a_checkpoint_opens_with_another_head_or_none_and_again_after_saving(tmp_path, values, tied):
    make_sparse("llama", tmp_path / "sparse", tie_word_embeddings=tied)
    pack_checkpoint(tmp_path / "sparse", tmp_path / "packed", values)
    whole = losa.load(tmp_path / "packed")[0]
    with torch.no_grad():
        want = whole.model(IDS).last_hidden_state
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=3, pad_token_id=0)
    whole.model.save_pretrained(tmp_path / "part")
    AutoModel.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "inner")
    other.save_pretrained(tmp_path / "other")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other")
    inner = [AutoModel.from_pretrained(tmp_path / name) for name in ("part", "inner", "other")]
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "inner")
    with torch.no_grad():
        assert all(torch.equal(model(IDS).last_hidden_state, want) for model in (*inner, other.model, again.model, causal.model))
        assert other(IDS).logits.shape == (2, 3) and torch.equal(other(IDS).logits, again(IDS).logits)
        if tied:  # the embedding is the head
            torch.testing.assert_close(causal(IDS).logits, whole(IDS).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("values", ["packed", "int4"])
def test_parts_of_a_layer_may_be_in_several_files(llama, tmp_path, values):
    """As `save_pretrained` puts them; a part that is in none is missing."""
    losa.load(llama / values)[0].save_pretrained(tmp_path / "shards", max_shard_size=9)
    homes = {key: file for file in (tmp_path / "shards").glob("*.safetensors") for key in load_file(file)}
    assert homes[f"{LAYER}.weight"] != homes[f"{LAYER}.weight_offsets"]
    unpack_checkpoint(llama / values, tmp_path / "whole")
    unpack_checkpoint(tmp_path / "shards", tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(tmp_path / "whole"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    file = homes[f"{LAYER}.weight_offsets"]
    save_file({key: tensor for key, tensor in load_file(file).items() if key != f"{LAYER}.weight_offsets"}, file)
    with pytest.raises(ValueError, match=f"lacks a part of {LAYER}; it is damaged"):
        unpack_checkpoint(tmp_path / "shards", tmp_path / "damaged")


def test_an_old_name_of_the_dtype_does_not_stay_beside_the_new(llama, tmp_path):
    shutil.copytree(llama / "sparse", tmp_path / "sparse")
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    (tmp_path / "sparse" / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    pack_checkpoint(tmp_path / "sparse", tmp_path / "packed")
    packed = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert packed["dtype"] == "bfloat16" and "torch_dtype" not in packed


def test_all_chat_templates_go_along(llama, tmp_path):
    shutil.copytree(llama / "sparse", tmp_path / "sparse")
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(tmp_path / "sparse")
    pack_checkpoint(tmp_path / "sparse", tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    for name in ("packed", "again"):
        assert losa.load(tmp_path / name)[1].chat_template == tokenizer.chat_template


def test_half_is_refused_by_transformers(llama):
    model, _ = losa.load(llama / "packed")
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()
