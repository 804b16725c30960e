"""Quality of a model."""

from losa.evaluation.checkpoint import evaluate_checkpoint
from losa.evaluation.perplexity import perplexity

__all__ = ["evaluate_checkpoint", "perplexity"]
