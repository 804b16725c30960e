"""What the model card of a packed checkpoint says of its form, below all that it says of the model."""

from pathlib import Path

from losa.system.doors import read_text
from losa.system.output import CARD

HEADING = "\n## Packed\n"
NOTE = (
    HEADING + "This directory holds the model packed, with {values} values. It opens with the package `losa`:\n\n"
    '```python\nimport losa\n\nmodel, tokenizer = losa.load("{name}")\n```\n\n'
    "After `import losa`, transformers' own `from_pretrained` and `pipeline` open it too. Without it they warn of an unknown "
    "quantization type `losa` and end in size mismatches.\n\n"
    "`losa unpack` writes the checkpoint that transformers opens alone.\n"
)


def note_of(card: str) -> str:
    """What a card says of the packed form, nothing of any other."""
    return "".join(card.partition(HEADING)[1:])


def write_note(directory: Path, note: str) -> None:
    """Replaces what the card in a directory says of packing; a card that says nothing else comes and goes with it."""
    card = directory / CARD
    text = (read_text(card) if card.is_file() else "").split(HEADING)[0] + note
    if text:
        card.write_text(text, encoding="utf-8")
    else:
        card.unlink(missing_ok=True)
