"""`SparseLinear`: a linear layer whose weight stays packed."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from losa.runtime import dispatch
from losa.runtime.format import PackedWeight, check, chunk_index, groups_shape, mask_shape, pack, unpack
from losa.runtime.values import BFLOAT16, ValueType


class SparseLinear(nn.Module):
    """Stands in for `nn.Linear` at inference. Not trainable: fine-tune the sparse checkpoint with losa, then pack it.

    Its parameters are the packed weight (see `losa.runtime.format`), under names that make other software fail rather than
    guess: `weight` holds the values that are not zero, in one dimension, where an `nn.Linear` has two.

    Attributes:
        values: the type of the stored values.
        activations: `int8` where kernels may round them, else `bfloat16`.
        weight: `[elements]` of `values.stored`.
        weight_mask: `[strips, bytes]` uint8.
        weight_offsets: `[strips + 1]` int64.
        weight_scale: `[O]` float32, or None for values that are not rounded.
        weight_groups: `[strips, groups, 16]` uint8, or None for values without scales of groups.
        bias: `[O]` bfloat16 or None.
        kernel: as `losa.runtime.dispatch.choose` finds it.
        index: `[strips, chunks]` int32, `format.chunk_index` of a layer on a GPU; None elsewhere. In no checkpoint.
    """

    index: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        count: int,
        values: ValueType,
        bias: bool = False,
        activations: str = "bfloat16",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.values, self.activations = in_features, out_features, values, activations
        strips, width = mask_shape(out_features, in_features, values)
        self.weight = _frozen(torch.empty(values.elements(count), dtype=values.stored))
        self.weight_mask = _frozen(torch.empty(strips, width, dtype=torch.uint8))
        self.weight_offsets = _frozen(torch.empty(strips + 1, dtype=torch.int64))
        scale = _frozen(torch.empty(out_features, dtype=torch.float32)) if values.rounds else None
        self.register_parameter("weight_scale", scale)
        shape = groups_shape(out_features, in_features, values)
        self.register_parameter("weight_groups", _frozen(torch.empty(shape, dtype=torch.uint8)) if shape else None)
        self.register_parameter("bias", _frozen(torch.empty(out_features, dtype=torch.bfloat16)) if bias else None)
        self.kernel = dispatch.choose(activations=activations)
        self.register_buffer("index", None, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, values: ValueType = BFLOAT16, activations: str = "bfloat16") -> Self:
        """Packs a bfloat16 layer.

        Raises:
            ValueError: another dtype.
        """
        bias_O = None if linear.bias is None else linear.bias.data
        return cls.from_packed(pack(linear.weight.data, values), bias_O, activations)

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias_O: Tensor | None = None, activations: str = "bfloat16") -> Self:
        """A layer of a packed weight, which is not copied."""
        made = cls(packed.columns, packed.rows, 0, packed.type, activations=activations)
        for part, tensor in packed.tensors().items():
            made.register_parameter(part, _frozen(tensor))
        if bias_O is not None:
            made.bias = _frozen(bias_O.bfloat16())
        made.prepare()
        return made

    def prepare(self) -> None:
        """Chooses the kernel of the device that holds the weight, and derives what that kernel needs.

        Raises:
            ValueError: on a GPU, masks, offsets and values that disagree.
        """
        self.kernel = dispatch.choose(self.weight.device.type, self.activations)
        self.index = chunk_index(self.packed) if self.kernel == dispatch.TRITON else None

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self.prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `cuda`, `half`: moves, but casts nothing, for the types are the format's; activations decide what computes."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self.prepare()
        return self

    @property
    def packed(self) -> PackedWeight:
        """The weight as the kernels take it; nothing is copied."""
        held = self._parameters  # directly: five attribute lookups of a module would take as long as the operator's call
        mask, values, offsets = held["weight_mask"], held["weight"], held["weight_offsets"]
        assert mask is not None and values is not None and offsets is not None
        scale, groups = held["weight_scale"], held["weight_groups"]
        return PackedWeight(mask, values, offsets, scale, groups, self.out_features, self.in_features, self.values)

    def to_linear(self) -> nn.Linear:
        """The dense layer again."""
        bias = self._parameters["bias"]
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        linear.weight = _frozen(unpack(self.packed))
        if bias is not None:
            linear.bias = bias
        return linear

    def check(self, name: str, claimed: int | None = None) -> None:
        """Compares masks, offsets and values, which may come from a file that nobody vouches for, and the header's count.

        Raises:
            ValueError: they disagree.
        """
        check(self.packed, name, claimed)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` bfloat16 -> `[..., O]`; on a GPU float16 as well."""
        if x.dtype != torch.bfloat16 and not (x.dtype == torch.float16 and x.device.type == "cuda"):
            raise ValueError(f"a packed layer computes in bfloat16, found {x.dtype}; load the model with dtype=torch.bfloat16")
        if x.is_cuda and self.kernel in dispatch.COMPILED:  # what moved the weights here did not go through this module
            self.prepare()
        y = dispatch.linear(x, self.packed, self._parameters["bias"], self.kernel, self._buffers["index"])
        passed: Tensor = _NoGradient.apply(x, y) if torch.is_grad_enabled() and x.requires_grad else y  # type: ignore[no-untyped-call]
        return passed

    def extra_repr(self) -> str:
        """Shape, zeros and storage, for `print(model)`."""
        stored = 0 if self.weight.is_meta else self.packed.stored
        zeros = 1 - stored / max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"zeros={zeros:.1%}, values={self.values.name}, kernel={self.kernel}"
        )


class _NoGradient(torch.autograd.Function):
    """Lets `y` pass, and says so when somebody asks for the gradient that the kernels do not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("packed layers have no gradient; fine-tune the sparse checkpoint with losa, then pack it")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
