"""The decoder blocks of any causal language model, by structure, and how to run one of them alone.

No architecture is known by name. A decoder is the `ModuleList` that holds most of the model's linear weights; a block
is one of its entries; what a block is called with (rotary embeddings, masks of sliding or full attention, position ids)
is recorded from the model's own forward, block by block, so nothing here repeats what a modelling file does. What would make the
blocks' outputs depend on more than that is found by trying, and refused.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

TRIED = 8  # tokens that a block is tried with, to see what it returns


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


@dataclass(frozen=True)
class Call:
    """How a model calls one of its blocks besides with hidden states, and in which form the block returns them.

    Attributes:
        keyword: what hidden states are called in the call; None where they come first.
        size: of the tuple whose first entry is the hidden states; None for hidden states alone.
        repeated: which of the tensors in `args` and `kwargs` have a part for every sequence, along their first dimension; the
            others broadcast.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    keyword: str | None = None
    size: int | None = None
    repeated: tuple[bool, ...] = ()

    def tensors(self) -> list[Tensor]:
        """All tensors in the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def __call__(self, block: nn.Module, hidden_bTH: Tensor) -> Any:
        """Runs the block, on the device it is on."""
        device, batch = next(block.parameters()).device, len(hidden_bTH)
        parts = iter(self.repeated or [False] * len(self.tensors()))

        def fit(tensor: Tensor) -> Tensor:
            """On the device, and for all sequences where it was recorded for one."""
            moved, rest = tensor.to(device), [1] * (tensor.ndim - 1)
            if not next(parts):
                return moved
            return moved.repeat(batch, *rest) if len(moved) > 1 else moved.expand(batch, *moved.shape[1:])

        (args, kwargs), hidden = tree_map_only(Tensor, fit, (self.args, self.kwargs)), hidden_bTH.to(device)
        return block(*args, **kwargs, **{self.keyword: hidden}) if self.keyword else block(hidden, *args, **kwargs)

    def form(self, hidden_bTH: Tensor) -> Any:
        """Hidden states in the form that the block returns them in."""
        return hidden_bTH if self.size is None else (hidden_bTH, *[None] * (self.size - 1))


@dataclass
class BlockInputs:
    """Hidden states at the input of the current block, and how each block is called.

    Attributes:
        hidden: `S` sequences in batches, each `(b, T, H)`; replaced, batch by batch, as the stream advances.
        calls: one a block; the same for all sequences, as all have the same length and no padding.
    """

    hidden: list[Tensor]
    calls: list[Call]

    def first(self, count: int) -> "BlockInputs":
        """A second stream of the first `count` sequences. Tensors are shared until one of the two advances."""
        hidden = []
        for batch in self.hidden:
            if count > 0:
                hidden.append(batch[:count])
            count -= len(batch)
        return BlockInputs(hidden, self.calls)

    def run(self, block: nn.Module, index: int, hidden_bTH: Tensor) -> Tensor:
        """What block number `index` makes of any hidden states, called as the model calls it, on the device it is on."""
        output = self.calls[index](block, hidden_bTH)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def output(self, block: nn.Module, index: int, batch: int) -> Tensor:
        """Runs block number `index` over one batch; the stream itself stays where it is."""
        return self.run(block, index, self.hidden[batch])

    def advance(self, block: nn.Module, index: int) -> None:
        """Replaces the hidden states by the block's outputs, kept on the device the inputs were on."""
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self.output(block, index, batch).to(hidden.device)


class _Passing:
    """Stands in for a block's forward: returns the same, whatever comes."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class _Recorder:
    """Stands in for a block's forward: notes how it is called and passes the hidden states through."""

    def __init__(self, name: str, like: Call | None = None) -> None:
        self.name, self.like = name, like or Call()
        self.calls = 0
        self.hidden: Tensor | None = None
        self.call = Call()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        keyword = None if args else next((name for name in ("hidden_states", *tensors) if name in tensors), None)
        hidden = kwargs.pop(keyword) if keyword else args[0] if args else None
        if not isinstance(hidden, Tensor):
            raise ValueError(f"{self.name} is called with {type(hidden).__name__} first, expected hidden states")
        self.hidden, self.call = hidden, replace(self.like, args=args[1:], kwargs=kwargs, keyword=keyword)
        return self.call.form(hidden)


class _Trial(_Recorder):
    """A recorder that also runs the block, to see what it returns, and passes the hidden states on in that form."""

    def __init__(self, name: str, block: nn.Module, sizes: dict[Any, int | None]) -> None:
        super().__init__(name)
        self.block, self.sizes = block, sizes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        assert self.hidden is not None
        for name, value in [*enumerate(self.call.args, 1), *self.call.kwargs.items()]:
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value)):
                raise ValueError(f"{self.name} is called with {name}, which depends on the text, besides its hidden states")
        key = _structure(self.block)
        if key not in self.sizes:
            self.sizes[key] = self._try(self.hidden.detach())
        self.call = replace(self.call, size=self.sizes[key])
        return self.call.form(self.hidden)

    @torch.no_grad()
    def _try(self, hidden_bTH: Tensor) -> int | None:
        """Runs the block for once; the size of the tuple it returns, or None."""
        linears, called = block_linears(self.block), set[str]()
        handles = [linear.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, linear in linears.items()]
        holders = [leaf for leaf in (*self.call.args, *self.call.kwargs.values()) if isinstance(leaf, dict | list)]
        lengths = list(map(len, holders))
        stand_in = self.block.__dict__.pop("forward", None)
        try:
            output = self.call(self.block, hidden_bTH)
        finally:
            if stand_in is not None:
                self.block.forward = stand_in
            for handle in handles:
                handle.remove()
        returned = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(returned, Tensor) or returned.shape != hidden_bTH.shape:
            found = f"shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else f"a {type(returned).__name__}"
            raise ValueError(f"{self.name} returns {found} for hidden states of {tuple(hidden_bTH.shape)}, expected the same")
        if list(map(len, holders)) != lengths:
            raise ValueError(f"{self.name} leaves results for later blocks, besides its hidden states")
        for name in linears:
            if name not in called and not any(part.isdigit() for part in name.split(".")):  # experts that no token reached
                raise ValueError(f"{self.name} never calls its {name} as a layer, so what goes into it is not seen")
        return len(output) if isinstance(output, tuple) else None


def _structure(block: nn.Module) -> Any:
    """Equal for blocks that are made alike."""
    return type(block), tuple((name, type(module)) for name, module in block.named_modules())


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


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, autograd follows whatever is made of the text: what the embedding tables of the vocabulary give."""
    table = model.get_input_embeddings()
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings >= table.num_embeddings]
    before = [weight.requires_grad for weight in tables]
    try:
        for weight in tables:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, flag in zip(tables, before, strict=True):
            weight.requires_grad_(flag)


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """What keeps a forward short, as far as the model takes it."""
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in taken}


def _calls(model: PreTrainedModel, ids_ST: Tensor) -> list[Call]:
    """How each block is called with a few tokens of a sequence, and what it returns, found by trying one of each structure.

    Raises:
        ValueError: blocks that cannot be run alone, in one sentence.
    """
    decoder, head = find_decoder(model), model.get_output_embeddings()
    sizes: dict[Any, int | None] = {}
    kind, heads = type(model).__name__, [] if head is None else [head]
    trials = [
        _Trial(f"{kind}: block {index} ({type(block).__name__})", block, sizes) for index, block in enumerate(decoder.blocks)
    ]
    ids_1T = ids_ST[:1, :TRIED]
    versions = {name: parameter._version for name, parameter in decoder.blocks.named_parameters()}
    with _stand_ins([*decoder.blocks, *heads], [*trials, *[lambda hidden: hidden] * len(heads)]), _differentiable(model):
        model(input_ids=ids_1T, **_options(model))
    for name, parameter in decoder.blocks.named_parameters():
        if parameter._version != versions[name]:
            raise ValueError(f"{kind} changes its own weight {decoder.name}.{name} when it runs; LoSA would save it changed")
    for before, trial in zip([None, *trials], trials, strict=False):
        if trial.calls != 1:
            raise ValueError(f"{trial.name} is called {trial.calls} times in a forward, expected once")
        if before is not None and trial.hidden is not before.hidden:
            raise ValueError(f"{trial.name} is called with something else than what the block before it returns")
    return [trial.call for trial in trials]


def _parts(one: Call, two: Call) -> tuple[bool, ...]:
    """Which tensors of a call for one sequence are twice as long in the call for two."""
    pairs = zip(one.tensors(), two.tensors(), strict=True)
    return tuple(a.ndim > 0 and len(b) == 2 * len(a) for a, b in pairs)


def try_blocks(model: PreTrainedModel) -> None:
    """Runs one block of every structure with a few tokens, called as the model calls it.

    Raises:
        ValueError: blocks that cannot be run alone, in one sentence.
    """
    if model.get_input_embeddings().weight.is_meta:  # fake tensors take part in what a model decides by its tensors' values
        model = deepcopy(model)
        with FakeTensorMode(), torch.device("cpu"):  # another one may be in force: `from_pretrained` has "meta"
            try_blocks(model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)))
        return
    training = model.training
    device = model.get_input_embeddings().weight.device
    try:
        model.eval()  # no dropout, and no block that is left out
        with torch.no_grad():
            _calls(model, torch.zeros(1, TRIED, dtype=torch.int64, device=device))
    finally:
        model.train(training)


@torch.no_grad()
def block_inputs(model: PreTrainedModel, ids_ST: Tensor, batch_size: int = 8) -> BlockInputs:
    """Embeds the sequences and records how each block is called, without running any block but on a few tokens.

    The model's own forward runs with every block replaced by a recorder and without its head, so it costs an embedding lookup.
    (The head of one token a sequence would cost as much as a block: torch copies a frozen weight for inputs that are slices.)
    The arguments are recorded on one sequence: masks and positions then broadcast over any batch, or are repeated where they have
    a part for every sequence. Which do is found by comparing one whole sequence with two: there are models that make a mask only
    where a text is longer than their window.

    Args:
        ids_ST: token ids, `S` sequences of `T` tokens, no padding.
        batch_size: sequences advanced together.

    Raises:
        ValueError: blocks that cannot be run alone, in one sentence.
    """
    blocks, head = find_decoder(model).blocks, model.get_output_embeddings()
    ids_ST = ids_ST.to(model.get_input_embeddings().weight.device)
    recorders = [_Recorder(f"block {index}", call) for index, call in enumerate(_calls(model, ids_ST))]
    heads = [] if head is None else [head]
    hidden = []
    with _stand_ins([*blocks, *heads], [*recorders, *[lambda hidden: hidden] * len(heads)]):
        for batch in ids_ST.split(batch_size):
            model(input_ids=batch, **_options(model))
            assert recorders[0].hidden is not None
            hidden.append(recorders[0].hidden)
        model(input_ids=ids_ST[:1].repeat(2, 1), **_options(model))
        doubles = [recorder.call for recorder in recorders]
        model(input_ids=ids_ST[:1], **_options(model))
    calls = [
        replace(recorder.call, repeated=_parts(recorder.call, two)) for recorder, two in zip(recorders, doubles, strict=True)
    ]
    return BlockInputs(hidden, calls)


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
        with _stand_ins(list(blocks), [_Passing(call.form(hidden)) for call in stream.calls]):
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
