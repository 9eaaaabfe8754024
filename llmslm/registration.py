"""Makes transformers know llm_to_slm from the moment that it is imported, without importing it here.

`import llmslm` costs milliseconds, transformers and torch seconds. So what is to be registered waits for the module of
transformers that keeps the register.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Register config, model and pipeline with transformers, now or when it is imported."""
    _after_import("transformers.models.auto.configuration_auto", _register_config)
    _after_import("transformers.pipelines", _register_pipeline)


def _register_config(module: ModuleType) -> None:
    if "llm_to_slm" not in module.CONFIG_MAPPING:
        module.CONFIG_MAPPING.register("llm_to_slm", LlmToSlmConfig)


def _register_pipeline(_: ModuleType) -> None:
    importlib.import_module("llmslm.pipeline")  # it registers itself at its end, also where it is imported first


class _Deferred(type):
    """A class that becomes the real one at first use, which registers itself and its model in its place."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(_real_config(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _real_config()(*args, **kwargs)


class LlmToSlmConfig(metaclass=_Deferred):
    """Stands in transformers' register until a folder of this type is loaded."""


def _real_config() -> Any:
    return importlib.import_module("llmslm.models.modeling").LlmToSlmConfig


def _after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with a module, now if it is imported already, or else right after its import."""
    module = sys.modules.get(name)
    action(module) if module is not None else sys.meta_path.insert(0, _Watch(name, action))


class _Watch(MetaPathFinder):
    """Finds one module as the others would, and lets its loader call back when it has been executed."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action
        self._asks_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != self.name or self._asks_others:
            return None
        self._asks_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asks_others = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # until now somebody may only have asked whether there is such a module
                    sys.meta_path.remove(self)
                    self.action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
