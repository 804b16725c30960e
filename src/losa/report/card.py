"""The model card of a sparse checkpoint."""

from pathlib import Path
from typing import Any

TITLES = {"dense": "dense", "pruned": "pruned only", "losa": "LoSA"}


def model_card(record: dict[str, Any], name: str) -> str:
    """Markdown with the front matter the hub reads: what was done, with which figures, and how to load it.

    Args:
        record: content of `losa.json`.
        name: of the output directory, shown as the title.
    """
    config, sparsity, evaluation = record["config"], record["sparsity"], record["evaluation"]
    base, data = _public(config["model"]), _public(evaluation["data"])
    hub = f"base_model: {base}\n" if base and base == config["model"] else ""
    method = "LoSA (dynamic low-rank sparse adaptation)" if record["kind"] == "run" else "one-shot pruning"
    rows = "\n".join(f"| {TITLES[key]} | {value:.3f} |" for key, value in record["perplexity"].items())
    return f"""---
library_name: transformers
{hub}tags: [sparse, losa, {config["pruner"]}]
---
# {name}

A sparse version of `{base}`: {sparsity["achieved"]:.2%} of the {sparsity["weights"]:,} weights of its decoder's linear layers are
exactly zero. Made by {method} with the {config["pruner"]} criterion, pattern {config["pattern"]}, seed {config["seed"]}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

| model | perplexity |
|---|---|
{rows}

Windows of {evaluation["window"]} tokens, {evaluation["windows"]} of them, from: {data}.
The configuration, versions, layer rates, ranks and errors of every step are in `losa.json`.

The licence and the limits of use of the base model apply.
"""


def _public(source: str) -> str:
    """A hub name as it is; of a local path only the last part, for a card is published and directories are private."""
    return Path(source).name if Path(source).exists() else source
