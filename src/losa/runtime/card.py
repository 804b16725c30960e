"""What the model card of a packed checkpoint says of its form, below all that it says of the model."""

import re
from pathlib import Path

from losa.system.doors import read_text
from losa.system.output import CARD

ROUNDED, HEADING = "\n## Rounded\n", "\n## Packed\n"
OPENS = "from transformers import AutoModelForCausalLM\n"
IMPORT = "import losa  # transformers opens packed checkpoints after this\n"
ROUNDING = (
    ROUNDED + "`losa pack` rounded the weights to {values} when all that is said above had been measured. `losa eval` measures "
    "what is here.{better}\n"
)
BETTER = " `losa round` rounds with less loss."
NOTE = (
    HEADING + "This directory holds the model packed, with {values} values. It opens with the package `losa`:\n\n"
    '```python\nimport losa\n\nmodel, tokenizer = losa.load("{name}")\n```\n\n'
    "After `import losa`, transformers' own `from_pretrained` and `pipeline` open it too. Without it they warn of an unknown "
    "quantization type `losa` and end in size mismatches.\n\n"
    "What is said above of other software holds for the checkpoint that `losa unpack` writes, which transformers opens alone.\n"
)


def note_of(card: str) -> str:
    """What a card says of the stored form, nothing of any other."""
    starts = [place for heading in (ROUNDED, HEADING) if (place := card.find(heading)) >= 0]
    return card[min(starts) :] if starts else ""


def with_note(card: str, note: str) -> str:
    """A card that says nothing of the stored form, and a note on it; the code that opens a packed one imports losa."""
    return (card.replace(OPENS, IMPORT + OPENS, 1) if HEADING in note else card) + note


def opening(card: str, name: str) -> str:
    """A card whose code opens the model by `name`, whatever the name was: in transformers' way and in losa's, once each."""
    for call in (r"from_pretrained\(", r"losa\.load\("):
        card = re.sub(rf'(?<={call})"[^"\n]*"', lambda _: f'"{name}"', card, count=1)
    return card


def write_note(directory: Path, note: str, name: str) -> None:
    """Replaces what the card in a directory says of packing; a card that says nothing else comes and goes with it. That weights
    were rounded stays.

    Args:
        name: of the directory, by which the card opens the model.
    """
    card = directory / CARD
    text = read_text(card) if card.is_file() else ""
    old = note_of(text)
    body = opening(text.removesuffix(old).replace(IMPORT, ""), name)
    rounded = "" if ROUNDED in note else old.split(HEADING)[0]
    text = with_note(body, rounded + note)
    if text:
        card.write_text(text, encoding="utf-8")
    else:
        card.unlink(missing_ok=True)
