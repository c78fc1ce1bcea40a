"""Registers the quantizer plug-in with transformers without importing transformers.

Without the registration, stock ``from_pretrained`` fills packed layers with random weights and only warns. So it has
to happen in every order of imports: at once where ``transformers.quantizers.auto`` is loaded already, else right after
that module has run, through a finder on ``sys.meta_path`` that knows this one name. The finder stays: a reload of the
module builds its tables anew, and it costs one string comparison per import.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Makes sure that the plug-in is registered whenever transformers is there; harmless when called again."""
    sys.meta_path[:] = [_Finder(), *(finder for finder in sys.meta_path if not _is_ours(finder))]
    module = sys.modules.get(TARGET)
    if module is None:
        return
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        # Another thread is in the middle of it: this waits for that thread.
        module = importlib.import_module(TARGET)
    if hasattr(module, "register_quantizer"):
        _register()


def _register() -> None:
    try:
        quantizer = importlib.import_module("sparsebert.hf.quantizer")
        # Without the name, that module's own import brought us here, and it registers at its end.
        if hasattr(quantizer, "register"):
            quantizer.register()
    except Exception as error:
        # transformers itself is fine, and must stay importable for programs that load no packed checkpoint.
        warnings.warn(
            f"sparsebert could not register with transformers, which will load packed checkpoints with random "
            f"weights: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_ours(finder: object) -> bool:
    """By name: a second import of this package has classes of its own."""
    return (type(finder).__module__, type(finder).__name__) == (__name__, "_Finder")


class _Finder:
    """Finds ``TARGET`` as the other finders do, and has its loader register the plug-in afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        for finder in sys.meta_path:
            find = None if _is_ours(finder) else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """The real loader in every respect, but for the registration after ``exec_module``."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module gets its own loader back, so that nothing that inspects it later meets this one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)
