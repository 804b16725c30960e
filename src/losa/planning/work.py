"""How much the stages of a run have to do, in tokens and in flops, and how long what is left of it takes at the pace so far.

Stages have the names that `record["seconds"]` has. Reading text and saving are none of them: they are not products of matrices.
"""

from collections.abc import Mapping
from typing import Any

from losa.config import LosaConfig
from losa.models import Decoder
from losa.pruning import get_pruner

ASSUMED_TOKENS = 340_000  # of an evaluation text that nobody has read yet: about what WikiText-2's test part has
# Whose pace a stage goes at before any of it was done; all others at that of evaluation, which is nothing but products.
LIKE = {"pruning": "baseline", "rounding": "pruning"}


def evaluations(config: LosaConfig, training: bool = True) -> int:
    """Times that perplexity is measured: dense, pruned only, reconstructed, before it is rounded, at the end; without training
    at both ends."""
    return 3 + bool(config.reconstruct.epochs) + bool(config.values) if training else 2


def evaluation_windows(config: LosaConfig) -> int:
    """Windows that perplexity is measured over, as far as a resolved configuration tells."""
    return config.eval.windows or max(1, ASSUMED_TOKENS // (config.eval.length or 1))


def training_rows(config: LosaConfig) -> int:
    """Rows of all dynamic steps together."""
    return config.train.samples or config.train.tokens // (config.train.length or 1)


def stage_flops(
    config: LosaConfig, decoder: Decoder, text_config: Any, windows: int | None = None, training: bool = True
) -> dict[str, float]:
    """Large products and attention of `losa run`, stage by stage, or of `losa prune`; solvers are not counted.

    Of a token and a weight: 2 flops in a forward, 6 in training (8 with checkpointing), 2 for the teacher; the head's weight has
    no gradient: 4. Attention over half a row on average: 2 T H flops a block and forward.

    Args:
        config: resolved.
        windows: of evaluation; what the configuration tells when None.
        training: whether it is `losa run`; `losa prune` prunes once.
    """
    prunable, hidden = sum(decoder.sizes()), int(text_config.hidden_size)
    head = text_config.vocab_size * hidden

    def forward(length: int) -> float:
        return 2 * prunable + 2 * length * hidden * len(decoder.blocks)

    train, calibrating, steps = config.train, config.calibration, config.steps if training else 1
    length, window, shown = train.length or 1, calibrating.length or 1, config.eval.length or 1
    walk = (calibrating.sequences or 1) * window * forward(window)
    pruned = (1 + (get_pruner(config.pruner).collect is not None)) * walk  # collect, advance
    errors = steps * min(calibrating.error_sequences, calibrating.sequences or 1) * window * forward(window)
    piece = config.reconstruct.length
    reconstructed = config.reconstructed_pieces * piece * forward(piece)
    short, measured = min(calibrating.rmi_length, window), windows or evaluation_windows(config)
    repeats = 3 + train.gradient_checkpointing + bool(train.distill or train.distill_blocks)
    return {
        "baseline": pruned if steps > 1 else 0.0,
        "importance": steps * config.importance_sequences * short * forward(short),
        "pruning": steps * pruned + errors,
        "reconstruction": (2 + 3 * config.reconstruct.epochs) * reconstructed if config.reconstruct.epochs else 0.0,
        "rounding": 2 * walk if config.values else 0.0,
        "training": training * training_rows(config) * length * (repeats * forward(length) + (2 * repeats - 2) * head),
        "evaluation": evaluations(config, training) * measured * shown * (forward(shown) + 2 * head),
    }


def remaining(work: Mapping[str, float], done: Mapping[str, float], seconds: Mapping[str, float]) -> float | None:
    """Seconds that are left of a run, every stage at its own pace so far, or at that of the stage most like it (`LIKE`).

    Args:
        work: of each stage, in any unit that all of them share.
        done: ratio of each stage that is done, absent if none.
        seconds: what each took so far.

    Returns:
        None where nothing is done whose pace tells.
    """
    seen = [stage for stage, whole in work.items() if whole * done.get(stage, 0.0) > 0 and stage in seconds]
    pace = {stage: seconds[stage] / (work[stage] * done[stage]) for stage in seen}
    left = 0.0
    for stage, whole in work.items():
        ahead = whole * (1 - done.get(stage, 0.0))
        if ahead <= 1e-6 * whole:
            continue
        alike = next((name for name in (stage, LIKE.get(stage), "evaluation") if name in pace), None)
        if alike is None:
            return None
        left += ahead * pace[alike]
    return left
