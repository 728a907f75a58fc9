"""A call that waits for the import of a module, which it does not import itself."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType


def call_after_import(name: str, function: Callable[[], object]) -> None:
    """Call `function` at once if the top-level module `name` is imported already, else right after its import.

    `function` may import that module, but should import nothing that was waiting for it: whoever asked for the module
    is still in the middle of his own import.
    """
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Find one module as the other finders do, and call a function when it has been executed."""

    def __init__(self, name: str, function: Callable[[], object]):
        self.name, self.function = name, function

    def find_spec(self, name: str, path: Iterable[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == self.name:  # some loaders are shared by several modules
                    self.function()

            spec.loader.exec_module = exec_module
        return spec
