"""The plug-in that lets transformers open packed checkpoints; `import losa` registers it (`losa.integrations.registration`).

`from_pretrained` builds the model on the meta device, asks the quantizer to put its modules in, and fills them from the files:
a packed model never exists in its dense size. Without the plug-in (losa not imported), transformers warns of an unknown
quantization type `losa`, and `from_pretrained` stops with a size mismatch: `weight` of a packed layer has one dimension.

This module is imported while transformers is: at its top it needs nothing that is not loaded with `transformers.quantizers`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from losa.runtime.header import KEEP, METHOD, VERSION, Packing, check_files, head_of, swap_in
from losa.runtime.linear import SparseLinear
from losa.runtime.memory import move_to_huge_pages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class SparseConfig(Packing, QuantizationConfigMixin):
    """`Packing` as transformers takes it; its arguments and what it raises are described there.

    transformers makes one of a packed checkpoint's header. It is also what a user passes to pack a checkpoint while it is opened:

        AutoModelForCausalLM.from_pretrained(directory, quantization_config=losa.SparseConfig("int8"))
    """

    def __new__(cls, values: str = "bfloat16", *args: Any, **kwargs: Any) -> Self:
        """A class for every type of values. A packed checkpoint that is opened with another configuration than its own is refused
        by transformers only if the two classes have different names; else it takes the checkpoint's, and warns."""
        own = type(f"SparseConfig of {values} values", (cls,), {"__module__": cls.__module__}) if cls is SparseConfig else cls
        made: Self = super().__new__(own)
        return made

    def __init__(
        self,
        values: str = "bfloat16",
        layers: Mapping[str, int] | None = None,
        version: int = VERSION,
        head: str | None = None,
        tied: bool = False,
        activations: str = "bfloat16",
        **header: Any,
    ) -> None:
        given = {"values": values, "layers": {} if layers is None else layers, "version": version, "head": head, "tied": tied}
        self.__dict__.update(vars(Packing.of(given | {"activations": activations} | header)))

    __repr__ = QuantizationConfigMixin.__repr__

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which look for a class by its name."""
        return SparseConfig, (self.values, self.layers, self.version, self.head, self.tied, self.activations)


class SparseQuantizer(HfQuantizer):
    """Opens packed checkpoints, and packs dense ones while they are opened."""

    quantization_config: SparseConfig
    files: Sequence[str] = ()  # of the checkpoint

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """bfloat16, whatever was asked: the packed layers compute in nothing else."""
        if dtype != torch.bfloat16:
            logger.warning("a packed model computes in bfloat16; %s was asked for", dtype)
        return torch.bfloat16

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", checkpoint_files: Any = None, **_: Any) -> None:
        from losa.models import check_supported
        from losa.models.opening import without_header

        self.files = checkpoint_files or []
        if self.pre_quantized:
            check_files(self.files, swap_in(model, self.quantization_config), model.base_model_prefix)
            return
        with torch.device("meta"):
            check_supported(type(model)(without_header(model.config)))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> None:
        from losa.runtime import decode, head, loop

        if away := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            found = f"device_map leaves {len(away)} tensors on the host or the disk, {away[0]} first"
            raise ValueError(f"{found}; packed layers are not offloaded: choose a device_map of GPUs only, or the CPU")
        if model.config.dtype != torch.bfloat16:  # transformers before 5.17 asks `update_dtype` and does as it was asked before
            found = f"this release of transformers opens the model in {model.config.dtype}, and packed layers compute in bfloat16"
            raise ValueError(f"{found}: pass dtype=torch.bfloat16 to from_pretrained, or install transformers>=5.17")
        if self.pre_quantized:
            for name, count in self.quantization_config.layers.items():
                layer = model.get_submodule(name)
                assert isinstance(layer, SparseLinear)
                layer.check(name, count)
                layer.requires_grad_(False)
                layer.prepare()
        else:
            self.quantization_config.layers = pack_model(model, self.quantization_config)
        move_to_huge_pages(model, files=self.files)
        if decode.attach(model):
            loop.attach(model)
        head.attach(model)

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """`model.dequantize()`: dense layers again, with their zeros, in `dtype`, or bfloat16, and transformers' own road."""
        from losa.runtime import decode, loop

        loop.detach(model)
        decode.detach(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, SparseLinear):
                model.set_submodule(name, layer.to_linear())
        if isinstance(dtype, str):  # transformers passes what the configuration says, which a saved one says in letters
            dtype = getattr(torch, dtype)
        return model.to(dtype or torch.bfloat16)

    def is_serializable(self) -> bool:
        """`save_pretrained` writes a packed checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Train the sparse checkpoint, then pack it."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The operator has a fake implementation."""
        return True


def pack_model(model: "PreTrainedModel", config: Packing) -> dict[str, int]:
    """Replaces the linear layers of the decoder's blocks by packed ones, in place; one dense layer is freed before the next. So
    is the head, where the configuration says so; an embedding that it was tied to stays dense, and is tied no more.

    Returns:
        The number of stored values of each layer.
    """
    from losa.models import find_decoder

    linears, head, layers = dict(find_decoder(model).linears()), head_of(model), {}
    if config.head != KEEP and head:
        linears |= head
        config.tied = all(linear.weight is getattr(model.get_input_embeddings(), "weight", None) for linear in head.values())
        model.config.tie_word_embeddings = False
    else:
        config.head = KEEP
    for name, linear in linears.items():
        packed = SparseLinear.from_linear(linear, config.type_of(name in head), config.activations_of(name in head))
        model.set_submodule(name, packed)
        layers[name] = packed.packed.stored
    return layers


def register() -> None:
    """Makes the method known to transformers; once is enough, a module that is reloaded needs it again."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(SparseConfig)
        auto.register_quantizer(METHOD)(SparseQuantizer)


register()
