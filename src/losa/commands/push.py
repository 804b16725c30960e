"""`losa push`: a finished checkpoint to a repository of the hub, in one commit, with a card that says how it opens there."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from losa.system.output import CARD, work_dir


def files_to_push(directory: Path) -> list[Path]:
    """What belongs to a finished checkpoint: its files but hidden ones, the weights last.

    Raises:
        ValueError: not a finished checkpoint.
    """
    if not (directory / "config.json").is_file():
        why = "holds an interrupted run" if work_dir(directory).is_dir() else "has no config.json"
        raise ValueError(f"{directory} is not a finished checkpoint: it {why}")
    files = [file for file in sorted(directory.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{directory} has no .safetensors file; expected a finished checkpoint")
    return sorted(files, key=lambda file: file.suffix == ".safetensors")


def card_for(directory: Path, repository: str) -> str:
    """The model card, opening the model by the repository's name."""
    card = directory / CARD
    plain = f"---\nlibrary_name: transformers\ntags: [sparse, losa]\n---\n# {directory.resolve().name}\n"
    text = card.read_text("utf-8") if card.is_file() else plain
    return text.replace(f'"{directory.resolve().name}"', f'"{repository}"')


def push(directory: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads a checkpoint; returns the address of the commit.

    Args:
        repository: `owner/name`; made if it is not there.
        private: whether only its owner sees a repository that is made now.
        revision: branch; the main one when None.

    Raises:
        ValueError: not a finished checkpoint, or the hub refuses, with what it says.
    """
    files = files_to_push(directory)
    operations = [CommitOperationAdd(file.name, str(file)) for file in files if file.name != CARD]
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
