"""LoSA: sparse language models with their quality recovered.

`run` is the method; `prune`, `attach` and `merge` are its stages, one by one. `load` opens what they made, packed or not;
`SparseConfig` is the plug-in for transformers' own `from_pretrained`, which opens packed checkpoints once losa is imported, be it
before transformers or after. Names are imported when first used, so that `import losa` and `losa --help` do not wait for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from losa.integrations.registration import install

if TYPE_CHECKING:
    from losa.adapter import attach, merge
    from losa.api import prune, run
    from losa.config import LosaConfig
    from losa.integrations.transformers import SparseConfig
    from losa.models import load
    from losa.runtime.linear import SparseLinear
    from losa.zeros import keep_zeros

__version__: str

_HOMES = {
    "LosaConfig": "losa.config",
    "SparseConfig": "losa.integrations.transformers",
    "SparseLinear": "losa.runtime.linear",
    "attach": "losa.adapter",
    "keep_zeros": "losa.zeros",
    "load": "losa.models",
    "merge": "losa.adapter",
    "prune": "losa.api",
    "run": "losa.api",
}

__all__ = ["LosaConfig", "SparseConfig", "SparseLinear", "attach", "keep_zeros", "load", "merge", "prune", "run"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("losa")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if find_spec(f"losa.{name}") is None:
        raise AttributeError(f"module 'losa' has no attribute {name!r}")
    return import_module(f"losa.{name}")  # its own modules are read when first used, too


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


install()  # the one thing done at import time: packed checkpoints open in transformers
