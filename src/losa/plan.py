"""What a run will need, before anything is loaded: the model is built on the meta device, where tensors have shapes and no bytes.

Counted: weights, masks, what is trained, optimizer state, hidden states, statistics. Simulated: what a training step, a block's
forward, its reconstruction and an evaluation batch have alive at their peak, by running them on fake tensors (real operators, no
bytes), on a few blocks of the model; the blocks are alike, so the rest is a straight line. Estimated: time, from a short probe of
one block of random weights (`probe.py`). Of a device elsewhere, or a block too large to try, time is a lower bound: the flops of
the large products (`work.py`) over the speed of one such product, given or measured here.

Legend: `S` sequences, `T` tokens, `H` hidden, `O` out_features, `I` in_features, `V` vocabulary, `P` processes.
"""

import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from losa import loss
from losa.adapter import attach, dense_mode
from losa.calibration import InputStatistics
from losa.config import LosaConfig
from losa.environment import resolve_device
from losa.loss import causal_loss
from losa.models import Decoder, block_inputs, block_linears, check_supported, find_decoder, max_length
from losa.opening import check_model, open_config
from losa.probe import BATCH, EVALUATION_BATCH, probe, probe_bytes
from losa.pruning import Pruner, get_pruner
from losa.session import check_decoder, check_parts
from losa.training import activation_checkpointing, every_block
from losa.work import evaluation_windows, stage_flops

LIBRARY_BYTES = (
    150 << 20
)  # of a CPU: pages and workspaces that libraries take at first use, holes in the heap; measured (docs/LOG.md)
CONTEXT_BYTES = 600 << 20  # of a GPU: the driver's context and the libraries' workspaces; an estimate, not measured
SOLUTION_BYTES = 5  # a weight of the block that is being pruned: float32 answers and masks, until all its layers are solved
SIMULATED_ROWS = 64  # of a training step; larger batches are scaled up from here


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds, and what there is of them; of each process, where there are several."""

    parameters: int
    prunable: int
    runtime: int  # bytes, as all fields below: Python, torch and transformers themselves
    weights: int
    masks: int  # a bit a weight
    dense_copy: int  # host; where pruning or reconstruction changes the base weights, the dense ones are kept for errors
    trained: int  # all weights, or adapters: float32 values, gradients and both Adam moments
    training: int  # beyond these, at the peak of a training step, distillation included
    calibration: int  # likewise of pruning: streams of hidden states; one block's statistics, solver, reconstruction
    evaluation: int  # likewise of perplexity
    peak_memory: int
    available_memory: int
    host_memory: int  # the model is loaded here first; the same as peak_memory on a CPU
    available_host: int
    disk: int
    available_disk: int
    stages: dict[str, float]  # seconds, in the order of a run
    seconds: float  # of all stages
    probed: bool  # whether seconds come from a probe on this machine; if not, they are a lower bound
    windows: int  # of evaluation; assumed unless eval.windows is set
    processes: int
    device: str

    @property
    def fits(self) -> bool:
        """Whether memory, on the device and on the host, and disk suffice."""
        memory = self.peak_memory <= self.available_memory and self.host_memory <= self.available_host
        return memory and self.disk <= self.available_disk

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, for JSON."""
        return asdict(self) | {"fits": self.fits}


def plan(config: LosaConfig, processes: int = 1, memory: int | None = None, flops: float | None = None) -> Plan:
    """Computes the plan of `losa run` with this configuration.

    Args:
        processes: how many share the work, on a device each.
        memory: bytes of a device that is not here: the plan is then for that one.
        flops: its sustained speed in FLOP/s.

    Raises:
        ValueError: the model or the configuration is not supported, or the processes cannot share its batches.
    """
    model_config = open_config(config.model, config.trust_remote_code, packed=False)
    model = check_model(model_config, config.model, config.trust_remote_code)
    dtype = _dtype(config, model_config)

    def build() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code).eval()

    check_supported(model)
    decoder = find_decoder(model)
    check_decoder(decoder, config)
    text_config = model.config.get_text_config()
    config = config.resolve(text_config.hidden_size, max_length(model.config))
    check_parts(config, processes)
    elsewhere = memory is not None or flops is not None
    device = "elsewhere" if elsewhere else str(resolve_device(config.device))
    host = device == "cpu"
    parameters, prunable = sum(p.numel() for p in model.parameters()), sum(decoder.sizes())
    pruner, whole = get_pruner(config.pruner), config.train.whole
    of_blocks = [_trained_values(block, config) for block in decoder.blocks]
    trained = sum(of_blocks)
    weights, masks = parameters * dtype.itemsize, prunable // 8
    reused = prunable * dtype.itemsize * config.train.reuse_weights
    scores = 4 * prunable * pruner.from_training
    changes_base = pruner.keeps_dense(whole) or (bool(config.reconstruct.epochs) and not whole)
    dense_copy = prunable * dtype.itemsize if changes_base else 0
    resident_here = psutil.Process().memory_info().rss
    runtime = resident_here + LIBRARY_BYTES if host else CONTEXT_BYTES
    training = simulate_training(build, config, processes) - 4 * trained
    calibration = _calibration_bytes(build, config, decoder, text_config.hidden_size, dtype.itemsize, processes)
    evaluation = max(simulate_evaluation(build, config), prunable * dtype.itemsize)  # samples keep the weights they are made with
    # The dense copy is on the host, except while a distilling teacher uses it.
    teacher = dense_copy if host or (config.train.distill and not config.blocks_on_host) else 0
    largest_block = max(decoder.sizes()) * dtype.itemsize
    away = config.blocks_on_host and not host
    if away:
        # Of all parameters a part, or with offload none; and two blocks whole, the one that runs and the next one.
        part = 0 if config.offload else (weights + 16 * trained) // processes
        resident = part + 2 * (largest_block + 4 * max(of_blocks)) + masks
    else:
        # Scores twice: those of the steps before, and those of this one.
        resident = weights + masks + 16 * trained + teacher + reused + 2 * scores
    # All blocks but one may be on the host while calibrating and evaluating.
    outside = weights - prunable * dtype.itemsize + largest_block
    kept = masks + (outside if away else weights) + 4 * (max(of_blocks) if away else trained)
    kept += (dense_copy if host else 0) + scores
    peak = runtime + max(resident + training, kept + max(calibration, evaluation))
    # What is trained is made on the host; with offload, its gradients and moments stay there too.
    loaded = weights + dense_copy + (16 if away and config.offload else 4) * trained
    loaded = max(loaded, dense_copy + 12 * trained)  # a position inside the training passes through the host
    # Two stages are kept; beside them lies the result, or a position inside the training and the next one, of 12 bytes each.
    disk = 2 * (masks + dense_copy + 4 * trained) + max(weights, 2 * 12 * trained)
    output = Path(config.output or ".").absolute()
    existing = next(parent for parent in (output, *output.parents) if parent.exists())
    available = memory if memory is not None else _free_memory(torch.device("cpu" if elsewhere else device))
    probed = not elsewhere
    if probed:
        largest = max(decoder.sizes())
        probed = probe_bytes(largest, dtype.itemsize, parameters, prunable) < available // 2
    if probed:
        stages = probe(build, config, processes, torch.device(device))
    else:
        tokens = config.train.batch_size * (config.train.length or 0) // processes
        speed = flops or _speed(decoder, min(tokens, 8192), dtype, resolve_device(config.device))
        stages = {name: count / speed / processes for name, count in stage_flops(config, decoder, text_config).items()}
    return Plan(
        parameters=parameters,
        prunable=prunable,
        runtime=runtime,
        weights=weights,
        masks=masks,
        dense_copy=dense_copy,
        trained=16 * trained,
        training=training,
        calibration=calibration,
        evaluation=evaluation,
        peak_memory=peak,
        available_memory=available,
        host_memory=peak if host else resident_here + loaded,
        available_host=_free_memory(torch.device("cpu")),
        disk=disk,
        available_disk=shutil.disk_usage(existing).free,
        stages=stages,
        seconds=sum(stages.values()),
        probed=probed,
        windows=evaluation_windows(config),
        processes=processes,
        device=device,
    )


def _trained_values(block: nn.Module, config: LosaConfig) -> int:
    """Numbers that are trained in a block."""
    linears = block_linears(block).values()
    if config.train.whole:
        return sum(linear.weight.numel() for linear in linears)
    return config.adapter.max_rank * sum(linear.in_features + linear.out_features for linear in linears)


def _dtype(config: LosaConfig, model_config: Any) -> torch.dtype:
    own = getattr(model_config, "dtype", None) or torch.float32
    dtype = own if config.dtype == "auto" else getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return torch.bfloat16 if dtype == torch.float16 else dtype  # as session.check_precision does


class _Meter(TorchDispatchMode):
    """Bytes of the storages made since it was entered: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in known | self.known:
                    self.known.add(storage._cdata)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


@contextmanager
def _one_chunk() -> Iterator[None]:
    """Has the loss work on its first chunk of logits only, while it lasts: all are alike, and thousands of them take their time
    even on fake tensors."""
    chunk, seen = loss._chunk, False

    def first(student_CV: Tensor, *rest: Any) -> Tensor:
        nonlocal seen
        if seen:
            return torch.zeros((), dtype=torch.float64, device=student_CV.device)
        seen = True
        return chunk(student_CV, *rest)

    with patch.object(loss, "_chunk", first):
        yield


def _simulate(build: Callable[[], PreTrainedModel], config: LosaConfig, work: Callable[[PreTrainedModel], None]) -> int:
    """Bytes that `work` has alive at its peak, besides the model: measured on two and on three of its blocks."""

    def peak(count: int) -> int:
        with FakeTensorMode(), torch.device("cpu"):
            model = attach(build(), config.adapter.max_rank, config.adapter.scale, whole=config.train.whole)
            decoder = find_decoder(model)
            parent, _, leaf = decoder.name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, decoder.blocks[:count])
            with _Meter() as meter, _one_chunk():
                work(model)
            return meter.peak

    with torch.device("meta"):
        blocks = len(find_decoder(build()).blocks)
    few = min(2, blocks)
    low = peak(few)
    return low if blocks == few else low + (blocks - few) * (peak(few + 1) - low)


def simulate_training(build: Callable[[], PreTrainedModel], config: LosaConfig, processes: int = 1) -> int:
    """Peak bytes of a training step's activations, gradients and transients: forward, teacher's forward, backward."""
    rows = -(-config.train.batch_size // processes)
    simulated = min(rows, SIMULATED_ROWS)

    def step(model: PreTrainedModel) -> None:
        ids = torch.zeros(simulated, config.train.length or 0, dtype=torch.int64)
        teacher = None
        if config.train.distill or config.train.distill_blocks:
            with torch.no_grad(), dense_mode(model):
                teacher = model(input_ids=ids, use_cache=False).logits
        model.train()
        with activation_checkpointing(model, config.train.gradient_checkpointing), every_block(model):
            logits = model(input_ids=ids, use_cache=False).logits
            total = causal_loss(logits, ids, teacher, config.train.distill, config.train.temperature)
            del logits, teacher
            total.backward()

    return _simulate(build, config, step) * rows // simulated


def simulate_evaluation(build: Callable[[], PreTrainedModel], config: LosaConfig) -> int:
    """Peak bytes of one batch of perplexity windows."""

    @torch.no_grad()
    def evaluate(model: PreTrainedModel) -> None:
        ids = torch.zeros(EVALUATION_BATCH, config.eval.length or 0, dtype=torch.int64)
        causal_loss(model(input_ids=ids, use_cache=False).logits, ids)

    return _simulate(build, config, evaluate)


def simulate_block(build: Callable[[], PreTrainedModel], config: LosaConfig) -> int:
    """Peak bytes of a block's forward over one batch of calibration sequences."""

    @torch.no_grad()
    def forward(model: PreTrainedModel) -> None:
        ids = torch.zeros(BATCH, config.calibration.length or 0, dtype=torch.int64)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return _simulate(build, config, forward)


def simulate_reconstruction(build: Callable[[], PreTrainedModel], config: LosaConfig) -> int:
    """Peak bytes of an update of the largest block: activations, and 16 a weight that is trained."""
    rows, length = config.reconstruct.batch_size, config.calibration.length or 0
    with FakeTensorMode(), torch.device("cpu"):
        model = attach(build(), whole=True)
        index, block = _largest_block(model)
        stream = block_inputs(model, torch.zeros(rows, length, dtype=torch.int64), rows)
        with _Meter() as meter:
            difference = stream.output(block, index, 0).float() - stream.hidden[0].float()
            difference.square().mean().backward()
        return meter.peak + 12 * sum(
            linear.weight.numel() for linear in block_linears(block).values()
        )  # gradients are in the peak


def _largest_block(model: PreTrainedModel) -> tuple[int, nn.Module]:
    decoder = find_decoder(model)
    sizes = decoder.sizes()
    index = sizes.index(max(sizes))
    return index, decoder.blocks[index]


def _solver_bytes(build: Callable[[], PreTrainedModel], config: LosaConfig) -> int:
    """Of the largest block: the statistic of every input, what solving the largest group of layers takes, all answers."""
    pruners = [get_pruner(name) for name in (config.pruner, *(["sparsegpt"] if config.values else []))]  # rounding is like that
    return max(_pruner_bytes(build, pruner) for pruner in pruners)


def _pruner_bytes(build: Callable[[], PreTrainedModel], pruner: Pruner) -> int:
    with FakeTensorMode(), torch.device("cpu"), torch.no_grad():
        model = attach(build(), whole=True)
        index, block = _largest_block(model)
        statistics = InputStatistics(pruner)
        statistics.collect(block, index, block_inputs(model, torch.zeros(1, 8, dtype=torch.int64), 1))
        linears = block_linears(block)
        groups = [[linears[name] for name in names] for names, _ in statistics.groups(block)]
    widths = [group[0].in_features for group in groups]
    counts = [sum(linear.weight.numel() for linear in group) for group in groups]
    solving = (
        pruner.square_copies * 4 * width**2 + pruner.weight_bytes * count for width, count in zip(widths, counts, strict=True)
    )
    return sum(pruner.statistic_bytes(width) for width in widths) + max(solving) + SOLUTION_BYTES * sum(counts)


def _calibration_bytes(
    build: Callable[[], PreTrainedModel], config: LosaConfig, decoder: Decoder, hidden: int, itemsize: int, processes: int
) -> int:
    calibrating, reconstruct = config.calibration, config.reconstruct
    assert calibrating.sequences is not None
    state = (calibrating.length or 0) * hidden  # numbers of a sequence
    sparse = -(-calibrating.sequences // processes)
    dense = -(-min(calibrating.error_sequences, calibrating.sequences) // processes)
    reconstructing = 0
    if reconstruct.epochs:
        dense = max(dense, -(-reconstruct.sequences // processes))
        both = (sparse + dense) * state * itemsize  # inputs and targets in one piece each, beside their streams
        update = simulate_reconstruction(build, config)
        if config.train.whole:  # its values are what is trained anyway
            update -= 4 * max(decoder.sizes())
        reconstructing = both + max(16 * dense * state, update)  # 16: targets in float64 and their squares
    return (sparse + dense) * state * itemsize + max(simulate_block(build, config), _solver_bytes(build, config), reconstructing)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _speed(decoder: Decoder, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the largest layer's product at the training batch, measured for about half a second."""
    linear = max(decoder.linears().values(), key=lambda li: li.weight.numel())
    X_NI = torch.randn(tokens, linear.in_features, device=device).to(dtype)
    W_IO = torch.randn(linear.in_features, linear.out_features, device=device).to(dtype)

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            Y_NO = X_NI @ W_IO
        Y_NO.sum().item()  # waits for the device
        return time.perf_counter() - start

    seconds(1)
    repeats = max(1, min(100, int(0.5 / max(seconds(1), 1e-4))))
    return 2 * tokens * linear.weight.numel() * repeats / seconds(repeats)
