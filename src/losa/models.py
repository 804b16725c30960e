"""Any causal language model, by structure: its decoder blocks, their linear layers, and how to run one block alone.

No architecture is known by name. A decoder is the `ModuleList` that holds most of the model's linear weights; a block
is one of its entries; what a block is called with (rotary embeddings, masks of sliding or full attention, position ids)
is recorded from the model's own forward, block by block, so nothing here repeats what a modelling file does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from losa.config import LosaConfig


def load(model: str | Path | LosaConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, from safetensors only: no pickle is ever opened. Packed checkpoints open packed.

    Args:
        model: a directory or hub name, dense, sparse or packed; or a configuration that names one, with dtype and trust.

    Raises:
        ValueError: nothing there, or nothing that transformers opens.
    """
    from losa.runtime import plugin  # noqa: F401 - importing it lets transformers open packed checkpoints; it imports this module

    config = model if isinstance(model, LosaConfig) else LosaConfig.from_dict({"model": str(model)})
    trust = {"trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(config)
    with one_line(config.model):
        loaded = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype, use_safetensors=True, **trust)
    return loaded, tokenizer


def load_tokenizer(config: LosaConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that a configuration names, without its weights.

    Raises:
        ValueError: nothing there, or nothing that transformers opens.
    """
    with one_line(config.model):
        return AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)


def load_config(config: LosaConfig) -> PreTrainedConfig:
    """The configuration of the model that a configuration names, without its weights.

    Raises:
        ValueError: nothing there, or nothing that transformers opens.
    """
    with one_line(config.model):
        return AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)


def _check_directory(model: Path) -> None:
    """Says what a local directory lacks, where transformers would guess or look on the hub.

    Raises:
        ValueError: a path that does not exist, an adapter, an interrupted run, or something else that is no model.
    """
    from losa.checkpoint import work_dir  # it imports this module

    if not model.exists():
        if model.is_absolute() or str(model).startswith((".", "~")):
            raise ValueError(f"there is no model at {model}")
        return  # a name on the hub
    if (model / "config.json").is_file():
        return
    if (model / "adapter_config.json").is_file():
        raise ValueError(
            f"{model} is an adapter, not a model; merge it into its base first (peft's merge_and_unload) and save that"
        )
    if work_dir(model).is_dir():
        raise ValueError(f"{model} holds an interrupted run, not a model yet; finish it with --resume")
    raise ValueError(f"{model} is not the directory of a model: it has no config.json")


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turns what transformers says about a model that does not open into one line with its name.

    Raises:
        ValueError: that line; or, before anything is opened, what a local directory lacks.
    """
    _check_directory(Path(name))
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot open the model {name!r}: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Decoder:
    """The blocks of a model, in order, and the dotted name of the list that holds them."""

    name: str
    blocks: nn.ModuleList

    def linears(self) -> dict[str, nn.Linear]:
        """All linear layers of all blocks, by their name in the whole model."""
        return {
            f"{self.name}.{index}.{name}": linear
            for index, block in enumerate(self.blocks)
            for name, linear in block_linears(block).items()
        }

    def sizes(self) -> list[int]:
        """Prunable weights of each block."""
        return [sum(linear.weight.numel() for linear in block_linears(block).values()) for block in self.blocks]


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of one block, by their name in the block, in the model's order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Finds the decoder blocks by structure.

    Raises:
        ValueError: no block list with linear layers; the message says what the model has instead.
    """
    if "Conv1D" in {type(module).__name__ for module in model.modules()}:
        raise ValueError(f"{type(model).__name__} is built of Conv1D layers (GPT-2 style), LoSA needs nn.Linear")
    lists = [Decoder(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    # An outer list also counts the linears of the lists inside it, and comes first: max returns the outermost.
    decoder = max(lists, key=lambda candidate: sum(candidate.sizes()), default=None)
    if decoder is None or not sum(decoder.sizes()):
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks made of nn.Linear; nothing to prune")
    return decoder


def check_supported(model: PreTrainedModel) -> None:
    """Refuses, in one sentence, what LoSA cannot prune honestly.

    Raises:
        ValueError: quantised base, Conv1D, fused experts, encoder-decoder, multi-modal, weights that are not finite or not float.
    """
    kind = type(model).__name__
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{kind} is quantised; LoSA prunes bf16, fp16 or fp32 weights, so load the original checkpoint")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder; LoSA supports causal language models")
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"{kind} is multi-modal; LoSA takes text models, so load its language model alone")
    decoder = find_decoder(model)
    for name, parameter in decoder.blocks.named_parameters():
        if parameter.ndim == 3:
            found = f"{decoder.name}.{name} {tuple(parameter.shape)}"
            raise ValueError(f"{kind} keeps fused experts in {found}; LoSA needs one nn.Linear per matrix")
    for name, linear in decoder.linears().items():
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            raise ValueError(f"{name} is a {type(linear).__name__} of {linear.weight.dtype}, expected a plain float nn.Linear")
        real = linear.weight.device.type != "meta" and not isinstance(linear.weight.data, FakeTensor)
        if real and not torch.isfinite(linear.weight).all():
            raise ValueError(f"{name} holds NaN or infinite weights; the checkpoint is damaged")


def max_length(config: Any) -> int:
    """Longest window the model allows, in tokens (`max_position_embeddings`), or 2048 where it does not say."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2048)


@dataclass
class BlockInputs:
    """Hidden states at the input of the current block, and the keyword arguments of each block's call.

    Attributes:
        hidden: `S` sequences in batches, each `(b, T, H)`; replaced, batch by batch, as the stream advances.
        kwargs: one dict a block; the same for all sequences, as all have the same length and no padding.
    """

    hidden: list[Tensor]
    kwargs: list[dict[str, Any]]

    def first(self, count: int) -> "BlockInputs":
        """A second stream of the first `count` sequences. Tensors are shared until one of the two advances."""
        hidden = []
        for batch in self.hidden:
            if count > 0:
                hidden.append(batch[:count])
            count -= len(batch)
        return BlockInputs(hidden, self.kwargs)

    def run(self, block: nn.Module, index: int, hidden_bTH: Tensor) -> Tensor:
        """What block number `index` makes of any hidden states, called as the model calls it, on the device it is on."""
        device = next(block.parameters()).device
        output = block(hidden_bTH.to(device), **_to(self.kwargs[index], device))
        return output[0] if isinstance(output, tuple) else output

    def output(self, block: nn.Module, index: int, batch: int) -> Tensor:
        """Runs block number `index` over one batch; the stream itself stays where it is."""
        return self.run(block, index, self.hidden[batch])

    def advance(self, block: nn.Module, index: int) -> None:
        """Replaces the hidden states by the block's outputs, kept on the device the inputs were on."""
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self.output(block, index, batch).to(hidden.device)


def _to(value: Any, device: torch.device) -> Any:
    """Moves the tensors of a nested argument."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return type(value)(_to(item, device) for item in value) if isinstance(value, tuple | list) else value


class _Recorder:
    """Stands in for a block's forward: notes how it is called and passes the hidden states through."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise ValueError(f"blocks take positional arguments {[type(a).__name__ for a in args]}; not supported")
        self.hidden, self.kwargs = hidden_states, kwargs
        return hidden_states


@contextmanager
def _stand_ins(modules: Sequence[nn.Module], forwards: Sequence[Any]) -> Iterator[None]:
    """Replaces every module's forward for a while."""
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)  # the class's own forward shows again


@torch.no_grad()
def block_inputs(model: PreTrainedModel, ids_ST: Tensor, batch_size: int = 8) -> BlockInputs:
    """Embeds the sequences and records how each block is called, without running any block.

    The model's own forward runs with every block replaced by a recorder and without its head, so it costs an embedding lookup.
    (The head of one token a sequence would cost as much as a block: torch copies a frozen weight for inputs that are slices.)
    The arguments are recorded on one sequence: masks and positions then broadcast over any batch.

    Args:
        ids_ST: token ids, `S` sequences of `T` tokens, no padding.
        batch_size: sequences advanced together.
    """
    blocks, head = find_decoder(model).blocks, model.get_output_embeddings()
    recorders = [_Recorder() for _ in blocks]
    heads = [] if head is None else [head]
    ids_ST = ids_ST.to(model.get_input_embeddings().weight.device)
    hidden = []
    with _stand_ins([*blocks, *heads], [*recorders, *[lambda hidden: hidden] * len(heads)]):
        for batch in ids_ST.split(batch_size):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
            assert recorders[0].hidden is not None
            hidden.append(recorders[0].hidden)
        model(input_ids=ids_ST[:1], use_cache=False, logits_to_keep=1)
    return BlockInputs(hidden, [recorder.kwargs for recorder in recorders])


@torch.no_grad()
def logits_by_block(
    model: PreTrainedModel, ids_ST: Tensor, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ids and their logits, with one block at a time on the device: all sequences go through it, then the next.

    What follows the last block (a norm, the head) is the model's own forward, every block passing on the stream's state.
    """
    blocks = find_decoder(model).blocks
    stream = block_inputs(model, ids_ST, batch_size)
    for index, block in enumerate(blocks):
        with on_device(block, device):
            stream.advance(block, index)
    for batch, hidden in zip(ids_ST.split(batch_size), stream.hidden, strict=True):
        ids = batch.to(hidden.device)
        with _stand_ins(list(blocks), [lambda *args, hidden=hidden, **kwargs: hidden] * len(blocks)):
            yield ids, model(input_ids=ids, use_cache=False).logits


@contextmanager
def on_device(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Has a block on `device` for a while, and puts it back where it was."""
    home = next(block.parameters()).device
    if device is None or device == home:
        yield
        return
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


def place(model: PreTrainedModel, device: torch.device, offload: bool) -> None:
    """Puts the model on the device; with `offload`, its decoder blocks stay on the host and only the rest goes."""
    if not offload:
        model.to(device)
        return
    blocks = find_decoder(model).blocks
    blocks.to("cpu")
    inside = set(blocks.modules())
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
