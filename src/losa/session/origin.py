"""What a run comes from, as checksums: a resumed run that comes from something else would mix the two."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from losa.models.precision import name_of
from losa.system.environment import versions

DECIDE = ("losa", "torch", "transformers", "accelerate")  # packages whose version may change a result


def origin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, dtype: torch.dtype) -> dict[str, str]:
    """Checksums and versions by name: `weights`, all bytes of all parameters and buffers; `model configuration`, `tokenizer`,
    `text`; the dtype that is computed in, and the packages that compute.

    Args:
        text: the texts' checksum (`data.RunData.fingerprint`).
    """
    found = versions()
    return {
        "weights": _weights(model),
        "model configuration": _hash([_settings(model.config), _settings(getattr(model, "generation_config", None))]),
        "tokenizer": _hash(_tokenizer(tokenizer)),
        "text": text,
        "precision": name_of(dtype),
    } | {f"version of {name}": found[name] for name in DECIDE}


def changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The names of what differs; of the precision and of versions, both."""
    names = [name for name in new if old.get(name) != new[name]]
    told = ("precision", "version")
    return [f"{name} ({old.get(name)} -> {new[name]})" if name.startswith(told) else name for name in names]


def _weights(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=False).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(config: Any) -> dict[str, Any]:
    """Without where a model lies and which version wrote it."""
    values = config.to_dict() if config is not None else {}
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # of the last call
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return [sorted(tokenizer.get_vocab().items()), rules, special, getattr(tokenizer, "chat_template", None)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
