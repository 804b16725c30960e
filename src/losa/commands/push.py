"""`losa push`: a finished checkpoint to a repository of the hub, in one commit, with a card that says how it opens there."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from losa.report.content import public_evaluation, public_record
from losa.report.page import PAGE
from losa.runtime.card import opening
from losa.system.doors import INDEX, door, read_json, read_text
from losa.system.output import BENCH, CARD, EVALUATION, LIST, RECORD, check_finished, listed
from losa.system.writing import to_json

OURS = {RECORD, EVALUATION, BENCH, LIST, CARD, PAGE}
MODELS = {  # of a checkpoint of transformers
    *("config.json", "generation_config.json", INDEX, "chat_template.jinja", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md"),
}
SUFFIXES = (".safetensors", ".model", ".tiktoken", ".py")  # of what has other names: weights, vocabularies, code of a model
PUBLIC = {RECORD: public_record, EVALUATION: public_evaluation}


def files_to_push(directory: Path) -> list[Path]:
    """What belongs to a finished checkpoint, the weights last: what losa lists there, what has a name of a model's files, and
    where there is no list what has a suffix of them. Hidden files and those of others stay where they are.

    Raises:
        ValueError: not a finished checkpoint.
    """
    if not (directory / "config.json").is_file():
        check_finished(directory)
        raise ValueError(f"{directory} is not a finished checkpoint: it has no config.json")
    found, names = [*directory.iterdir(), *(directory / CHAT_TEMPLATE_DIR).glob("*.jinja")], listed(directory)

    def belongs(file: Path) -> bool:
        named = file.name in OURS | MODELS | (names or set()) or file.parent.name == CHAT_TEMPLATE_DIR
        return file.is_file() and not file.name.startswith(".") and (named or (names is None and file.suffix in SUFFIXES))

    files = [file for file in found if belongs(file)]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{directory} has no .safetensors file; expected a finished checkpoint")
    return sorted(files, key=lambda file: (file.suffix == ".safetensors", file))


def card_for(directory: Path, repository: str) -> str:
    """The model card, opening the model by the repository's name."""
    card = directory / CARD
    plain = f"---\nlibrary_name: transformers\ntags: [sparse, losa]\n---\n# {directory.resolve().name}\n"
    return opening(read_text(card) if card.is_file() else plain, repository)


def _public(file: Path) -> bytes | str:
    """A file, or the content of one in which paths were made public.

    Raises:
        ValueError: one that cannot be read as what losa wrote.
    """
    if file.name not in PUBLIC:
        return str(file)
    with door(file, "push"):
        shown: dict[str, Any] = PUBLIC[file.name](read_json(file))
    return to_json(shown, file.name).encode()


def push(directory: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads a checkpoint; returns the address of the commit. Of local paths in what losa measured and recorded only the last
    part is published.

    Args:
        repository: `owner/name`; made if it is not there.
        private: whether only its owner sees a repository that is made now.
        revision: branch; the main one when None.

    Raises:
        ValueError: not a finished checkpoint, a damaged record, or the hub refuses, with what it says.
    """
    files = files_to_push(directory)
    operations = [
        CommitOperationAdd(file.relative_to(directory).as_posix(), _public(file)) for file in files if file.name != CARD
    ]
    operations.append(CommitOperationAdd(CARD, card_for(directory, repository).encode()))
    api = HfApi(library_name="losa")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        message = f"losa push {directory.resolve().name}"
        done = api.create_commit(repository, operations, commit_message=message, revision=revision)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"cannot push to {repository!r}: {' '.join(str(error).split())}; `hf auth login` signs in") from error
    return str(done.commit_url)
