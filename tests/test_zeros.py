"""Promised: whatever fine-tunes a sparse model, with whichever optimizer, the zeros that `keep_zeros` saw stay bitwise zero."""

import pytest
import torch
from helpers import toy_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import losa
from losa.models import find_decoder

IDS = torch.arange(1, 33).view(2, 16)


def sparse_model(dtype=torch.float32):
    model = toy_model(dtype)
    with torch.no_grad():
        for linear in find_decoder(model).linears().values():
            linear.weight[torch.rand(linear.weight.shape) < 0.7] = 0
    return model


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: linear.weight == 0 for name, linear in find_decoder(model).linears().items()}


def bitwise_zero(model, masks) -> bool:
    linears = find_decoder(model).linears()
    return all(not linears[name].weight[mask].view(torch.uint8).any() for name, mask in masks.items())


def step(model, optimizer):
    loss = cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Muon": lambda p: torch.optim.Muon([w for w in p if w.ndim == 2], lr=1e-2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_in_a_plain_loop(name, dtype):
    model = sparse_model(dtype)
    masks, before = zeros(model), [p.detach().clone() for p in model.parameters()]
    with losa.keep_zeros(model):
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        for _ in range(3):
            step(model, optimizer)
    assert bitwise_zero(model, masks)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step(model, optimizer)
    assert not bitwise_zero(model, masks)  # the hooks are gone, and nothing is left of them


def test_moments_of_pruned_weights_are_zero():
    model = sparse_model()
    masks = zeros(model)
    with losa.keep_zeros(model):
        optimizer = torch.optim.AdamW(model.parameters())
        step(model, optimizer)
    linears = find_decoder(model).linears()
    for name, mask in masks.items():
        assert not optimizer.state[linears[name].weight]["exp_avg"][mask].any()


def test_zeros_stay_in_a_plain_trainer_and_after_saving(tmp_path):
    model = sparse_model()
    masks = zeros(model)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = TrainingArguments(
        str(tmp_path / "work"), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    with losa.keep_zeros(model):
        Trainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(tmp_path / "again")
    assert bitwise_zero(type(model).from_pretrained(tmp_path / "again"), masks)


def test_masked_adapters_keep_the_zeros_of_a_reopened_model(tmp_path):
    """The way for low-rank adapters; an adapter of peft's fills the zeros when it is merged."""
    sparse_model().save_pretrained(tmp_path)
    model = type(toy_model()).from_pretrained(tmp_path)
    masks = zeros(model)
    losa.attach(model, masks={f"{name}.weight": ~mask for name, mask in masks.items()}, max_rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        step(model, optimizer)
    losa.merge(model)
    assert bitwise_zero(model, masks)


class Wrapped(torch.nn.Module):
    """A linear layer with an adapter beside it, as peft makes them."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear.requires_grad_(False)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(linear.in_features, 4, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(4, linear.out_features, bias=False)})
        torch.nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_an_adapter_that_begins_at_zero_learns():
    model = sparse_model()
    for name, linear in find_decoder(model).linears().items():
        model.set_submodule(name, Wrapped(linear))
    with losa.keep_zeros(model) as kept:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        step(model, optimizer)
        step(model, optimizer)
    assert kept.weights and all(name.endswith("base_layer.weight") for name in kept.weights)
    wrapped = [module for module in model.modules() if isinstance(module, Wrapped)]
    assert all(one.lora_B["default"].weight.any() for one in wrapped)


def test_zeros_after_peft_merged_its_adapter():
    peft = pytest.importorskip("peft")
    model = sparse_model()
    masks = zeros(model)
    kept = losa.keep_zeros(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-1)
    for _ in range(2):
        step(wrapped, optimizer)
    merged = wrapped.merge_and_unload()
    assert not bitwise_zero(merged, masks)
    kept.apply()
    assert bitwise_zero(merged, masks)


def test_a_model_without_zeros_is_refused():
    with pytest.raises(ValueError, match="has no zeros in"):
        losa.keep_zeros(toy_model())
    with pytest.raises(ValueError, match="is masked already"):
        losa.keep_zeros(losa.attach(sparse_model()))
    packed = sparse_model()
    packed.config.quantization_config = losa.SparseConfig()
    with pytest.raises(ValueError, match="losa unpack gives the sparse checkpoint"):
        losa.keep_zeros(packed)
