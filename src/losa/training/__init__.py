"""Training under the mask: the Trainer and its loss (`trainer.py`), its rows (`rows.py`) and callbacks (`callbacks.py`), where it
is, update by update (`position.py`), and weights spread over processes (`sharding.py`)."""

from losa.training.modes import activation_checkpointing, every_block
from losa.training.rows import Rows, collate, separates_documents
from losa.training.trainer import LosaTrainer, train

__all__ = ["LosaTrainer", "Rows", "activation_checkpointing", "collate", "every_block", "separates_documents", "train"]
