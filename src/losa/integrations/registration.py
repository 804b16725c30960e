"""`import losa` is enough for transformers to open packed checkpoints, and imports neither torch nor transformers.

transformers knows quantizers by two dictionaries in `transformers.quantizers.auto`, and has no entry point for those of others.
Where that module is already loaded when losa is imported, the plug-in registers there and then. Otherwise a finder, first on
`sys.meta_path`, waits for it: it finds the module by the finders that follow, has it loaded by its own loader, and registers as
soon as that is done. So whoever imports transformers afterwards finds losa there, and who never does pays for a comparison of
names at each import. Nothing of transformers is replaced or patched. A module that is reloaded, as notebooks do, gets the plug-in
again. The plug-in itself imports at its top only what transformers has loaded by then; anything else it imports when it is used.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
PLUGIN = "losa.integrations.transformers"


def install() -> None:
    """Registers the plug-in with transformers, at once or as soon as it is imported; any number of times."""
    if REGISTRY in sys.modules:
        import_module(PLUGIN)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Has the plug-in register. Where it was the plug-in that imported transformers, it is not complete yet, and registers at its
    own end."""
    register = getattr(import_module(PLUGIN), "register", None)
    if register is not None:
        register()


class _Finder:  # the classes of importlib.abc are not needed, and take longer to import than losa does
    """Finds nothing but transformers' registry, through the finders behind it."""

    def find_spec(self, fullname: str, path: Any, target: "ModuleType | None" = None) -> "ModuleSpec | None":
        """The module's own specification, with a loader that registers behind it."""
        if fullname != REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """The loader that it is given, which the module keeps; then the plug-in."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        """As the module's own loader does."""
        made: ModuleType | None = self.own.create_module(spec)
        return made

    def exec_module(self, module: "ModuleType") -> None:
        """As the module's own loader does, and registers."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        _register()
