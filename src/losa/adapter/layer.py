"""`MaskedLinear`: a linear layer with a frozen base, an explicit keep-mask and what is trained under that mask.

That is a low-rank adapter, `M * (W + s B A)`, or every surviving weight, `M * (W + D)`, where there is memory for it.

Own code rather than a `peft` layer, after weighing both: peft registers custom LoRA layers through an underscore API,
and an adapter it saves is loaded by plain peft *unmasked*, silently. The product here is the merged checkpoint, no adapter
is ever handed out, and what is left to write is this file.

The adapter is allocated once at `max_rank` rows and sliced to the active rank, so parameter shapes, optimizer state and
checkpoints never change when a block is given another rank.

Legend: `O` out_features, `I` in_features, `R` active rank.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.adapter.function import MaskedLowRankLinear, MaskedWholeLinear, effective_weight, effective_whole
from losa.bits import pack_bits, unpack_bits
from losa.models import check_supported, find_decoder
from losa.system import distributed


class MaskedLinear(nn.Linear):
    """`y = x (M * (W + s B A))^T + b`, or `y = x (M * (W + D))^T + b`.

    Attributes:
        weight: frozen base weight `(O, I)`.
        keep_bits: the mask, a bit a weight (`bits.pack_bits`); a byte a weight would be half of a bfloat16 model. Changed only
            by `set_solution`, `restore` and `reset`; `keep_OI` is the same as bool.
        lora_A, lora_B: float32 (float64 over a float64 base), `(max_rank, I)` and `(O, max_rank)`.
        delta_OI: float32 `D`, or None where the adapter is what is trained. The base then changes only when
            weights `settle`.
        rank: active rank; rows of `lora_A` at and above it do nothing.
        scale: `alpha / r`, the same at every rank.
        dense_OI: the original weight, on the host, kept from the moment the base first differs from it.
        dense: when True, forward runs the original dense layer (for reconstruction errors and distillation).
        keep_effective: whether backward finds the effective weight saved; set under activation checkpointing only.
        score_OI: float32 movement score of each weight (`pruning/movement.py`), or None; summed by every backward pass while
            `scored` is True, as `collect_scores` sets it.
        reused_OI: the effective weight, while `reuse_effective_weights` lasts and no update has outdated it.
    """

    keep_bits: Tensor
    lora_A: nn.Parameter  # None, as lora_B, where all weights are trained
    lora_B: nn.Parameter
    delta_OI: nn.Parameter | None
    exact: torch.dtype  # of sums: float32, or float64 over a float64 base

    def __init__(self, linear: nn.Linear, max_rank: int, scale: float, generator: torch.Generator, whole: bool = False) -> None:
        # nn.Linear's own initialiser would allocate and fill a weight only to drop it.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        device = self.weight.device
        dtype = self.exact = torch.promote_types(self.weight.dtype, torch.float32)
        self.register_buffer("keep_bits", pack_bits(torch.ones_like(self.weight, dtype=torch.bool)), persistent=False)
        delta_OI = lora_A = lora_B = None
        if whole:
            delta_OI = nn.Parameter(torch.zeros_like(self.weight, dtype=dtype))
        else:
            bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform(a=sqrt(5)), as LoRA and peft initialise A
            A_RI = torch.empty(max_rank, self.in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
            lora_A = nn.Parameter(A_RI.to(device))
            lora_B = nn.Parameter(torch.zeros(self.out_features, max_rank, dtype=dtype, device=device))
        for name, parameter in (("lora_A", lora_A), ("lora_B", lora_B), ("delta_OI", delta_OI)):
            self.register_parameter(name, parameter)
        self.rank, self.scale = max_rank, scale
        self.dense_OI: Tensor | None = None
        self.dense = self.keep_effective = self.reuses = self.scored = False
        self.reused_OI: Tensor | None = None
        self.score_OI: Tensor | None = None

    @property
    def keep_OI(self) -> Tensor:  # noqa: N802 - a tensor's name
        """The mask as bool, `(O, I)`, True keeps; a copy."""
        return unpack_bits(self.keep_bits, self.weight.shape)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The active slices of A `(R, I)` and B `(O, R)`."""
        return self.lora_A[: self.rank], self.lora_B[:, : self.rank]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained: the adapter or the whole delta, by name."""
        names = ("lora_A", "lora_B") if self.delta_OI is None else ("delta_OI",)
        return {name: getattr(self, name) for name in names}

    def merged(self) -> Tensor:
        """The merged weight before it is cast, `(O, I)`: what solvers work on, so that no base weight is rounded on the way."""
        return self.effective(self.exact)

    def effective(self, dtype: torch.dtype | None = None) -> Tensor:
        """The merged weight, `(O, I)` in the base dtype, bitwise zero outside the mask."""
        if self.delta_OI is not None:
            return effective_whole(self.weight, self.keep_bits, self.delta_OI, dtype)
        return effective_weight(self.weight, self.keep_bits, *self.factors, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape, `(..., I) -> (..., O)`."""
        if self.dense:
            weight = self.weight if self.dense_OI is None else self.dense_OI.to(x.device)
            return nn.functional.linear(x, weight, self.bias)
        if self.reuses and self.reused_OI is None:
            with torch.no_grad():
                self.reused_OI = self.effective()
        if torch.is_grad_enabled():
            score_OI = self.score_OI if self.scored else None
            y: Tensor
            if self.delta_OI is not None:
                trained = (self.keep_bits, self.delta_OI, self.reused_OI, score_OI)
                y = MaskedWholeLinear.apply(x, self.weight, self.bias, *trained)  # type: ignore[no-untyped-call]
                return y
            adapter = (self.keep_bits, *self.factors, self.scale, self.keep_effective, self.reused_OI)
            y = MaskedLowRankLinear.apply(x, self.weight, self.bias, *adapter, score_OI)  # type: ignore[no-untyped-call]
            return y
        return nn.functional.linear(x, self.effective() if self.reused_OI is None else self.reused_OI, self.bias)

    @torch.no_grad()
    def set_solution(self, keep_OI: Tensor, weight_OI: Tensor | None = None) -> None:
        """Takes a pruner's answer: a nested mask and, if survivors changed, the merged weights they should now be.

        The adapter keeps what it learned: the base absorbs the difference, `W <- W' - s B A`.

        Raises:
            ValueError: the mask revives a weight that was pruned before.
        """
        if (keep_OI & ~self.keep_OI).any():
            raise ValueError("a pruned weight came back; masks must be nested")
        self.keep_bits.copy_(pack_bits(keep_OI))
        if weight_OI is not None and self.delta_OI is not None:
            self.delta_OI.copy_(weight_OI.to(self.exact) - self.weight)
        elif weight_OI is not None:
            A_RI, B_OR = self.factors
            self._set_base(torch.addmm(weight_OI.to(A_RI.dtype), B_OR, A_RI, alpha=-self.scale))

    @torch.no_grad()
    def settle(self, weight_OI: Tensor) -> None:
        """Takes the merged weights as they stay, to the last bit: all of them in the base, and nothing in what was trained."""
        self._set_base(weight_OI)
        self._forget_training()

    @torch.no_grad()
    def set_rank(self, rank: int) -> None:
        """Gives the adapter another active rank. What dropped components had learned is folded into the base. Where all weights
        are trained, there is no rank to set."""
        if self.delta_OI is not None:
            return
        if not 1 <= rank <= self.lora_A.shape[0]:
            raise ValueError(f"rank is {rank}, expected 1..{self.lora_A.shape[0]}")
        dropped = slice(rank, self.rank)
        if rank < self.rank and self.lora_B[:, dropped].any():
            kept_OR = self.lora_B[:, dropped]
            self._set_base(torch.addmm(self.weight.to(kept_OR.dtype), kept_OR, self.lora_A[dropped], alpha=self.scale))
            kept_OR.zero_()
        self.rank = rank

    def _set_base(self, weight_OI: Tensor) -> None:
        if self.dense_OI is None:
            self.dense_OI = self.weight.detach().cpu().clone()
        self.weight.copy_(weight_OI)

    @torch.no_grad()
    def restore(self, keep_bits: Tensor, weight_OI: Tensor | None, trained: Mapping[str, Tensor] | None = None) -> None:
        """Mask and, if it had changed, base weight of a saved stage, and what was trained. Unlike those of `set_solution`, masks
        need not be nested."""
        self.keep_bits.copy_(keep_bits)
        if weight_OI is not None:
            self._set_base(weight_OI)
        for name, value in (trained or {}).items():
            self.trained[name].copy_(value)

    @torch.no_grad()
    def reset(self, keep_bits: Tensor) -> None:
        """Back to the layer it was made from, with the mask it had then; `D` or the adapter's `B` to zero."""
        if self.dense_OI is not None:
            self.weight.copy_(self.dense_OI)
            self.dense_OI = None
        self.keep_bits.copy_(keep_bits)
        self._forget_training()

    def _forget_training(self) -> None:
        (self.lora_B if self.delta_OI is None else self.delta_OI).zero_()


def masked_linears(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers of a model, or of one block, by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def masked_sparsity(model: nn.Module) -> float:
    """Ratio of zeros in all masks of a model, counted."""
    layers = masked_linears(model).values()
    return 1 - sum(int(layer.keep_OI.sum()) for layer in layers) / sum(layer.weight.numel() for layer in layers)


@contextmanager
def _switched_on(module: nn.Module, switch: str) -> Iterator[None]:
    """Has an attribute of every masked layer True while it lasts, and False afterwards."""
    layers = masked_linears(module).values()
    for layer in layers:
        setattr(layer, switch, True)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, switch, False)


@contextmanager
def dense_mode(module: nn.Module) -> Iterator[None]:
    """Lets a model, or one block of it, compute what the dense model computes: no mask, no adapter, the original weights."""
    with _switched_on(module, "dense"):
        yield


@contextmanager
def reuse_effective_weights(model: nn.Module) -> Iterator[None]:
    """Has every layer build its effective weight once and keep it, for forward and backward of all micro-batches, until
    `outdate_effective_weights`. Costs one more copy of the base weights."""
    with _switched_on(model, "reuses"):
        try:
            yield
        finally:
            outdate_effective_weights(model)


@contextmanager
def collect_scores(model: nn.Module) -> Iterator[None]:
    """Adds up movement scores (`pruning/movement.py`) in every backward pass while it lasts, over all processes, and onto those
    there were before. A float32 number a weight."""
    layers = masked_linears(model).values()
    before = [layer.score_OI for layer in layers]
    for layer in layers:
        layer.score_OI = torch.zeros_like(layer.weight, dtype=torch.float32)
    with _switched_on(model, "scored"):
        yield
    for layer, past_OI in zip(layers, before, strict=True):
        assert layer.score_OI is not None
        distributed.sum_(layer.score_OI)
        if past_OI is not None:
            layer.score_OI += past_OI


def outdate_effective_weights(model: nn.Module) -> None:
    """After an update of the adapters."""
    for layer in masked_linears(model).values():
        layer.reused_OI = None


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Has every weight of a model, or of one block of it, trainable for a while; yields the parameters. Afterwards, where an
    adapter is what the layer trains otherwise, the base absorbs what was learned."""
    layers = list(masked_linears(module).values())
    lent = [layer for layer in layers if layer.delta_OI is None]
    for layer in lent:
        with torch.no_grad():
            layer.delta_OI = nn.Parameter(layer.merged() - layer.weight)
    try:
        yield [layer.trained["delta_OI"] for layer in layers]
    finally:
        with torch.no_grad():
            for layer in lent:
                merged_OI = layer.merged()
                layer.delta_OI = None
                layer.set_solution(layer.keep_OI, merged_OI)


def _replace(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@contextmanager
def dense_weights_on_device(model: nn.Module) -> Iterator[None]:
    """Has the dense originals beside the changed base weights for a while, where every forward of the teacher needs them."""
    layers = [layer for layer in masked_linears(model).values() if layer.dense_OI is not None]
    for layer in layers:
        assert layer.dense_OI is not None
        layer.dense_OI = layer.dense_OI.to(layer.weight.device)
    try:
        yield
    finally:
        for layer in layers:
            assert layer.dense_OI is not None
            layer.dense_OI = layer.dense_OI.cpu()


def attach(
    model: PreTrainedModel,
    max_rank: int = 16,
    scale: float = 2.0,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    whole: bool = False,
) -> PreTrainedModel:
    """Replaces, in place, every linear layer of every decoder block by a `MaskedLinear`, and freezes all else.

    The model computes what it did before: `B`, or `D`, is zero, and masks are full or those of its zeros.

    Args:
        masks: keep-masks by parameter name, as `merge` returns them, of a model that is sparse already: without them the
            adapters would fill its zeros. `prune` and `run` leave them in the model's attribute `losa_masks`, the default here.
        max_rank: rows allocated for each adapter, the largest rank any block can be given.
        scale: `alpha / r`.
        seed: of the initial `A`; drawn on the CPU, so the same on every device.
        whole: train every surviving weight instead of adapters.

    Raises:
        ValueError: the model is not supported (see `models.check_supported`).
    """
    check_supported(model)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    masks = getattr(model, "losa_masks", {}) if masks is None else masks
    for name, linear in find_decoder(model).linears().items():
        layer = MaskedLinear(linear, max_rank, scale, generator, whole)
        if (keep_OI := masks.get(f"{name}.weight")) is not None:
            layer.set_solution(keep_OI.to(layer.weight.device))
        _replace(model, name, layer)
    return model


@torch.no_grad()
def merge(model: PreTrainedModel) -> dict[str, Tensor]:
    """Replaces, in place, every `MaskedLinear` by a plain `nn.Linear` holding the merged weight.

    Summed in float32 and cast once. Every weight outside the mask is bitwise zero afterwards, and all parameters require
    gradients again, as in a model just loaded.

    Returns:
        The keep-masks by parameter name, on the CPU, to check any saved file against.
    """
    masks = {}
    for name, layer in masked_linears(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        layer.weight.copy_(layer.effective())  # in place: the old layers live until the loop ends
        linear.weight, layer.dense_OI = layer.weight, None
        if layer.bias is not None:
            linear.bias = layer.bias
        _replace(model, name, linear)
        masks[f"{name}.weight"] = layer.keep_OI.cpu()
    model.requires_grad_(True)
    return masks
