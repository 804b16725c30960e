"""Training changes adapters and nothing else; it stops before a bad update; it says what to do when memory is short."""

import pytest
import torch
from conftest import FAMILIES
from helpers import save_text, toy_model
from transformers import TrainerCallback

from losa.adapter import MaskedLinear, attach, masked_linears
from losa.commands.toy import toy_tokenizer
from losa.config import TrainConfig
from losa.data import padded_samples, training_blocks
from losa.loss import causal_loss
from losa.training import collate, separates_documents, train


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    text = save_text(tmp_path_factory.mktemp("text") / "text.txt", 6000).read_text()
    return training_blocks([text], toy_tokenizer(), 32, 160)


def masked_model(dtype: torch.dtype = torch.float32):
    """A toy with half of its weights pruned at random, adapters of rank 4."""
    model = attach(toy_model(dtype), max_rank=6)
    generator = torch.Generator().manual_seed(5)
    for layer in masked_linears(model).values():
        layer.set_solution(torch.rand(layer.weight.shape, generator=generator) < 0.5)
        layer.set_rank(4)
    return model


def run_training(model, rows, tmp_path, callbacks=(), eos=None, **changes):
    config = TrainConfig(**{"batch_size": 8, "lr": 0.01, "distill": 0.0, **changes})
    return train(
        model, rows, config, name="training, step 1/1", seed=7, work_dir=tmp_path / "trainer", eos=eos, callbacks=callbacks
    )


def adapters(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Watch(TrainerCallback):
    """Counts events; calls `poison(model)` before update 2; keeps the adapters as update 1 left them."""

    def __init__(self, poison=lambda model: None) -> None:
        self.poison, self.events, self.before = poison, [], {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.events.append("begin")

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            self.poison(kwargs["model"])
            self.before = adapters(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.events.append("update")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.events.append("end")


def nan_norm(model) -> None:
    model.model.norm.weight.data[3] = float("nan")


def infinite_gradient(model) -> None:
    """The loss stays what it was."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * float("inf"))


def one_nan_gradient(model) -> None:
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def hook(gradient):
        gradient = gradient.clone()
        gradient[0, 0] = float("nan")
        return gradient

    parameter.register_hook(hook)


@pytest.mark.parametrize("poison", [nan_norm, infinite_gradient, one_nan_gradient])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_stops_before_an_update_that_is_not_finite(rows, tmp_path, poison, accumulation):
    model, watch = masked_model(), Watch(poison)
    with pytest.raises(
        FloatingPointError, match=r"training, step 1/1, update 2: loss or gradient is not finite; lower train\.lr"
    ):
        run_training(model, rows, tmp_path, [watch], accumulation=accumulation)
    assert watch.events == ["begin", "update"]
    assert same(adapters(model), watch.before)


def test_stops_at_a_poisoned_adapter(rows, tmp_path):
    model = masked_model()
    next(iter(masked_linears(model).values())).lora_A.data[0, 0] = float("nan")
    before = adapters(model)
    with pytest.raises(FloatingPointError, match="update 1"):
        run_training(model, rows, tmp_path)
    for name, value in adapters(model).items():
        assert torch.equal(value.nan_to_num(9.0), before[name].nan_to_num(9.0))


def test_callbacks_of_the_user_are_called(rows, tmp_path):
    watch = Watch()
    run_training(masked_model(), rows, tmp_path, [watch])
    assert watch.events == ["begin", *["update"] * 20, "end"]


def test_loss_falls_on_repeated_text(rows, tmp_path):
    curve = run_training(masked_model(), rows.repeat(4, 1), tmp_path)
    assert [update for update, _ in curve][-1] == 80
    assert curve[-1][1] < curve[0][1] - 0.2


def test_short_training_has_a_curve_too(rows, tmp_path):
    assert len(run_training(masked_model(), rows[:24], tmp_path)) >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_change_and_nothing_else(rows, tmp_path, dtype):
    model = masked_model(dtype)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    masks = {name: layer.keep_OI.clone() for name, layer in masked_linears(model).items()}
    before = adapters(model)
    assert len(before) == 2 * 14
    run_training(model, rows, tmp_path, weight_decay=0.1)
    after = adapters(model)
    for name, value in model.state_dict().items():
        if name in frozen:
            assert torch.equal(value.view(torch.uint8), frozen[name].view(torch.uint8)), name
    for name, layer in masked_linears(model).items():
        assert torch.equal(layer.keep_OI, masks[name])
        assert not layer.effective()[~layer.keep_OI].contiguous().view(torch.uint8).any()
        assert layer.effective()[layer.keep_OI].all()
        assert not torch.equal(after[f"{name}.lora_A"][:4], before[f"{name}.lora_A"][:4])
        assert after[f"{name}.lora_B"][:, :4].any()
        assert not after[f"{name}.lora_B"][:, 4:].any()  # beyond the active rank


def test_same_seed_same_result(rows, tmp_path):
    one, other = masked_model(), masked_model()
    assert run_training(one, rows, tmp_path) == run_training(other, rows, tmp_path)
    assert same(adapters(one), adapters(other))


def test_gradient_checkpointing_changes_no_loss(rows, tmp_path):
    plain, checkpointed = masked_model(), masked_model()
    expected = run_training(plain, rows, tmp_path)
    assert run_training(checkpointed, rows, tmp_path, gradient_checkpointing=True) == expected
    assert same(adapters(plain), adapters(checkpointed))
    assert not checkpointed.is_gradient_checkpointing


@pytest.mark.parametrize("accumulation", [1, 4])
def test_reused_weights_change_nothing(rows, tmp_path, accumulation, monkeypatch):
    """And are built once an update: 14 layers."""
    plain, reusing, built = masked_model(), masked_model(), []
    changes = {"accumulation": accumulation, "batch_size": 4, "distill": 0.5}
    expected = run_training(plain, rows[:32], tmp_path, **changes)
    original = MaskedLinear.effective
    monkeypatch.setattr(MaskedLinear, "effective", lambda layer: built.append(1) or original(layer))
    assert run_training(reusing, rows[:32], tmp_path, reuse_weights=True, **changes) == expected
    assert same(adapters(plain), adapters(reusing))
    assert len(built) == 14 * 8 // accumulation
    assert all(layer.reused_OI is None and not layer.reuses for layer in masked_linears(reusing).values())


def test_padding_changes_no_gradient(tmp_path):
    """Documents padded in one batch: the loss is the mean over their real tokens, as if each had been alone."""
    documents = ["THE QUICK BROWN FOX", "A DOG", "SIX WIZARDS BOX A LAZY DOG"]
    samples = padded_samples(documents, toy_tokenizer(), 32, 3)
    seen: dict[str, torch.Tensor] = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
            seen.update({n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.requires_grad})

    run_training(masked_model(), samples, tmp_path, [Gradients()], batch_size=3, max_grad_norm=1e9)
    model = masked_model().train()
    count = sum(len(sample["input_ids"]) - 1 for sample in samples)
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        (model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) / count).backward()
    assert seen
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_sample_sees_all_of_itself_whatever_ends_its_turns(tmp_path, batch_size):
    """A chat template may end every turn with the token that ends documents."""
    samples = [{"input_ids": [5, 6, EOS, 7, 8, EOS, 9, 10], "labels": [-100] * 6 + [9, 10]}] * 3
    packed, whole = ([run_training(masked_model(), samples, tmp_path, eos=eos, batch_size=batch_size)] for eos in (EOS, None))
    assert packed == whole


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_a_training_of_few_updates_learns(rows, tmp_path, updates):
    """The first update of a warm-up has a learning rate of zero; one that is the only update has no warm-up."""
    model = masked_model()
    before = adapters(model)
    run_training(model, rows[: 8 * updates], tmp_path)
    assert not same(adapters(model), before)


EOS = 2


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_cannot_separate_documents_are_found(tiny_model, family):
    assert separates_documents(tiny_model(family)) == (family != "opt")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_packed_documents_do_not_see_each_other(tiny_model, token_ids, tmp_path, family):
    """Documents joined in rows: loss and gradients are those of the documents on their own, in every family."""
    documents = [torch.cat([row[: 5 + 3 * index], torch.tensor([EOS])]) for index, row in enumerate(token_ids(4, 16))]
    rows = torch.stack([torch.cat(documents[:3])[:27], torch.cat([documents[3], documents[2]])[:27]])
    cut = [*documents[:3], documents[3], documents[2][: 27 - len(documents[3])]]
    assert sum(len(document) for document in cut) == rows.numel()
    model = attach(tiny_model(family))
    count = sum(len(document) - 1 for document in cut)
    expected = 0.0
    for document in cut:
        loss = causal_loss(model(input_ids=document[None]).logits, document[None]) / count
        loss.backward()
        expected += loss.item()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    batch = collate([{"input_ids": row} for row in rows], eos=EOS)
    labels = batch.pop("labels")
    loss = causal_loss(model(**batch, use_cache=False).logits, labels) / (labels[:, 1:] != -100).sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)


def test_rows_of_one_document_keep_the_fast_path(token_ids):
    assert "position_ids" not in collate([{"input_ids": row} for row in token_ids(2, 16)], eos=EOS)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_documents_are_separated_where_the_model_can(tiny_model, token_ids, tmp_path, family, monkeypatch):
    model, rows, seen = attach(tiny_model(family)), token_ids(8, 16), []
    rows[:, 7] = EOS
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **kwargs: seen.append("position_ids" in kwargs) or forward(*args, **kwargs)
    )
    monkeypatch.setattr("losa.training.trainer.separates_documents", lambda model: family != "opt")
    run_training(model, rows, tmp_path, eos=EOS)
    assert seen == [family != "opt"]


def test_accumulated_batches_are_one_large_batch(rows, tmp_path):
    whole, parts = masked_model(), masked_model()
    run_training(whole, rows[:32], tmp_path, batch_size=16)
    run_training(parts, rows[:32], tmp_path, batch_size=4, accumulation=4)
    for name, value in adapters(whole).items():
        torch.testing.assert_close(adapters(parts)[name], value, rtol=1e-2, atol=1e-4)


def test_out_of_memory_names_the_knob(rows, tmp_path, monkeypatch):
    model = masked_model()

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError, match=r"step 1/1 ran out of memory; lower train\.batch_size \(8\).*2\.00 GiB"):
        run_training(model, rows, tmp_path)


def test_model_is_left_as_it_came(rows, tmp_path):
    model = masked_model()
    assert model.config.use_cache
    run_training(model, rows[:16], tmp_path)
    assert model.config.use_cache
    assert not model.training
    assert list(tmp_path.rglob("*.safetensors")) == []  # the Trainer writes no checkpoints
