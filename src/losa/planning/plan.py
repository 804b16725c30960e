"""What a run will need, before anything is loaded: the model is built on the meta device, where tensors have shapes and no bytes.

Counted: weights, masks, what is trained, optimizer state, hidden states, statistics. Simulated (`simulation.py`): what a training
step, a block's forward, its reconstruction and an evaluation batch have alive at their peak. Estimated: time, from a short probe
of one block of random weights (`probe.py`). Of a device elsewhere, or a block too large to try, time is a lower bound: the flops
of the large products (`work.py`) over the speed of one such product, given or measured here.

Legend: `S` sequences, `T` tokens, `H` hidden, `O` out_features, `I` in_features, `V` vocabulary, `P` processes.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from losa.config import LosaConfig
from losa.models import Decoder, max_length
from losa.models.opening import check_model, open_config
from losa.models.precision import computing_dtype, name_of
from losa.planning.probe import probe, probe_bytes
from losa.planning.simulation import simulate_calibration, simulate_evaluation, simulate_training, trained_values
from losa.planning.work import evaluation_windows, stage_flops
from losa.pruning import get_pruner
from losa.session.checks import check_architecture, check_parts
from losa.system.environment import resolve_device

LIBRARY_BYTES = (
    150 << 20
)  # of a CPU: pages and workspaces that libraries take at first use, holes in the heap; measured (docs/LOG.md)
CONTEXT_BYTES = 600 << 20  # of a GPU: the driver's context and the libraries' workspaces; an estimate, not measured


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds, and what there is of them; of each process, where there are several."""

    parameters: int
    prunable: int
    computes_in: str
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
    available_host: int | None  # None, and so of the disk, where the device is in another machine
    disk: int
    available_disk: int | None
    stages: dict[str, float]  # seconds, in the order of a run
    seconds: float  # of all stages
    probed: bool  # whether seconds come from a probe on this machine; if not, they are a lower bound
    windows: int  # of evaluation; assumed unless eval.windows is set
    processes: int
    device: str
    advice: str  # what would take less memory

    @property
    def limits(self) -> dict[str, tuple[int, int | None]]:
        """Memory, on the device and on the host, and disk: what is needed and what there is of it, as far as that is known."""
        return {
            "peak memory": (self.peak_memory, self.available_memory),
            "host memory": (self.host_memory, self.available_host),
            "disk": (self.disk, self.available_disk),
        }

    @property
    def lacking(self) -> list[str]:
        """Which of the limits do not suffice."""
        return [name for name, (need, there) in self.limits.items() if there is not None and need > there]

    @property
    def fits(self) -> bool:
        """Whether nothing is lacking."""
        return not self.lacking

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
    elsewhere = memory is not None or flops is not None
    device = "elsewhere" if elsewhere else str(resolve_device(config.device))
    dtype = _dtype(config, model_config, torch.device("cuda" if elsewhere else device))

    def build() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code).eval()

    decoder = check_architecture(model, config, training=True)
    config = config.resolve(model.config.get_text_config().hidden_size, max_length(model.config), processes)
    check_parts(config, processes)
    parameters, hidden = sum(p.numel() for p in model.parameters()), model.config.get_text_config().hidden_size
    planned = _Planned(config, build, decoder, parameters, hidden, dtype, processes, device)
    available = memory if memory is not None else _free_memory(torch.device("cpu" if elsewhere else device))
    probed = not elsewhere and planned.probe_bytes() < available // 2
    if probed:
        stages = probe(build, config, processes, torch.device(device))
    else:
        tokens = (config.train.batch_size or 1) * (config.train.length or 0) // processes
        speed = flops or _speed(decoder, min(tokens, 8192), dtype, resolve_device(config.device))
        counted = stage_flops(config, decoder, model.config.get_text_config())
        stages = {name: count / speed / processes for name, count in counted.items()}
    output = Path(config.output or ".").absolute()
    existing = next(parent for parent in (output, *output.parents) if parent.exists())
    return Plan(
        **planned.needs(),
        available_memory=available,
        available_host=None if elsewhere else _free_memory(torch.device("cpu")),
        available_disk=None if elsewhere else shutil.disk_usage(existing).free,
        stages=stages,
        seconds=sum(stages.values()),
        probed=probed,
        windows=evaluation_windows(config),
        processes=processes,
        device=device,
        advice=_advice(config, device),
    )


@dataclass(frozen=True)
class _Planned:
    """What a plan is made for: a resolved configuration, its model without weights, and where it is to run."""

    config: LosaConfig
    build: Callable[[], PreTrainedModel]
    decoder: Decoder
    parameters: int
    hidden: int
    dtype: torch.dtype
    processes: int
    device: str

    @property
    def prunable(self) -> int:
        """Weights of the decoder's linear layers."""
        return sum(self.decoder.sizes())

    def probe_bytes(self) -> int:
        """What trying a block would take."""
        return probe_bytes(max(self.decoder.sizes()), self.dtype.itemsize, self.parameters, self.prunable)

    def needs(self) -> dict[str, Any]:
        """The fields of a plan that the model and the configuration decide, most of them bytes."""
        config, size, prunable, processes = self.config, self.dtype.itemsize, self.prunable, self.processes
        host, away = self.device == "cpu", self.config.blocks_on_host and self.device != "cpu"
        pruner, whole = get_pruner(config.pruner), config.train.whole
        of_blocks = [trained_values(block, config) for block in self.decoder.blocks]
        trained, largest_trained = sum(of_blocks), max(of_blocks)
        weights, masks = self.parameters * size, prunable // 8
        scores = 4 * prunable * pruner.from_training
        changes_base = pruner.keeps_dense(whole) or (bool(config.reconstruct.epochs or config.values) and not whole)
        dense_copy = prunable * size if changes_base else 0
        rounded = prunable * size if config.values and not changes_base else 0  # a copy that the last stage makes
        resident_here = psutil.Process().memory_info().rss
        runtime = resident_here + LIBRARY_BYTES if host else CONTEXT_BYTES
        training = simulate_training(self.build, config, processes) - 4 * trained
        calibration = simulate_calibration(self.build, config, self.decoder, self.hidden, size, processes)
        evaluation = max(simulate_evaluation(self.build, config), prunable * size)  # samples keep the weights they are made with
        # The dense copy is on the host, except while a distilling teacher uses it.
        teacher = dense_copy if host or (config.train.distill and not config.blocks_on_host) else 0
        largest_block = max(self.decoder.sizes()) * size
        if away:
            # Of all parameters a part, or with offload none; and two blocks whole, the one that runs and the next one.
            part = 0 if config.offload else (weights + 16 * trained) // processes
            resident = part + 2 * (largest_block + 4 * largest_trained) + masks
        else:
            # Scores twice: those of the steps before, and those of this one.
            reused = prunable * size * config.train.reuse_weights
            resident = weights + masks + 16 * trained + teacher + reused + 2 * scores
        # All blocks but one may be on the host while calibrating and evaluating.
        outside = weights - prunable * size + largest_block
        kept = masks + (outside if away else weights) + 4 * (largest_trained if away else trained)
        kept += (dense_copy + rounded if host else 0) + scores
        peak = runtime + max(resident + training, kept + max(calibration, evaluation))
        # What is trained is made on the host; with offload, its gradients and moments stay there too.
        loaded = weights + dense_copy + rounded + (16 if away and config.offload else 4) * trained
        position = 12 * trained + processes * scores
        loaded = max(loaded, dense_copy + position)  # a position inside the training passes through the host
        return {
            "parameters": self.parameters,
            "prunable": prunable,
            "computes_in": name_of(self.dtype),
            "runtime": runtime,
            "weights": weights,
            "masks": masks,
            "dense_copy": dense_copy,
            "trained": 16 * trained,
            "training": training,
            "calibration": calibration,
            "evaluation": evaluation,
            "peak_memory": peak,
            "host_memory": peak if host else resident_here + loaded,
            # Two stages are kept; beside them lies the result, or a position inside the training and the next one.
            "disk": 2 * (masks + dense_copy + 4 * trained + scores) + max(weights + rounded, 2 * position),
        }


def _dtype(config: LosaConfig, model_config: Any, device: torch.device) -> torch.dtype:
    """What the run computes in."""
    own = getattr(model_config, "dtype", None) or torch.float32
    dtype = own if config.dtype == "auto" else getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # as session.check_precision does
    return computing_dtype(dtype, device, config.dtype)


def _advice(config: LosaConfig, device: str) -> str:
    """What would take less memory, as far as it is not done yet."""
    changes = ["--train adapters"] * config.train.whole
    if device != "cpu":
        changes += ["--offload"] * (not config.offload)
        keeps = get_pruner(config.pruner).keeps_dense(config.train.whole) and config.train.distill and not config.blocks_on_host
        changes += ["--pruner wanda (which needs no copy of the dense weights beside the sparse ones)"] * bool(keeps)
    changes += ["train.gradient_checkpointing: true"] * (not config.train.gradient_checkpointing)
    return ", ".join([*changes, "a lower train.batch_size or train.length"])


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
