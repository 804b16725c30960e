"""Cheaper adapter gradients against the exact ones: at equal tokens, and at equal time.

    python benchmarks/gradients.py --model MODEL --data TRAIN_TEXT --eval-data HELD_TEXT --output DIR [--set key=value ...]

- exact: `G = dy^T x`, then `dB = s (M * G) A^T`, `dA = s B^T (M * G)`; 6 N O I flops a layer in a step.
- biased: the mask is dropped from these two, `dB = s dy^T (x A^T)`, `dA = s (dy B)^T x`, so `G` is never formed; 4 N O I.
- sampled: `G` of a quarter of the tokens, drawn anew in every layer and step, times four; unbiased; 4.5 N O I.

The time of a step is measured first, on four blocks of a 1.1 B Llama at 2,048 tokens, where large products count as they do in
real models. Then the small model is trained by each rule on the same number of tokens, and by the cheaper ones on as many more as
the exact rule's time would pay for.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import losa.adapter.layer as layer_module
from losa import LosaConfig, load, run
from losa.adapter import attach, masked_linears
from losa.adapter.function import MaskedLowRankLinear, adapter_gradients, effective_weight
from losa.loss import causal_loss
from losa.system.environment import keep_freed_memory
from losa.system.yaml_tree import parse_set


class BiasedLinear(MaskedLowRankLinear):
    """The mask dropped from the adapters' gradients."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, W_OI, bits, A_RI, B_OR, _ = ctx.saved_tensors
        dx = dy @ effective_weight(W_OI, bits, A_RI, B_OR, ctx.scale) if ctx.needs_input_grad[0] else None
        dy_NO, x_NI = dy.flatten(0, -2), x.flatten(0, -2)
        dB_OR = ctx.scale * (dy_NO.T @ (x_NI @ A_RI.T.to(x.dtype))).to(B_OR.dtype)
        dA_RI = ctx.scale * ((dy_NO @ B_OR.to(dy.dtype)).T @ x_NI).to(A_RI.dtype)
        return dx, None, None, None, dA_RI, dB_OR, None, None, None, None


class SampledLinear(MaskedLowRankLinear):
    """The adapters' gradients from a quarter of the tokens."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, W_OI, bits, A_RI, B_OR, _ = ctx.saved_tensors
        dx = dy @ effective_weight(W_OI, bits, A_RI, B_OR, ctx.scale) if ctx.needs_input_grad[0] else None
        dy_NO, x_NI = dy.flatten(0, -2), x.flatten(0, -2)
        chosen = torch.randperm(len(x_NI))[: len(x_NI) // 4]
        G_OI = dy_NO[chosen].T @ x_NI[chosen]
        dA_RI, dB_OR = adapter_gradients(G_OI, bits, A_RI, B_OR, ctx.scale * len(x_NI) / len(chosen))
        return dx, None, None, None, dA_RI, dB_OR, None, None, None, None


RULES = {"exact": MaskedLowRankLinear, "biased": BiasedLinear, "sampled": SampledLinear}


def use(rule: str) -> None:
    layer_module.MaskedLowRankLinear = RULES[rule]


def step_seconds(rounds: int = 5) -> dict[str, float]:
    from common import SHAPES, random_mask, random_model

    model = attach(random_model(SHAPES["1.1B"] | {"num_hidden_layers": 4}, "cpu"))
    for layer in masked_linears(model).values():
        layer.set_solution(random_mask(layer.weight))
        layer.set_rank(10)
    ids = torch.randint(0, 32000, (4, 512))
    seconds: dict[str, list[float]] = {rule: [] for rule in RULES}
    for _ in range(rounds):
        for rule in RULES:
            use(rule)
            start = time.perf_counter()
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            causal_loss(hidden, ids % hidden.shape[-1]).backward()  # the blocks alone: in a whole model the head is a small part
            seconds[rule].append(time.perf_counter() - start)
    return {rule: statistics.median(values[1:]) for rule, values in seconds.items()}


def trained(rule: str, values: dict, tokens: int) -> dict:
    use(rule)
    config = LosaConfig.load(overrides=values | {"train.tokens": tokens})
    return run(*load(config), config).losa_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "eval-data", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--tokens", type=int, default=275_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="key=value for every row")
    args = parser.parse_args()
    keep_freed_memory()
    seconds = step_seconds()
    lines = [
        f"step, 4 blocks of 1.1 B, 2,048 tokens: {', '.join(f'{rule} {value:.2f} s' for rule, value in seconds.items())}",
        "",
    ]
    lines += ["| gradients | tokens | perplexity, by seed |", "|---|---|---|"]
    more: Callable[[str], int] = lambda rule: round(args.tokens * seconds["exact"] / seconds[rule])  # noqa: E731
    cheaper = [rule for rule in RULES if rule != "exact"]
    for rule, tokens in [*((rule, args.tokens) for rule in RULES), *((rule, more(rule)) for rule in cheaper)]:
        found = []
        for seed in range(args.seeds):
            values = {"model": args.model, "train.data": args.data, "eval.data": args.eval_data, "seed": seed}
            found.append(trained(rule, values | parse_set(args.set), tokens)["perplexity"]["losa"])
        lines.append(f"| {rule} | {tokens:,} | {', '.join(f'{value:.2f}' for value in found)} |")
        Path(args.output).mkdir(parents=True, exist_ok=True)
        Path(args.output, "gradients.md").write_text("\n".join(lines) + "\n")
        print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
