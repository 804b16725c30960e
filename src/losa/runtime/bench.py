"""`losa bench`: tokens per second, sparse against dense, in one process, beside what the memory allows.

Generating one token reads every weight once, so no engine is faster than bandwidth / bytes of weights. Models take turns, round
by round, because a machine's clock and neighbours change from minute to minute; medians are reported. On a GPU `generate` has a
static cache, for which transformers compiles the decoding step and runs it as CUDA graphs; the warm-up round pays for that.
"""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from losa.integrations.transformers import SparseConfig
from losa.models import load, max_length
from losa.models.opening import open_config, open_weights
from losa.runtime.clock import Clock
from losa.runtime.decode import road
from losa.runtime.linear import SparseLinear
from losa.runtime.memory import move_to_huge_pages, resident_bytes
from losa.runtime.sampling import for_generation
from losa.runtime.values import TYPES
from losa.system.environment import machine, resolve_device
from losa.system.progress import progress

MOST_ROUNDS = 1000
GPU_COPIES = 10  # timed together: a GPU copies so fast that starting and waiting would count


@dataclass(frozen=True)
class Row:
    """One model. Bytes are of this process (on a GPU: allocated there) and of the weights that one token reads; the limit is
    bandwidth / weight bytes; the road is `decode.road`'s."""

    name: str
    road: str
    tokens_per_second: float
    first_token_seconds: float
    resident_bytes: int
    weight_bytes: int
    limit_tokens_per_second: float


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that one generated token reads: all linear layers, the head among them, and their indices on a GPU."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear | SparseLinear))
    return sum(tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))


def zeros(model: PreTrainedModel) -> float:
    """Ratio of zeros in the packed layers of the decoder's blocks."""
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, SparseLinear) and module is not head]
    return 1 - sum(layer.packed.stored for layer in layers) / sum(layer.in_features * layer.out_features for layer in layers)


def bandwidth(device: torch.device, size: int = 1 << 29, rounds: int = 5) -> float:
    """Bytes per second of memory, the best of a few passes: torch's threads reading `size` bytes by `amax`; on a GPU, a copy of
    them, bytes read and written."""
    numbers = torch.arange(size // 4, dtype=torch.float32, device=device)
    if device.type == "cpu":
        return size / min(seconds(numbers.amax) for _ in range(rounds))
    target = torch.empty_like(numbers)

    def copies() -> None:
        for _ in range(GPU_COPIES):
            target.copy_(numbers)
        torch.cuda.synchronize(device)

    copies()
    return 2 * size * GPU_COPIES / min(seconds(copies) for _ in range(rounds))


def memory(device: torch.device) -> int:
    """Bytes that this process has resident, or allocated on a GPU."""
    if device.type == "cpu":
        return resident_bytes()
    gc.collect()
    return torch.cuda.memory_allocated(device)


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def open_all(directory: str, device: torch.device) -> dict[str, tuple[PreTrainedModel, int]]:
    """The models to compare, all of one checkpoint, on `device`, with the memory that each added.

    A packed directory is compared with itself unpacked; any other is packed in memory, with every kind of values.
    """
    before = memory(device)
    first = load(directory)[0].to(device)
    found = {}
    if getattr(first.config, "quantization_config", None) is None:
        move_to_huge_pages(first)  # opening a packed model does so
        found["dense"] = (first, memory(device) - before)
        makers: dict[str, Callable[[], PreTrainedModel]] = {
            f"sparse {values}": partial(_packed, directory, values, device) for values in TYPES
        }
    else:
        found[f"sparse {first.config.quantization_config.values}"] = (first, memory(device) - before)
        makers = {"dense": partial(_unpacked, directory)}
    for name, make in makers.items():
        before = memory(device)
        model = make().to(device)
        found[name] = (model, memory(device) - before)
    return dict(sorted(found.items()))  # dense first


def _packed(directory: str, values: str, device: torch.device) -> PreTrainedModel:
    where = {"device_map": {"": device}} if device.type == "cuda" else {}  # a GPU packs faster, too
    config = SparseConfig(values)
    return open_weights(directory, quantization_config=config, **where)


def _unpacked(directory: str) -> PreTrainedModel:
    model, _ = load(directory)
    model.dequantize()
    move_to_huge_pages(model)
    return model


def compare(directory: str | Path, prompt: int = 128, new: int = 32, rounds: int = 3, device: str = "cpu") -> dict[str, Any]:
    """Measures dense against packed models of one checkpoint, through `generate`, greedy, batch 1.

    Args:
        directory: a checkpoint, packed or not.
        prompt: tokens of the prompt, drawn at random.
        new: tokens generated.
        rounds: turns of every model; the first, to warm up, is not counted.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        `machine`, `bandwidth` (bytes per second), `zeros` (ratio), `prompt`, `new`, and `rows`, a dict for each model.

    Raises:
        ValueError: fewer than two new tokens, more tokens than the model allows, or nothing that opens.
    """
    if prompt < 1 or new < 2 or not 1 <= rounds <= MOST_ROUNDS:
        expected = f"at least 1, 2 and 1, and at most {MOST_ROUNDS} rounds"
        raise ValueError(f"found a prompt of {prompt}, {new} new tokens and {rounds} rounds; expected {expected}")
    longest = max_length(open_config(str(directory)))
    if prompt + new > longest:
        raise ValueError(f"{prompt} tokens of prompt and {new} new ones are more than the model's {longest}; ask for fewer")
    place = resolve_device(device)
    if place.type == "cuda":
        torch._dynamo.reset()  # what an earlier call compiled is neither used again nor kept in memory
    models = open_all(str(directory), place)
    clocks = take_turns({name: model for name, (model, _) in models.items()}, place, prompt, new, rounds)
    stream = bandwidth(place)
    rows = []
    for name, (model, added) in models.items():
        first = median(clock.first for clock in clocks[name])
        rate = median(clock.rate for clock in clocks[name])
        rows.append(Row(name, road(model), rate, first, added, weight_bytes(model), stream / weight_bytes(model)))
    return {
        "machine": machine(place.type),
        "bandwidth": stream,
        "zeros": zeros(next(model for name, (model, _) in models.items() if name != "dense")),
        "prompt": prompt,
        "new": new,
        "rows": [asdict(row) for row in rows],
    }


def take_turns(
    models: Mapping[str, PreTrainedModel], device: torch.device, prompt: int, new: int, rounds: int
) -> dict[str, list[Clock]]:
    """Has every model generate, round by round; the clocks of each, without those of the round before the first, to warm up.

    Args:
        models: of one vocabulary, on `device`.
    """
    config = next(iter(models.values())).config.get_text_config()
    ids = torch.randint(config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    graphs = {"cache_implementation": "static"} if device.type == "cuda" else {}
    clocks: dict[str, list[Clock]] = {name: [] for name in models}
    turns = [(name, counted) for counted in range(rounds + 1) for name in models]
    for name, counted in progress(turns, "generating"):
        clock = Clock()
        for_generation(models[name], greedy(new)).generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **graphs)
        if counted:
            clocks[name].append(clock)
    return clocks


def greedy(new: int) -> GenerationConfig:
    """Just so many tokens, the likeliest each: no end of text, for whose sake `min_new_tokens` would look at all logits again."""
    return GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
