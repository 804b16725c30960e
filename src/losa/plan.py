"""What a run will need, before anything is loaded: the model is built on the meta device, where tensors have shapes and no bytes.

Exact: weights, masks, adapters, optimizer state, hidden states, Hessians. Activations of a training step are counted by running
its forward pass on fake tensors (the device's own operators, no bytes) and adding up what autograd keeps. Estimated: transient
buffers, and time, which is the FLOPs of the large products over the speed of one such product measured here, so a lower bound.

Legend: `S` sequences, `T` tokens, `H` hidden, `O` out_features, `I` in_features, `V` vocabulary.
"""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from losa.adapter import attach
from losa.config import LosaConfig
from losa.environment import resolve_device
from losa.models import Decoder, block_linears, check_supported, find_decoder, max_length, one_line
from losa.pruning import Pattern
from losa.session import check_pattern

RUNTIME_BYTES = 500 << 20  # Python, torch and transformers themselves


@dataclass(frozen=True)
class Plan:
    """Bytes, seconds and what there is of them."""

    parameters: int
    prunable: int
    weights: int  # bytes, as all fields below
    masks: int
    dense_copy: int  # host; SparseGPT changes the base weights, so the dense ones are kept for reconstruction errors
    adapters: int  # float32 values, gradients and both Adam moments
    activations: int  # one training forward, distillation included
    calibration: int  # two streams of hidden states, one block's statistics
    transient: int  # the largest layer's merged weight and gradient in float32, or the largest logits
    peak_memory: int
    available_memory: int
    host_memory: int  # the model is loaded here first; the same as peak_memory on a CPU
    available_host: int
    disk: int
    available_disk: int
    seconds: float  # at least
    device: str

    @property
    def fits(self) -> bool:
        """Whether memory, on the device and on the host, and disk suffice."""
        memory = self.peak_memory <= self.available_memory and self.host_memory <= self.available_host
        return memory and self.disk <= self.available_disk

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, for JSON."""
        return asdict(self) | {"fits": self.fits}


def plan(config: LosaConfig) -> Plan:
    """Computes the plan of `losa run` with this configuration.

    Raises:
        ValueError: the model or the configuration is not supported.
    """
    with one_line(config.model):
        model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    dtype = _dtype(config, model_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code)
    check_supported(model)
    decoder = find_decoder(model)
    check_pattern(decoder, Pattern.parse(config.pattern))
    text_config = model.config.get_text_config()
    config = config.resolve(text_config.hidden_size, max_length(model.config))
    device = resolve_device(config.device)
    parameters, prunable = sum(p.numel() for p in model.parameters()), sum(decoder.sizes())
    largest = max(linear.weight.numel() for linear in decoder.linears().values())
    adapter_values = config.adapter.max_rank * sum(li.in_features + li.out_features for li in decoder.linears().values())
    calibration = _calibration_bytes(config, decoder, text_config.hidden_size, dtype.itemsize)
    activations = training_activations(model_config, config, dtype, device)
    tokens = config.train.batch_size * (config.train.length or 0)
    logits = tokens * text_config.vocab_size
    activations += 3 * 4 * logits if config.train.distill else 0  # student's and teacher's log-probabilities, and their product
    weights, masks = parameters * dtype.itemsize, prunable
    dense_copy = prunable * dtype.itemsize if config.pruner == "sparsegpt" else 0
    transient = max(3 * 4 * largest, 2 * 4 * logits)
    # The dense copy is on the host, except while a distilling teacher uses it. Offload keeps all blocks but one on the host.
    on_host = device.type == "cpu"
    training = weights + masks + (dense_copy if on_host or config.train.distill else 0) + 16 * adapter_values + activations
    at_rest = (prunable * dtype.itemsize + masks + 4 * adapter_values) * (1 - 1 / len(decoder.blocks)) * config.offload
    calibrating = weights + masks + (dense_copy if on_host else 0) + 4 * adapter_values + calibration - int(at_rest)
    peak = RUNTIME_BYTES + transient + max(training, calibrating)
    disk = weights + prunable // 8 + 4 * adapter_values + dense_copy
    output = Path(config.output or ".").absolute()
    existing = next(parent for parent in (output, *output.parents) if parent.exists())
    return Plan(
        parameters=parameters,
        prunable=prunable,
        weights=weights,
        masks=masks,
        dense_copy=dense_copy,
        adapters=16 * adapter_values,
        activations=activations,
        calibration=calibration,
        transient=transient,
        peak_memory=peak,
        available_memory=_free_memory(device),
        host_memory=peak if on_host else RUNTIME_BYTES + weights + dense_copy,
        available_host=_free_memory(torch.device("cpu")),
        disk=disk,
        available_disk=shutil.disk_usage(existing).free,
        seconds=_flops(config, decoder, text_config.vocab_size * text_config.hidden_size)
        / _speed(decoder, min(tokens, 8192), dtype, device),
        device=str(device),
    )


def _dtype(config: LosaConfig, model_config: Any) -> torch.dtype:
    own = getattr(model_config, "dtype", None) or torch.float32
    dtype = own if config.dtype == "auto" else getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return torch.bfloat16 if dtype == torch.float16 else dtype  # as session.check_precision does


def training_activations(model_config: Any, config: LosaConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes autograd keeps for one training forward, parameters and buffers not counted.

    With `train.gradient_checkpointing` only block inputs are kept, and one block's activations at a time.
    """
    with FakeTensorMode(), torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code)
        attach(model, config.adapter.max_rank, config.adapter.scale)
        return _kept_by_autograd(model, config)


def _kept_by_autograd(model: PreTrainedModel, config: LosaConfig) -> int:
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (tensor, storage.nbytes())  # the tensor is held, so that no address is used twice
        return tensor

    ids = torch.zeros(config.train.batch_size, config.train.length or 0, dtype=torch.int64)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    del loss
    total = sum(size for _, size in kept.values())
    if not config.train.gradient_checkpointing:
        return total
    blocks = len(find_decoder(model).blocks)
    hidden = ids.numel() * model.config.get_text_config().hidden_size * next(model.parameters()).element_size()
    logits = 4 * ids.numel() * model.config.get_text_config().vocab_size
    return blocks * hidden + logits + max(total - logits, 0) // blocks


def _calibration_bytes(config: LosaConfig, decoder: Decoder, hidden: int, itemsize: int) -> int:
    calibrating = config.calibration
    streams = 2 * calibrating.sequences * (calibrating.length or 0) * hidden * itemsize
    squares = [sum(4 * li.in_features**2 for li in block_linears(block).values()) for block in decoder.blocks]
    return streams + (max(squares) if config.pruner == "sparsegpt" else 0)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _flops(config: LosaConfig, decoder: Decoder, head: int) -> float:
    """Large products only: training is 6 flops a token and weight, a forward 2; attention scores are left out."""
    prunable = sum(decoder.sizes())
    rows = config.train.samples or config.train.tokens // (config.train.length or 1)
    teacher = 2 * (prunable + head) if config.train.distill else 0
    trained = rows * (config.train.length or 0) * (6 * prunable + 4 * head + teacher)
    calibrated = config.calibration.sequences * (config.calibration.length or 0) * 2 * prunable
    rmi = config.calibration.rmi_sequences * (config.calibration.length or 0) * 2 * prunable
    return trained + (config.steps + 1) * 3 * calibrated + config.steps * rmi


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
