"""Opening a model or a tokenizer that nobody vouches for: what can be known before weights are loaded is checked before.

`config.json` is compared with what the headers of the safetensors files say, and tried out on tensors without data, so that
numbers that no machine could hold, and settings that no forward could use, are refused before they cost anything.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException as UnsupportedException
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from losa.models.support import max_length
from losa.runtime.header import METHOD, Packing
from losa.system.doors import door, read_json, shown, tensor_heads, weight_files
from losa.system.output import check_finished

COUNT = 65_536  # layers, heads, experts or labels: more than any model has, few enough to list
MODULES = 200_000  # of a model whose weights are not here to be counted; the largest of today have a third
BUFFER_BYTES = 1 << 30  # masks and tables that a model makes itself, beside its weights
FLOATS = ("F64", "F32", "F16", "BF16")
SAMPLE = "It was 1,024 times:\n\tthe naïve “fox” — 你好 🦊 — jumps over x_i = {a: [0.5]};  <b>THE LAZY DOG</b>\r\n"
LIMITS_OF_FAKES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedException, NotImplementedError)


def open_config(name: str, trust_remote_code: bool = False, packed: bool = True) -> PreTrainedConfig:
    """The configuration of a model, before anything is made of it.

    Args:
        packed: whether a packed checkpoint will do.

    Raises:
        ValueError: nothing there, nothing that transformers reads, a quantised model, or numbers that no model has.
    """
    directory = Path(name)
    _check_directory(name)
    with _opening(name):
        if directory.is_dir():
            check_file(directory)
            weight_files(directory)
        check_content(PreTrainedConfig.get_config_dict(name)[0])
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if not packed and getattr(config, "quantization_config", None) is not None:
            raise ValueError("it is packed, so quantised; losa unpack gives the checkpoint that LoSA prunes")
        dtype = getattr(config, "dtype", None)
        if not isinstance(dtype, torch.dtype | None):
            raise ValueError(f"its dtype is {dtype!r}, expected a name such as bfloat16")
        return config


def check_file(directory: Path) -> None:
    """Reads `config.json` of a local directory, and checks what it says.

    Raises:
        ValueError: as `check_content`, or a damaged file.
    """
    content = read_json(directory / "config.json")
    with _opening(str(directory)):
        check_content(content)


def check_content(content: Mapping[str, Any]) -> None:
    """Checks what `config.json` says, also of the models inside it, before lists as long as its numbers are made.

    Raises:
        ValueError: quantised weights, a malformed packed header, or more layers, heads or experts than can be.
    """
    found = content.get("quantization_config")
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"its quantization_config is a {type(found).__name__}, expected an object")
    if found is not None and found.get("quant_method") != METHOD:
        method = str(found.get("quant_method") or "a method that it does not name")[:40]
        raise ValueError(f"it is quantised with {method}; LoSA takes bf16, fp16 or fp32 weights, so use the original checkpoint")
    if found is not None:
        Packing.of(found)
    for key, value in content.items():
        counts = re.match(r"num_|n_layer|n_head|.*_layers$", str(key))
        if counts and isinstance(value, int) and abs(value) > COUNT:
            raise ValueError(f"its {key} is {shown(value)}, expected at most {COUNT:,}")
        if isinstance(value, Mapping) and key != "quantization_config":
            check_content(value)


def check_model(config: PreTrainedConfig, name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds the dense model of a configuration without weights, and compares it with the files and with what a forward needs.

    Raises:
        ValueError: it does not fit the files of a local directory, cannot be built, or cannot run.
    """
    directory = Path(name)
    heads: dict[str, tuple[str, list[int]]] = {}
    for file in weight_files(directory) if directory.is_dir() else []:
        heads |= tensor_heads(file)
    with _opening(name):
        if heads:
            _check_blocks(config, heads)
        model = skeleton(config, trust_remote_code, 1000 + 10 * len(heads) if heads else MODULES)
        if heads:
            _check_sizes(model, heads)
        if not trust_remote_code:
            _try_forward(config)
    return model


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False, modules: int = MODULES) -> PreTrainedModel:
    """The dense model on the meta device, of at most so many modules."""
    with _at_most(modules), torch.device("meta"):
        return AutoModelForCausalLM.from_config(without_header(config), trust_remote_code=trust_remote_code)


def open_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer that was tried on a text.

    Raises:
        ValueError: none there, or a damaged one.
    """
    with door(f"the tokenizer of {name!r}", "open"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        ids = tokenizer([SAMPLE, SAMPLE.upper()], verbose=False)["input_ids"][0]
        if not ids or not all(isinstance(token, int) for token in ids):
            raise ValueError("it makes no tokens of a text")
        tokenizer.decode(ids)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Compares the tokens with the rows of the embedding. Special tokens beyond it, but for the ends of a text, are let be: some
    models have a padding token that they never see.

    Raises:
        ValueError: a token of a text has no row.
    """
    with door(f"the tokenizer of {name!r}", "use"):
        spare = set(tokenizer.all_special_tokens) - {tokenizer.bos_token, tokenizer.eos_token}
        beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows and token not in spare}
        if beyond:
            token, index = min(beyond.items(), key=lambda item: item[1])
            raise ValueError(f"token {token[:40]!r} has number {index:,}, the model's embedding has {rows:,} rows")


def open_weights(name: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, from safetensors only.

    Raises:
        ValueError: it does not open, or some of its weights are in no file and would be random.
    """
    with _opening(name):
        model, found = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"its files hold no {missing[0]}, nor {len(missing) - 1} more of the model's weights")
    return model


def _check_directory(name: str) -> None:
    """Says what a local directory lacks, where transformers would guess or look on the hub.

    Raises:
        ValueError: a path that does not exist, an adapter, an interrupted run, or something else that is no model.
    """
    model = Path(name)
    if not model.exists():
        if name.startswith((".", "~")) or model.is_absolute() or name.count("/") > 1:
            raise ValueError(f"there is no model at {name}")
        return  # a name on the hub
    if (model / "config.json").is_file():
        pickled = sorted(model.glob("pytorch_model*.bin"))
        if pickled and not any(model.glob("*.safetensors")):
            convert = f"AutoModelForCausalLM.from_pretrained('{model}', use_safetensors=False).save_pretrained('{model}')"
            raise ValueError(f"{model} has its weights in {pickled[0].name}, a pickle; LoSA opens none, so convert it: {convert}")
        return
    if (model / "adapter_config.json").is_file():
        raise ValueError(
            f"{model} is an adapter, not a model; merge it into its base first (peft's merge_and_unload) and save that"
        )
    check_finished(model)
    raise ValueError(f"{model} is not the directory of a model: it has no config.json")


def _opening(name: str) -> Any:
    here = Path(name).exists()
    return door(f"the model {name!r}" if here else f"the model {name!r} of the hub (there is no such directory here)", "open")


def without_header(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without the packed header, whose dense model transformers builds."""
    copy = type(config).from_dict(config.to_dict())
    if hasattr(copy, "quantization_config"):
        del copy.quantization_config
    return copy


def _check_blocks(config: PreTrainedConfig, heads: Mapping[str, Any]) -> None:
    """Raises ValueError for more blocks than the names of the tensors count."""
    asked = getattr(config.get_text_config(), "num_hidden_layers", 0)
    held = max((int(number) + 1 for name in heads for number in re.findall(r"\.(\d+)(?=\.)", name)), default=0)
    if isinstance(asked, int) and asked > held:
        raise ValueError(f"config.json says {asked:,} decoder blocks, the files hold {held:,}")


def _check_sizes(model: PreTrainedModel, heads: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raises ValueError for a weight of another type or shape in the files, or far more weights than they hold."""
    packed = {name.removesuffix("_mask") for name in heads if name.endswith(".weight_mask")}
    for key, parameter in model.named_parameters():
        if key in heads and key not in packed:
            dtype, shape = heads[key]
            if shape != list(parameter.shape) or dtype not in FLOATS:
                expected = f"floats of {list(parameter.shape)}, as config.json says"
                raise ValueError(f"{key} is {dtype} {shape} in the files, expected {expected}")
    held = sum(_count(shape) * (8 if name.endswith(".weight_mask") else 1) for name, (_, shape) in heads.items())
    asked = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if asked > 2 * held or buffers > BUFFER_BYTES:
        raise ValueError(
            f"config.json describes {asked:,} weights and {buffers:,} bytes of tables, the files hold {held:,} weights"
        )


def _count(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def _try_forward(config: PreTrainedConfig) -> None:
    """Runs the model on tensors without data. Raises what a real forward would."""
    with FakeTensorMode(), torch.device("cpu"):
        try:
            model = AutoModelForCausalLM.from_config(without_header(config))
            model(input_ids=torch.zeros(1, min(8, max_length(config)), dtype=torch.int64), use_cache=False)
        except LIMITS_OF_FAKES:
            return  # says nothing about the configuration


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stops a model that is being built of more modules."""
    left = count

    def note(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"config.json describes a model of more than {count:,} modules")

    handle = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()
