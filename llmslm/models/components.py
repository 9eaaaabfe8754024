"""Small parts of a composition (projector, fusion, alignment) that can be named in a recipe and in a config.json."""

import importlib
import inspect
from typing import Any, Self

from torch import Tensor, nn

from llmslm.errors import UserError

Spec = dict[str, Any]


class Component(nn.Module):
    """A part that rebuilds itself from `spec()`: its class path and its own arguments.

    A subclass stores every argument of its constructor under the argument's name; the widths
    `encoder_hidden_size` and `slm_hidden_size` are not part of the spec, since the two models decide them.
    """

    def __init__(self, encoder_hidden_size: int, slm_hidden_size: int) -> None:
        super().__init__()
        self.encoder_hidden_size = encoder_hidden_size
        self.slm_hidden_size = slm_hidden_size

    def metrics(self) -> dict[str, Tensor]:
        """Return scalars worth a curve in the log, by name; what is learned and can be read, such as a gate."""
        return {}

    def spec(self) -> Spec:
        """Return `{"class_path": ..., "init_args": {...}}`, plain types only."""
        names = [
            n for n in inspect.signature(type(self)).parameters if n not in ("encoder_hidden_size", "slm_hidden_size")
        ]
        return {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "init_args": {name: getattr(self, name) for name in names},
        }

    @classmethod
    def from_spec(cls, spec: Spec, encoder_hidden_size: int, slm_hidden_size: int) -> Self:
        """Build the part that `spec` names.

        Raises:
            UserError: if the class cannot be imported, is not a `cls`, or does not take the arguments.
        """
        module_name, _, class_name = spec["class_path"].rpartition(".")
        try:
            built_class = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"class_path {spec['class_path']!r} cannot be imported: {error}") from error
        if not (isinstance(built_class, type) and issubclass(built_class, cls)):
            raise UserError(f"class_path {spec['class_path']!r} is not a {cls.__name__}; name a subclass of it")
        try:
            part: Self = built_class(encoder_hidden_size, slm_hidden_size, **spec.get("init_args", {}))
        except TypeError as error:
            raise UserError(f"{spec['class_path']} does not take these init_args: {error}") from error
        return part
