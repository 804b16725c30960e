"""Promised: on a processor without 16-bit instructions models compute in float32 and are saved as they came, and no other tensor
than those that were widened changes."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_model
from helpers import Stop, StopAtStep, record_of, set_up, tensors, toy_config, toy_run
from transformers import AutoModelForCausalLM

from losa.config import LosaConfig
from losa.evaluation.checkpoint import evaluate_checkpoint, recorded_text
from losa.models import precision
from losa.models.precision import cast_, computing, computing_dtype, tensors_of
from losa.planning.plan import plan

pytestmark = pytest.mark.usefixtures("no_figures")

CPU = torch.device("cpu")


@pytest.fixture
def plain_processor(monkeypatch):
    """One without instructions for 16-bit floats."""
    monkeypatch.setattr(precision, "multiplies", lambda dtype, device: dtype not in precision.NARROW)


@pytest.mark.usefixtures("plain_processor")
def test_only_narrow_floats_that_nobody_asked_for_are_widened():
    assert computing_dtype(torch.bfloat16, CPU) == computing_dtype(torch.float16, CPU) == torch.float32
    assert computing_dtype(torch.float64, CPU) == torch.float64
    assert computing_dtype(torch.bfloat16, CPU, "bfloat16") == torch.bfloat16


def test_float16_is_asked_for_by_itself(monkeypatch):
    """Most processors that multiply bfloat16 have nothing for float16, and take a hundred times as long."""
    supported = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True, _is_mkldnn_fp16_supported=lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", supported)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert computing_dtype(torch.bfloat16, CPU) == torch.bfloat16
    assert computing_dtype(torch.float16, CPU) == torch.float32
    assert computing_dtype(torch.float16, torch.device("cuda")) == torch.float16


def test_a_gpu_and_a_processor_with_instructions_compute_in_what_is_stored(monkeypatch):
    assert computing_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(precision, "multiplies", lambda dtype, device: True)
    assert computing_dtype(torch.bfloat16, CPU) == torch.bfloat16


@pytest.mark.usefixtures("plain_processor")
def test_a_model_is_widened_exactly_and_comes_back_bit_by_bit():
    model = make_tiny_model("llama", tie_word_embeddings=True)
    cast_(model, [name for name, _ in model.named_parameters()], torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert {before[name].dtype for name, _ in model.named_buffers()} == {torch.float32}  # rotary frequencies
    with computing(model, CPU):
        assert model.dtype == torch.float32
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert torch.equal(tensor, before[name].float())
        assert model(input_ids=torch.arange(8)[None]).logits.dtype == torch.float32
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)


@pytest.mark.usefixtures("plain_processor")
def test_packed_layers_compute_in_what_they_are_made_for(llama):
    model = AutoModelForCausalLM.from_pretrained(llama / "packed")
    before = tensors_of(model, torch.bfloat16)
    with computing(model, CPU):
        assert tensors_of(model, torch.bfloat16) == before


@pytest.mark.usefixtures("plain_processor")
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_a_run_computes_in_float32_and_saves_bfloat16(tmp_path, source):
    folder = set_up(tmp_path, dtype=source)
    model = toy_run(folder, steps=2, rotate=True)
    record, saved = record_of(folder / "sparse"), tensors(folder / "sparse")
    assert record["computed_in"] == "float32"
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    for name, tensor in saved.items():
        assert torch.equal(tensor, model.state_dict()[name])
    for name, keep in model.losa_masks.items():
        assert not saved[name][~keep].view(torch.uint8).any()
    # What was measured is what was saved, to the bit.
    config = LosaConfig(model=str(folder / "sparse"), device="cpu")
    shown = evaluate_checkpoint(config, recorded_text(str(folder / "sparse")), most=16)
    assert shown["perplexity"][0]["perplexity"] == record["perplexity"]["losa"]


@pytest.mark.usefixtures("plain_processor")
def test_a_killed_run_resumes_to_the_same_file(tmp_path):
    folder = set_up(tmp_path, dtype=torch.bfloat16)
    whole, resumed = folder / "whole", folder / "resumed"
    toy_run(folder, output=str(whole), steps=2)
    with pytest.raises(Stop):
        toy_run(folder, output=str(resumed), steps=2, callbacks=(StopAtStep(2),))
    toy_run(folder, output=str(resumed), steps=2, resume=True)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_a_run_is_not_resumed_in_another_precision(tmp_path, monkeypatch):
    folder = set_up(tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(precision, "multiplies", lambda dtype, device: True)
    with pytest.raises(Stop):
        toy_run(folder, steps=2, callbacks=(StopAtStep(2),))
    monkeypatch.setattr(precision, "multiplies", lambda dtype, device: False)
    with pytest.raises(ValueError, match=r"the precision \(bfloat16 -> float32\) changed; restore it, or delete"):
        toy_run(folder, steps=2, resume=True)


def test_a_plan_counts_what_is_computed_in(tmp_path, unsimulated, quick_probe, monkeypatch):
    folder = set_up(tmp_path, dtype=torch.bfloat16)
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(precision, "multiplies", lambda dtype, device, fast=fast: fast)
        found[fast] = plan(toy_config(folder))
    assert (found[True].computes_in, found[False].computes_in) == ("bfloat16", "float32")
    assert found[False].weights == 2 * found[True].weights
