"""LoSA: sparse language models with their quality recovered.

`run` is the method; `prune`, `attach` and `merge` are its stages, one by one.
"""

from losa.adapter import attach, merge
from losa.config import LosaConfig
from losa.models import load
from losa.run import prune, run

__all__ = ["LosaConfig", "attach", "load", "merge", "prune", "run"]
