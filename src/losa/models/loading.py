"""Model and tokenizer by name, in the order of what it costs: checked on tensors without data, and only then loaded."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from losa.config import LosaConfig
from losa.models.opening import check_model, check_vocabulary, open_config, open_tokenizer, open_weights
from losa.models.support import check_supported
from losa.system.doors import check_links


def load(model: str | Path | LosaConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, from safetensors only: no pickle is ever opened. Packed checkpoints open packed.

    Args:
        model: a directory or hub name, dense, sparse or packed; or a configuration that names one, with dtype and trust.

    Raises:
        ValueError: nothing there, or nothing that transformers opens.
    """
    config = model if isinstance(model, LosaConfig) else LosaConfig.from_dict({"model": str(model)})
    name, trust = config.model, config.trust_remote_code
    writes = config.output is not None  # a sparse checkpoint, with copies of what lies beside the weights
    if writes and Path(name).is_dir():
        check_links(Path(name))
    dense = check_model(open_config(name, trust, packed=not writes), name, trust)
    if writes:
        check_supported(dense)
    tokenizer = open_tokenizer(name, trust)
    check_vocabulary(tokenizer, dense.get_input_embeddings().weight.shape[0], name)
    return open_weights(name, dtype=config.dtype, trust_remote_code=trust), tokenizer
