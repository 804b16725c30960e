"""Decoding without overhead: one token through all blocks of a packed Llama-like model in one compiled call.

A packed model's weights stream past in a few milliseconds; transformers' modules around them take longer than that, some 5,000
operators a token. `attach` gives the model's decoder another `forward`: a single token that follows a cache goes through
`losa::decode_step` (csrc/decode.cpp), anything else, prompts and batches among it, the way it always went. `generate`, sampling,
streaming and stop tokens stay transformers' own.

Which models: by structure, RMS norms, q/k/v/o and gate/up/down projections, rotary positions and SiLU, as Llama, Mistral, Qwen 2
and 3 and SmolLM have them. What structure does not show (a multiplier, another turn of the positions) numbers do: before the
first token every block is tried (`trial.py`), and where one differs from what the step makes, the model keeps its own road.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from losa.runtime import dispatch, trial
from losa.runtime.cache import ROOM, RoomyLayer
from losa.runtime.linear import SparseLinear

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # in the order of csrc/decode.cpp, as the norms
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
PARTS = ("weight_mask", "weight", "weight_offsets", "weight_scale", "weight_groups", "bias")  # of each layer
NUMBERS = ("scaling", "variance_epsilon", "sliding_window", "head_dim")
BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # transformers' kinds of rotary positions that no length changes
USUAL = {"use_cache": True, "return_dict": True, "output_hidden_states": False, "output_attentions": False}  # of a token's call
NOTES = "transformers.utils.output_capturing"  # its hooks stay once they were asked for, and note nothing unless they are again
TOLERANCE = 0.05  # relative difference of the two roads' outputs of a block that bfloat16 explains

logger = logging.getLogger(__name__)


class _Laid:
    """What `losa::decode_plan` made of tensors: their addresses, in a tensor of bytes. A copy, in this process or another, begins
    with none.

    Attributes:
        values: addresses of the layers' values and the norms' weights: whoever moves a layer moves these.
        held: the tensors' memory, which therefore stays where it is.
    """

    def __init__(self, plan: Tensor | None = None, values: Sequence[int] = (), held: Sequence[Tensor] = ()) -> None:
        self.plan, self.values, self.held = plan, values, held

    def __reduce__(self) -> tuple[Any, ...]:
        return _Laid, ()


@dataclass
class _Plan:
    """What `losa::decode_plan` and `losa::decode_step` take besides the token and the cache."""

    tensors: list[Tensor]
    weights: list[Tensor]  # those of them that hold values, and the norms
    places: list[tuple[dict[str, Any], str, Any]]  # where the modules and their tensors are; None: nothing may be there
    numbers: list[tuple[nn.Module, str, float | None]]  # which modules compute with
    modules: list[nn.Module]  # all that the step leaves out
    blocks: nn.ModuleList
    shape: list[int]
    epsilon: float
    scaling: float
    values: int
    kernel: int
    laid: _Laid = field(default_factory=_Laid)

    @classmethod
    def of(cls, decoder: Any, blocks: Any) -> "_Plan | None":
        """The plan for a decoder of the known structure and the list of its blocks; None for any other."""
        final: Any = getattr(decoder, "norm", None)
        if not all(hasattr(decoder, name) for name in ("embed_tokens", "rotary_emb")) or not _is_norm(final):
            return None
        tensors, weights = list[Tensor](), list[Tensor]()
        norms = [final]
        empty = torch.empty(0, dtype=torch.bfloat16)
        for block in blocks:
            for name in (*NORMS, *LAYERS):
                parent, _, leaf = name.rpartition(".")
                if (module := block.get_submodule(parent)._modules.get(leaf)) is None:  # a norm that the family does not have
                    tensors.append(empty)
                    continue
                weights.append(module.weight)
                if name in NORMS:
                    norms.append(module)
                    tensors.append(module.weight)
                else:
                    parts = [module._parameters[part] for part in PARTS]
                    tensors += [empty if part is None else part for part in parts]
        first = blocks[0]
        attention, width = first.self_attn, first.self_attn.head_dim
        sizes = {(block.self_attn.q_proj.out_features, block.mlp.up_proj.out_features) for block in blocks}
        scalings = {block.self_attn.scaling for block in blocks}
        kernel = attention.q_proj.kernel
        values = {block.get_submodule(name).values for block in blocks for name in LAYERS}
        alike = len(values) == len(sizes) == len(scalings) == len({norm.variance_epsilon for norm in norms}) == 1
        if not alike or kernel not in dispatch.COMPILED or any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        query, key = attention.q_proj, attention.k_proj
        shape = [query.in_features, query.out_features // width, key.out_features // width, width, first.mlp.up_proj.out_features]
        numbers = (values.pop().number, dispatch.COMPILED.index(kernel))
        held = ([*tensors, final.weight], [*weights, final.weight], *_watched(decoder, blocks), blocks)
        return cls(*held, shape, final.variance_epsilon, attention.scaling, *numbers)

    def lay_out(self) -> None:
        """Makes `laid`, anew where layers were moved."""
        values = [weight.data_ptr() for weight in self.weights]
        if self.laid.plan is None or values != self.laid.values:
            held = [tensor.detach() for tensor in self.tensors]
            self.laid = _Laid(torch.ops.losa.decode_plan(held, self.shape, self.values), values, held)

    def of_block(self, number: int) -> Tensor:
        """The laid out plan of one block and the last norm."""
        each = (len(self.tensors) - 1) // len(self.blocks)
        tensors = [tensor.detach() for tensor in (*self.tensors[number * each : (number + 1) * each], self.tensors[-1])]
        laid: Tensor = torch.ops.losa.decode_plan(tensors, self.shape, self.values)
        return laid

    def holds(self) -> bool:
        """Whether modules, tensors and numbers are still those, on the CPU, and nobody listens to a module or gave it a
        `forward`."""
        same = all(names.get(name) is held for names, name, held in self.places)
        same = same and all(vars(module).get(name) == number for module, name, number in self.numbers)
        heard = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
        return same and self.tensors[0].device.type == "cpu" and not heard and not any(map(_is_changed, self.modules))


def _watched(decoder: Any, blocks: nn.ModuleList) -> tuple[list[Any], list[Any], list[nn.Module]]:
    """The places, numbers and modules of a plan: all between the embedding, which the step asks itself, and the head."""
    parts = [blocks, decoder.norm, decoder.rotary_emb]
    modules = [module for part in parts for module in part.modules()]
    places = [(decoder._modules, name, module) for name, module in decoder._modules.items() if module in parts]
    places += [(names, *item) for module in modules for names in (module._modules, module._parameters) for item in names.items()]
    places.append((blocks._modules, str(len(blocks)), None))  # no block more
    numbers = [(module, name, vars(module)[name]) for module in modules for name in NUMBERS if name in vars(module)]
    return places, numbers, modules


def _is_changed(module: nn.Module) -> bool:
    """Whether a module does more, or something else, than its class says."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in vars(module) or any(hook.__module__ != NOTES for hook in hooks)


def _find(block: Any, name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    return getattr(block.get_submodule(parent), leaf, None)


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _fits(block: Any) -> bool:
    """Whether a block has the known parts, and no others."""
    known = {name.partition(".")[2] for name in (*LAYERS, *NORMS) if name.startswith("self_attn.")}
    if {name for name, _ in block.named_children()} != BLOCK:
        return False
    attention, mlp = block.self_attn, block.mlp
    return (
        {name for name, _ in attention.named_children()} <= known
        and {name for name, _ in mlp.named_children()} <= {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and all(isinstance(_find(block, name), SparseLinear) for name in LAYERS)
        and all(_find(block, name) is None or _is_norm(_find(block, name)) for name in NORMS)
        and all(hasattr(attention, name) for name in ("head_dim", "scaling"))
        and _sees_all(attention)
        and type(mlp.act_fn).__name__ in ("SiLUActivation", "SiLU")
    )


def _sees_all(attention: Any) -> bool:
    """Whether how far back a token is decides nothing but how much it is turned: no window, no scale of late positions."""
    config = getattr(attention, "config", None)
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return window is None and "llama_4_scaling_beta" not in (getattr(config, "rope_parameters", None) or {})


class DecodeStep:
    """The `forward` of a decoder: one token by the compiled step where that is possible, else as before."""

    def __init__(self, decoder: Any, plan: _Plan) -> None:
        self.decoder, self.plan = decoder, plan
        self.verified: bool | None = None  # not known before the first token
        self.head_alone: bool | None = None  # whether logits are the head's of this and no more; `loop` finds out
        self.angles = torch.empty(2, 0, 0)  # cosines and sines of the rotary positions from 0 on

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's own."""
        general = type(self.decoder).forward
        word = "cache" if "cache" in kwargs else "past_key_values"
        if self.verified is False or args or not self._takes(kwargs, kwargs.get(word)):
            return general(self.decoder, *args, **kwargs)
        cache = kwargs[word]
        if self.verified is None and not self._verify(word):
            return general(self.decoder, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self._step(kwargs["input_ids"], cache), **{word: cache})

    def after(self, ids: Tensor, cache: Any) -> Tensor | None:
        """The hidden state of a token `[1, 1]` that follows one which came this way; None where that one did not."""
        return self._step(ids, cache) if self.verified and type(cache) is DynamicCache and self._follows(cache) else None

    def _takes(self, kwargs: dict[str, Any], cache: Any) -> bool:
        """Whether a call is one plain token that follows a plain cache."""
        ids, mask, places = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if ids is None or ids.shape != (1, 1) or type(cache) is not DynamicCache:
            return False
        if torch.is_grad_enabled() or self.decoder.training:
            return False
        unusual = any(self._asked(name, kwargs) is not usual for name, usual in USUAL.items())
        if unusual or kwargs.get("inputs_embeds") is not None:
            return False
        if not self._follows(cache) and not self._begins(cache):
            return False
        length = cache.get_seq_length()
        if length == 0 or (places is not None and int(places[0, -1]) != length):
            return False
        return mask is None or (mask.ndim == 2 and mask.shape[1] == length + 1 and bool(mask.all()))

    def _asked(self, name: str, kwargs: dict[str, Any]) -> bool:
        """What a call says, or the configuration where it says nothing."""
        given = kwargs.get(name)
        return bool(getattr(self.decoder.config, name, USUAL[name]) if given is None else given)

    def _follows(self, cache: DynamicCache) -> bool:
        """Whether the token before came this way, by the plan that holds now: then it is not asked again whether it does, which
        would take a twentieth of a small model's step. So a layer that is moved is noticed at the next text."""
        plan = self.plan.laid.plan
        return plan is not None and bool(cache.layers) and getattr(cache.layers[0], "plan", None) is plan

    def _begins(self, cache: DynamicCache) -> bool:
        """Whether a text can go on this way; lays the plan out."""
        if len(cache.layers) != len(self.plan.blocks) or not self.plan.holds():
            return False
        if not all(type(layer) is RoomyLayer or type(layer) is DynamicLayer for layer in cache.layers):
            return False
        if len({layer.get_seq_length() for layer in cache.layers}) != 1:
            return False
        self.plan.lay_out()
        self.angles = torch.empty(2, 0, 0)  # of frequencies that may be others since the last text
        return True

    def _step(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """The hidden state `[1, 1, H]` that the head takes; appends to the cache."""
        layers: list[RoomyLayer] = []
        for index, layer in enumerate(cache.layers):
            roomy = layer if isinstance(layer, RoomyLayer) else RoomyLayer(layer.keys, layer.values)
            cache.layers[index] = roomy
            layers.append(roomy)
        layers[0].plan = self.plan.laid.plan
        return self._compute(self.plan.laid.plan, self.decoder.embed_tokens(ids), layers)

    def _compute(self, plan: Tensor | None, x: Tensor, layers: list[RoomyLayer]) -> Tensor:
        """The step of a plan's blocks, of which `layers` are the caches."""
        length = layers[0].length
        for layer in layers:
            layer.reserve(1)
        cosine, sine = self._rotation(x, length)
        hidden: Tensor = torch.ops.losa.decode_step(
            x, plan, [layer.rooms[0] for layer in layers], [layer.rooms[1] for layer in layers], cosine, sine,
            self.plan.epsilon, self.plan.scaling, length, self.plan.kernel,
        )  # fmt: skip
        for layer in layers:
            layer.length += 1
        return hidden

    def _rotation(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary position, `[1, 1, width]` each; from a table where they depend on nothing else."""
        rotary = self.decoder.rotary_emb
        if getattr(rotary, "rope_type", None) not in FIXED_ROTATIONS:
            cosine, sine = rotary(x, position_ids=torch.full((1, 1), position))
            return cosine, sine
        angles = self.angles  # another thread may put other ones there
        if position >= angles.shape[1]:
            positions = torch.arange(position + max(ROOM, position // 4))
            self.angles = angles = torch.cat(rotary(x, position_ids=positions[None]))
        row = angles[:, position, None, None]
        return row[0], row[1]

    def _verify(self, word: str) -> bool:
        """Tries the compiled step, by the keyword that the installed transformers has for the cache."""
        difference = self._try(word)
        self.verified = difference <= TOLERANCE
        if not self.verified:
            kind = type(self.decoder).__name__
            logger.warning("%s decodes through transformers: the compiled step differs from it by %.3f", kind, difference)
        return self.verified

    def _try(self, word: str) -> float:
        """How much the step differs from the decoder's modules."""
        plan, x = self.plan, self.decoder.embed_tokens.weight[None, :1]
        if any(turned.dtype != x.dtype for turned in self._rotation(x, 0)):
            return math.inf
        return trial.difference(
            self.decoder, list(plan.blocks), word, lambda block, x, layer: self._compute(plan.of_block(block), x, [layer])
        )


def attach(model: PreTrainedModel) -> bool:
    """Gives a packed model the compiled step; False where its structure or the machine does not allow it."""
    for name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) and all(map(_fits, blocks)):
            decoder: Any = model.get_submodule(name.rpartition(".")[0])
            plan = _Plan.of(decoder, blocks)
            if plan is not None:
                decoder.forward = DecodeStep(decoder, plan)
            return plan is not None
    return False


def detach(model: PreTrainedModel) -> None:
    """Takes it away again."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), DecodeStep):
            del vars(module)["forward"]


def road(model: PreTrainedModel) -> str:
    """How a model's tokens are decoded: by the "compiled step", once it has proved itself, or by "transformers"."""
    steps = [found for module in model.modules() if isinstance(found := vars(module).get("forward"), DecodeStep)]
    return "compiled step" if any(step.verified and step.plan.holds() for step in steps) else "transformers"
