"""A system as an MLflow model: `mlflow.pyfunc.load_model("models:/quickstart-llm_to_slm/1").predict(["a prompt"])`."""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmslm.system import System


class Predictor:
    """What MLflow calls.

    Args:
        system: the loaded system.
    """

    def __init__(self, system: "System") -> None:
        self.system = system

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Generate from prompts: a list of texts, or a table with the column `prompt`.

        `max_new_tokens` among the params is the token budget; without it, it is the longest target of the training.
        """
        prompts: Iterable[Any] = model_input["prompt"] if hasattr(model_input, "columns") else model_input
        budget = int((params or {}).get("max_new_tokens", self.system.codec.text_format.max_target_tokens))
        return [made.text for made in self.system.generate([str(each) for each in prompts], max_new_tokens=budget)]


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Predictor:
    """The entry that MLflow looks for."""
    from llmslm.system import System

    return Predictor(System.load(path, encoder_source=(model_config or {}).get("encoder_source")))


def save_model(folder: Path, out: Path) -> None:
    """Write a system folder as an MLflow model.

    The frozen encoder is no part of a system folder and none of the model; a local one is named by its full path.

    Args:
        folder: of the system.
        out: of the model; must not exist.
    """
    from importlib.metadata import version

    with warnings.catch_warnings():
        # MLflow 3 warns of the annotations of classes of its own
        warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType")
        import mlflow.pyfunc

    source = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("encoder_source")
    local = source is not None and (folder / source).is_dir()
    mlflow.pyfunc.save_model(
        out,
        loader_module=__name__,
        data_path=folder,
        pip_requirements=[f"llmslm=={version('llmslm')}"],
        model_config={"encoder_source": str((folder / source).resolve())} if local else None,
    )
