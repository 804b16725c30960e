"""`--dry-run`: everything of a run that can be checked before its weights are loaded, and what the run would then do."""

from dataclasses import dataclass

from losa.config import LosaConfig
from losa.data import prepare
from losa.models import max_length
from losa.models.opening import check_model, open_config, open_tokenizer
from losa.session.checks import check_architecture


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do: its resolved configuration, and how much text there is for each part."""

    config: LosaConfig
    texts: dict[str, str]


def rehearse(config: LosaConfig, training: bool = True) -> Rehearsal:
    """Checks the model's structure, reads and tokenises the texts. Loads no weights, writes nothing.

    Args:
        training: of `losa run`; if not, of `losa prune`.

    Raises:
        ValueError: something in the request is wrong; what the command would raise before its first pruning.
    """
    of_model = open_config(config.model, config.trust_remote_code, packed=False)
    model = check_model(of_model, config.model, config.trust_remote_code)
    check_architecture(model, config, training)
    config = config.resolve(model.config.get_text_config().hidden_size, max_length(model.config))
    data = prepare(config, open_tokenizer(config.model, config.trust_remote_code), training)
    parts = {} if data.train is None else {"training": data.train}
    texts = {}
    for name, rows in (parts | {"calibration": data.calibration, "evaluation": data.evaluation}).items():
        length = f"{rows.shape[1]:,} tokens" if hasattr(rows, "shape") else f"at most {config.train.length:,} tokens"
        texts[name] = f"{len(rows):,} rows of {length}"
    return Rehearsal(config, texts)
