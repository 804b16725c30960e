"""How long a run takes on this machine: one decoder block of random weights does a little of what a run does with all of them.

Measured, each for about half a second: a block's forward as calibration runs it, with and without collecting the pruner's
statistic; its forward and backward as training runs it; head and loss; an optimizer's update; the solver on part of the largest
group of layers. Times of forwards are straight lines through two numbers of tokens: what is fixed (building weights) and what a
token costs. The rest is counting how often a run does each (`work.py`). Where a full row would take too long, a shorter one is
measured, whose attention is cheaper; packed documents, which attend through a mask, are not imitated.

Legend: `S` sequences, `T` tokens, `H` hidden, `O` out_features, `I` in_features, `V` vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from losa.adapter import attach, masked_linears, whole_weights
from losa.calibration import InputStatistics
from losa.config import LosaConfig
from losa.importance import CHUNK, gram
from losa.loss import causal_loss
from losa.models import BlockInputs, block_inputs, find_decoder
from losa.planning.work import evaluation_windows, evaluations, training_rows
from losa.pruning import Pattern, Pruner, get_pruner
from losa.pruning.rounding import NEEDS as ROUNDING_NEEDS
from losa.rules import get_rule

BATCH, EVALUATION_BATCH = 8, 4  # the defaults of walk_blocks and perplexity
ROUNDING = 2  # times what SparseGPT takes for the same layers (docs/LOG.md)
BUDGET = 0.5  # seconds of one measurement, roughly
SHORT, MOST = 32, 8192  # tokens of the first measurement, and of any
VOCABULARY, SEQUENCES = 16384, 256  # of the head and of importance, at most; larger ones are scaled up from there


@dataclass(frozen=True)
class Line:
    """Seconds of something done to tokens: so many a call, and so many a token."""

    call: float
    token: float

    def __call__(self, calls: float, tokens: float) -> float:
        """Seconds of so many calls that are given so many tokens in all."""
        return self.call * calls + self.token * tokens


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _line(prepare: Callable[[int, int], Callable[[], object]], rows: int, length: int, device: torch.device) -> Line:
    """Times `prepare(rows, length)()` for a few tokens and, as far as the budget goes, for as many as a batch has."""
    short = min(length, SHORT)
    work = prepare(1, short)
    low = _seconds(work, device)
    if low < BUDGET / 2:  # the first call also warms up
        low = _seconds(work, device)
    tokens = min(MOST, max(4 * short, int(BUDGET / max(low, 1e-9) * short)))
    rows, length = (1, min(tokens, length)) if tokens < length else (min(rows, tokens // length), length)
    if rows * length <= short:
        return Line(0.0, low / short)
    high = _seconds(prepare(rows, length), device)
    slope = (high - low) / (rows * length - short)
    if slope <= 0:  # noise
        return Line(0.0, high / (rows * length))
    return Line(max(0.0, low - slope * short), slope)


def solver_cost(pruner: Pruner, rows: int, columns: int) -> float:
    """What a solver's time grows with: a factorisation and the columns' elimination of all rows, or just the weights."""
    return float(rows * columns**2 + columns**3) if pruner.matrix else float(rows * columns)


def probe(build: Callable[[], PreTrainedModel], config: LosaConfig, processes: int, device: torch.device) -> dict[str, float]:
    """Seconds of each stage of `losa run`.

    Args:
        build: makes the model, whose weights are never looked at.
        config: resolved.
        processes: how many share the work.
    """
    with torch.random.fork_rng(devices=[]):
        return _Probe(build, config, device).stages(processes)


def probe_bytes(largest_block: int, itemsize: int, parameters: int, prunable: int) -> int:
    """Bytes that a probe takes: a block with all that training a weight takes, embeddings, some activations."""
    return largest_block * (2 * itemsize + 24) + (parameters - prunable) * itemsize + (256 << 20)


class _Probe:
    """One real block, and what it takes to call it."""

    def __init__(self, build: Callable[[], PreTrainedModel], config: LosaConfig, device: torch.device) -> None:
        self.config, self.device, self.pruner = config, device, get_pruner(config.pruner)
        with init_empty_weights(include_buffers=False):
            model = build()
        decoder = find_decoder(model)
        sizes = decoder.sizes()
        self.blocks, self.prunable = sum(sizes) / sizes[0], sum(sizes)  # of the first block's size
        head = model.get_output_embeddings()
        self.vocabulary = 0 if head is None else head.weight.shape[0]
        parent, _, leaf = decoder.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, decoder.blocks[:1])
        _fill(model, device)
        self.whole = config.train.whole
        self.model = attach(model, config.adapter.max_rank, config.adapter.scale, whole=self.whole)
        self.block = find_decoder(self.model).blocks[0]
        self.hidden, self.dtype = int(model.config.get_text_config().hidden_size), model.dtype

    def states(self, rows: int, length: int, batch: int | None = None) -> BlockInputs:
        """Random hidden states, and what the model calls its block with at this length."""
        stream = block_inputs(self.model, torch.zeros(1, length, dtype=torch.int64), 1)
        hidden_STH = torch.randn(rows, length, self.hidden, device=self.device).to(self.dtype)
        return replace(stream, hidden=list(hidden_STH.split(batch or rows)))

    def forward(self) -> Line:
        """The sparse model's block over calibration sequences; without its fixed part, the dense one's."""

        def prepare(rows: int, length: int) -> Callable[[], object]:
            stream = self.states(rows, length)

            def work() -> None:
                with torch.no_grad():
                    stream.output(self.block, 0, 0)

            return work

        return _line(prepare, BATCH, self.config.calibration.length or 1, self.device)

    def collect(self) -> Line:
        """The forward that collects the pruner's statistic. At least two batches where possible: only the first is run whole."""

        def prepare(rows: int, length: int) -> Callable[[], object]:
            stream = self.states(rows, length, max(1, rows // 2))

            def work() -> None:
                with torch.no_grad():
                    InputStatistics(self.pruner).collect(self.block, 0, stream)

            return work

        return _line(prepare, BATCH, self.config.calibration.length or 1, self.device)

    def backward(self, whole: bool, rows: int, length: int) -> Line:
        """Forward and backward, of all weights or of adapters."""

        def prepare(rows: int, length: int) -> Callable[[], object]:
            stream = self.states(rows, length)
            stream.hidden[0].requires_grad_()

            def work() -> None:
                output = stream.output(self.block, 0, 0)
                output.backward(torch.ones_like(output))
                self.block.zero_grad()
                stream.hidden[0].grad = None

            return work

        with whole_weights(self.block) if whole else nullcontext():
            return _line(prepare, rows, length, self.device)

    def head(self, training: bool) -> Line:
        """Head and loss, the teacher's too; of part of the vocabulary, scaled up."""
        train = self.config.train
        distilled = training and bool(train.distill)
        if not self.vocabulary:
            return Line(0.0, 0.0)
        W_VH = torch.randn(min(self.vocabulary, VOCABULARY), self.hidden, device=self.device)
        W_VH = (W_VH / self.hidden**0.5).to(self.dtype)  # logits of a size that exponentials take: denormal numbers are slow

        def prepare(rows: int, length: int) -> Callable[[], object]:
            x = torch.randn(rows, length, self.hidden, device=self.device).to(self.dtype).requires_grad_(training)
            ids = torch.zeros(rows, length, dtype=torch.int64, device=self.device)

            def work() -> None:
                with torch.no_grad():
                    teacher = linear(x, W_VH) if distilled else None
                with torch.set_grad_enabled(training):
                    loss = causal_loss(linear(x, W_VH), ids, teacher, train.distill, train.temperature)
                if training:
                    loss.backward()

            return work

        rows, length = (train.batch_size or 1, train.length) if training else (EVALUATION_BATCH, self.config.eval.length)
        found, times = _line(prepare, rows, length or 1, self.device), self.vocabulary / len(W_VH)
        return Line(found.call * times, found.token * times)

    def update(self, whole: bool) -> float:
        """Seconds of an optimizer's update of all blocks, with clipping and the guard's norms; of all weights or of adapters."""
        with whole_weights(self.block) if whole else nullcontext():
            parameters = [p for layer in masked_linears(self.block).values() for p in layer.trained.values()]
            gradients = [torch.full_like(parameter, 1e-3) for parameter in parameters]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

            def work() -> None:
                nn.utils.clip_grad_norm_(parameters, 0.3)
                torch._foreach_norm(gradients)
                optimizer.step()

            work()  # makes the moments
            found = _seconds(work, self.device)
            self.block.zero_grad()
        return found * self.blocks

    def solve(self, pruner: Pruner) -> float:
        """Seconds of solving the layers of a block: of a corner of the largest group, as large as affordable, scaled up."""
        groups = [(sum(self.shape(name)[0] for name in names), self.shape(names[0])[1]) for names in self.groups()]
        costs = [solver_cost(pruner, *group) for group in groups]
        rows, columns = max(zip(costs, groups, strict=True))[1]
        pattern = Pattern.parse(self.config.pattern)
        multiple = pattern.m if pattern.structured else 1
        side, full = 128, max(rows, columns)
        while True:
            O, I = min(rows, side), max(multiple, min(columns, side) // multiple * multiple)  # noqa: E741 - as in the legend
            taken = _seconds(self._corner(pruner, pattern, O, I), self.device)
            if taken > BUDGET / 4 or side >= full:
                return taken / solver_cost(pruner, O, I) * sum(costs)
            side *= 2

    def _corner(self, pruner: Pruner, pattern: Pattern, O: int, I: int) -> Callable[[], object]:  # noqa: E741
        W_OI = torch.randn(O, I, device=self.device)
        statistic: Tensor | None = None
        if pruner.from_training:
            statistic = torch.randn(O, I, device=self.device)
        elif pruner.collect is not None:
            statistic = pruner.collect(None, torch.randn(2 * I, I, device=self.device))
        keep_OI, rate = torch.ones_like(W_OI, dtype=torch.bool), self.config.sparsity or 0.5
        return lambda: pruner.solve([W_OI], [keep_OI], statistic, [rate], pattern, 1.0)

    def shape(self, name: str) -> tuple[int, int]:
        """Of a layer's weight."""
        weight = masked_linears(self.block)[name].weight
        return weight.shape[0], weight.shape[1]

    def groups(self) -> Sequence[Sequence[str]]:
        """Layers that share a statistic."""
        statistics = InputStatistics(self.pruner)
        with torch.no_grad():
            statistics.collect(self.block, 0, self.states(1, 8))
        return [names for names, _ in statistics.groups(self.block)]

    def importance(self, sequences: int, length: int) -> float:
        """Seconds a block of comparing what was seen; its forward is not in it."""
        if get_rule(self.config.rates).needs == "norms":  # scores and their order
            return self.solve(get_pruner("wanda"))
        count, features = min(sequences, SEQUENCES), length * self.hidden
        F_nD = torch.randn(count, min(CHUNK, features), device=self.device).to(self.dtype)
        gram(F_nD)
        return _seconds(lambda: gram(F_nD), self.device) * features / F_nD.shape[1] * (sequences / count) ** 2

    def stages(self, processes: int) -> dict[str, float]:
        """Seconds of each stage, of all blocks and tokens."""
        config, L, P = self.config, self.blocks, processes
        calibrating, reconstruct = config.calibration, config.reconstruct
        window, sequences = calibrating.length or 1, -(-(calibrating.sequences or 1) // P)
        forward, calls = self.forward(), -(-sequences // BATCH)
        collect = self.collect() if self.pruner.collect is not None else Line(0.0, 0.0)
        solving = self.solve(self.pruner) / min(P, len(self.groups()))
        walk = L * (forward(calls, sequences * window) + collect(calls, sequences * window) + solving)
        errors = config.steps * min(calibrating.error_sequences, calibrating.sequences or 1)
        found = {"baseline": walk if config.steps > 1 else 0.0, "importance": 0.0}
        if seen := config.importance_sequences:
            short = min(calibrating.rmi_length, window)
            comparing = self.importance(seen, short)
            found["importance"] = config.steps * L * (forward(-(-seen // P // BATCH), seen / P * short) + comparing)
        found["pruning"] = config.steps * walk + L * forward(0, errors / P * window)
        found["reconstruction"] = 0.0
        if reconstruct.epochs:
            length, pieces = reconstruct.length, config.reconstructed_pieces
            line, update = self.backward(True, reconstruct.batch_size, length), self.update(whole=True)
            seen = -(-pieces // P)  # by both streams once more, and in every epoch
            updates = reconstruct.epochs * -(-pieces // reconstruct.batch_size)  # a batch is of all processes
            trained = line(updates, reconstruct.epochs * seen * length)
            found["reconstruction"] = L * (trained + 2 * forward(-(-seen // BATCH), seen * length))
            found["reconstruction"] += updates * update
        found["rounding"] = 0.0
        if config.values:  # every process rounds all layers
            rounding = ROUNDING * self.solve(ROUNDING_NEEDS)
            found["rounding"] = L * (forward(calls, sequences * window) + collect(calls, sequences * window) + rounding)
        found["training"] = self._training(forward, P)
        windows, shown = -(-evaluation_windows(config) // P), config.eval.length or 1
        calls = -(-windows // EVALUATION_BATCH)
        once = L * forward(calls, windows * shown) + self.head(training=False)(calls, windows * shown)
        return found | {"evaluation": evaluations(config) * once}

    def _training(self, forward: Line, processes: int) -> float:
        train, length = self.config.train, self.config.train.length or 1
        rows = training_rows(self.config)
        batch = train.batch_size or 1
        calls, tokens = -(-rows // batch), rows * length / processes
        each = self.backward(self.whole, -(-batch // processes), length)
        seconds = self.blocks * each(calls, tokens) + self.head(training=True)(calls, tokens)
        if train.gradient_checkpointing:
            seconds += self.blocks * forward(calls, tokens)
        if train.distill or train.distill_blocks:  # the dense model builds no weights
            seconds += self.blocks * forward(0, tokens)
        return seconds + self.update(self.whole) * calls / train.accumulation


def _fill(model: PreTrainedModel, device: torch.device) -> None:
    """Gives a model without bytes some: small random matrices in its blocks, zeros elsewhere, ones for norms."""
    inside = set(find_decoder(model).blocks.modules())
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                tensor = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
                if parameter.ndim > 1 and module in inside:
                    tensor.normal_(std=0.02)
                elif parameter.ndim == 1 and name == "weight":
                    tensor.fill_(1.0)
                made[id(parameter)] = nn.Parameter(tensor)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
