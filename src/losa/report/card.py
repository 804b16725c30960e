"""The model card of a sparse checkpoint. What comes from files is escaped: a card is shown in the browsers of others."""

import html
import json
import re
from typing import Any

from losa.report.content import (
    Table,
    gap_closed,
    layer_bytes,
    openers,
    overview,
    perplexities,
    public,
    samples,
    size,
    warning,
    zero_shot,
)


def model_card(
    record: dict[str, Any], name: str, evaluation: dict[str, Any] | None = None, bench: dict[str, Any] | None = None
) -> str:
    """Markdown with the front matter the hub reads: what was done, with which figures, and how to load it.

    Args:
        record: content of `losa.json`.
        name: of the output directory, shown as the title.
        evaluation: content of `eval.json`, where there is one.
        bench: content of `bench.json`, where there is one.
    """
    config, sparsity = record["config"], record["sparsity"]
    base, name = public(config["model"]), plain(name)
    hub = f"base_model: {_scalar(base)}\n" if base and base == config["model"] else ""
    pruner, pattern, seed = (plain(config[key]) for key in ("pruner", "pattern", "seed"))
    origin = f"`{plain(base)}`" if base else "a model"
    method = "LoSA (dynamic low-rank sparse adaptation)" if record["kind"] == "run" else "one-shot pruning"
    found = perplexities(record, evaluation)
    closed = gap_closed(record["perplexity"])
    gap = "" if closed is None else f"\nOf the gap in log-perplexity between pruned only and dense, {closed:.1%} is closed.\n"
    far = warning(record)
    note = "" if far is None else f"\n> {plain(far)}\n"
    tasks = f"\n{_markdown(zero_shot(evaluation))}\n" if evaluation and evaluation.get("tasks") else ""
    dense, packed, *rounded = (f"{size(count)} ({name})" for name, count in layer_bytes(record).items())
    said = samples(record)
    words = f"\n## Samples\n\n{_markdown(said)}\n" if said else ""
    return f"""---
library_name: transformers
{hub}tags: [sparse, losa, {_scalar(config["pruner"])}]
---
# {name}

A sparse version of {origin}: {sparsity["achieved"]:.2%} of the {sparsity["weights"]:,} weights of its decoder's linear layers are
exactly zero. Made by {method} with the {pruner} criterion, pattern {pattern}, seed {seed}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

{_markdown(overview(record, bench))}
{note}{gap}
{_markdown(found)}
{tasks}
These layers take {dense}; `losa pack` stores them in {packed}, or rounded in {" or ".join(rounded)}.

{_markdown(openers(record))}
{words}
[report.html](report.html) shows layer rates, ranks, errors and loss step by step; the configuration and all figures are in
`losa.json`.

The licence and the limits of use of the base model apply.
"""


def _markdown(table: Table) -> str:
    """A Markdown table with its note below."""
    rule = ["---"] * table.words + ["---:"] * (len(table.head) - table.words)
    cells = [table.head, *table.rows]
    head, *rows = [" | ".join(map(plain, row)) for row in cells]
    return "\n".join(f"| {line} |" for line in (head, " | ".join(rule), *rows)) + f"\n\n{plain(table.note)}"


def plain(text: Any) -> str:
    """A text of a file on one line, such that neither Markdown nor HTML makes a tag, a link, an image or a cell of it."""
    return re.sub(r"([\\`|\[\]])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _scalar(text: Any) -> str:
    """A text as a value of the front matter; quoted unless it is a plain word or the name of a model."""
    return text if isinstance(text, str) and re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(plain(text))
