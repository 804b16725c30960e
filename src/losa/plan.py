"""What a run will need, before anything is loaded: the model is built on the meta device, where tensors have shapes and no bytes.

Counted: weights, masks, adapters, optimizer state, hidden states, statistics. Simulated: what a training step, a block's forward
and an evaluation batch have alive at their peak, by running them on fake tensors (real operators, no bytes), on a few blocks of
the model; the blocks are alike, so the rest is a straight line. Estimated: time, which is the flops of the large products over
the speed of one such product measured here (or given), so a lower bound.

Legend: `S` sequences, `T` tokens, `H` hidden, `O` out_features, `I` in_features, `V` vocabulary, `P` processes.
"""

import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from losa.adapter import attach, dense_mode
from losa.config import LosaConfig
from losa.environment import resolve_device
from losa.loss import causal_loss
from losa.models import Decoder, block_linears, check_supported, find_decoder, max_length, one_line
from losa.pruning import get_pruner
from losa.session import check_decoder, check_parts
from losa.training import activation_checkpointing

CALIBRATION_BATCH, EVALUATION_BATCH = 8, 4  # the defaults of prune_blocks and perplexity
LIBRARY_BYTES = (
    150 << 20
)  # of a CPU: pages and workspaces that libraries take at first use, holes in the heap; measured (docs/LOG.md)
CONTEXT_BYTES = 600 << 20  # of a GPU: the driver's context and the libraries' workspaces; an estimate, not measured
SOLVER_BYTES = 30  # a weight of the largest layer: merged weight, scores, their order, masks
SIMULATED_ROWS = 64  # of a training step; larger batches are scaled up from here


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds, and what there is of them; of each process, where there are several."""

    parameters: int
    prunable: int
    runtime: int  # bytes, as all fields below: Python, torch and transformers themselves
    weights: int
    masks: int  # a bit a weight
    dense_copy: int  # host; SparseGPT changes the base weights, so the dense ones are kept for reconstruction errors
    adapters: int  # float32 values, gradients and both Adam moments
    training: int  # beyond these, at the peak of a training step, distillation included
    calibration: int  # likewise of pruning: streams of hidden states, one block's statistics, a solver's work
    evaluation: int  # likewise of perplexity
    peak_memory: int
    available_memory: int
    host_memory: int  # the model is loaded here first; the same as peak_memory on a CPU
    available_host: int
    disk: int
    available_disk: int
    seconds: float  # at least
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
    with one_line(config.model):
        model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    dtype = _dtype(config, model_config)

    def build() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code)

    with torch.device("meta"):
        model = build()
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
    adapter_values = config.adapter.max_rank * sum(li.in_features + li.out_features for li in decoder.linears().values())
    weights, masks = parameters * dtype.itemsize, prunable // 8
    reused = prunable * dtype.itemsize * config.train.reuse_weights
    scores = 4 * prunable * get_pruner(config.pruner).from_training
    dense_copy = prunable * dtype.itemsize if config.pruner == "sparsegpt" else 0
    runtime = psutil.Process().memory_info().rss + LIBRARY_BYTES if host else CONTEXT_BYTES
    training = simulate_training(build, config, processes) - 4 * adapter_values
    calibration = _calibration_bytes(build, config, decoder, text_config.hidden_size, dtype.itemsize, processes)
    evaluation = simulate_evaluation(build, config)
    # The dense copy is on the host, except while a distilling teacher uses it.
    teacher = dense_copy if host or (config.train.distill and not config.blocks_on_host) else 0
    largest_block = max(decoder.sizes()) * dtype.itemsize
    if config.blocks_on_host and not host:
        # Of all parameters a part, or with offload none; and two blocks whole, the one that runs and the next one.
        part = 0 if config.offload else (weights + 16 * adapter_values) // processes
        resident = part + 2 * largest_block + masks
    else:
        # Scores twice: those of the steps before, and those of this one.
        resident = weights + masks + 16 * adapter_values + teacher + reused + 2 * scores
    # All blocks but one may be on the host while calibrating and evaluating.
    outside = weights - prunable * dtype.itemsize + largest_block
    kept = masks + (outside if config.blocks_on_host and not host else weights)
    kept += (dense_copy if host else 0) + scores
    peak = runtime + max(resident + training, kept + 4 * adapter_values + max(calibration, evaluation))
    disk = weights + masks + 4 * adapter_values * 2 + dense_copy
    output = Path(config.output or ".").absolute()
    existing = next(parent for parent in (output, *output.parents) if parent.exists())
    tokens = config.train.batch_size * (config.train.length or 0) // processes
    speed = flops or _speed(decoder, min(tokens, 8192), dtype, resolve_device(config.device))
    return Plan(
        parameters=parameters,
        prunable=prunable,
        runtime=runtime,
        weights=weights,
        masks=masks,
        dense_copy=dense_copy,
        adapters=16 * adapter_values,
        training=training,
        calibration=calibration,
        evaluation=evaluation,
        peak_memory=peak,
        available_memory=memory if memory is not None else _free_memory(torch.device("cpu" if elsewhere else device)),
        host_memory=peak if host else psutil.Process().memory_info().rss + weights + dense_copy,
        available_host=_free_memory(torch.device("cpu")),
        disk=disk,
        available_disk=shutil.disk_usage(existing).free,
        seconds=_flops(config, decoder, text_config) / speed / processes,
        processes=processes,
        device=device,
    )


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


def _simulate(build: Callable[[], PreTrainedModel], config: LosaConfig, work: Callable[[PreTrainedModel], None]) -> int:
    """Bytes that `work` has alive at its peak, besides the model: measured on two and on three of its blocks."""

    def peak(count: int) -> int:
        with FakeTensorMode(), torch.device("cpu"):
            model = attach(build(), config.adapter.max_rank, config.adapter.scale)
            decoder = find_decoder(model)
            parent, _, leaf = decoder.name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, decoder.blocks[:count])
            meter = _Meter()
            with meter:
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
        with activation_checkpointing(model, config.train.gradient_checkpointing):
            logits = model(input_ids=ids, use_cache=False).logits
            loss = causal_loss(logits, ids, teacher, config.train.distill, config.train.temperature)
            del logits, teacher
            loss.backward()

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
        ids = torch.zeros(CALIBRATION_BATCH, config.calibration.length or 0, dtype=torch.int64)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return _simulate(build, config, forward)


def _calibration_bytes(
    build: Callable[[], PreTrainedModel], config: LosaConfig, decoder: Decoder, hidden: int, itemsize: int, processes: int
) -> int:
    calibrating = config.calibration
    assert calibrating.sequences is not None
    sequences = -(-calibrating.sequences // processes) + -(-min(calibrating.error_sequences, calibrating.sequences) // processes)
    streams = sequences * (calibrating.length or 0) * hidden * itemsize
    linears = [linear for block in decoder.blocks for linear in block_linears(block).values()]
    widest, largest = max(linear.in_features for linear in linears), max(linear.weight.numel() for linear in linears)
    if config.pruner == "sparsegpt":  # Hessians of the block; then H, its damped copy, both factors and the inverse of the widest
        squares = max(sum(4 * li.in_features**2 for li in block_linears(block).values()) for block in decoder.blocks)
        solving = squares + 5 * 4 * widest**2 + 4 * 4 * 2 * largest
    else:
        solving = SOLVER_BYTES * largest
    return streams + max(simulate_block(build, config), solving)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _flops(config: LosaConfig, decoder: Decoder, text_config: Any) -> float:
    """Large products and attention. Of a token and a weight: 2 flops in a forward, 6 in training (8 with checkpointing), 2 for
    the teacher; the head's weight has no gradient: 4. Attention over half a row on average: 2 T H flops a block and forward."""
    prunable, hidden = sum(decoder.sizes()), text_config.hidden_size
    head = text_config.vocab_size * hidden

    def forward(length: int) -> float:
        return 2 * prunable + 2 * length * hidden * len(decoder.blocks)

    train, calibrating = config.train, config.calibration
    length = train.length or 1
    rows = train.samples or train.tokens // length
    passes = 3 + train.gradient_checkpointing + bool(train.distill or train.distill_blocks)
    trained = rows * length * (passes * forward(length) + (2 * passes - 2) * head)
    window, sequences = calibrating.length or 1, calibrating.sequences or 1
    collect_and_advance, errors = 2 * sequences * window, min(calibrating.error_sequences, sequences) * window
    importance = calibrating.rmi_sequences * min(calibrating.rmi_length, window) if config.delta else 0
    per_step = collect_and_advance + errors + importance
    return trained + (config.steps * per_step + collect_and_advance) * forward(window)


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
