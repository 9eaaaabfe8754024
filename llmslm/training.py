"""The Lightning CLI of llmslm: recipes in, trained systems out."""

import difflib
import importlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI itself still uses what is deprecated

from jsonargparse import ArgumentError, dict_to_namespace
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning_utilities.core import rank_zero
from torch import OutOfMemoryError

from llmslm.callbacks.predictions import WritePredictions
from llmslm.callbacks.safeguard import Safeguard
from llmslm.callbacks.save_system import SaveSystem
from llmslm.callbacks.throughput import LogThroughput
from llmslm.callbacks.tracking import MlflowLogger, RecordRun
from llmslm.callbacks.watch import WatchRanks, is_lost_rank
from llmslm.data.datamodule import TextDataModule
from llmslm.errors import UserError
from llmslm.fsdp1 import translated
from llmslm.models.components import Component
from llmslm.module import SystemModule
from llmslm.progress import TrainingProgress
from llmslm.recipe import recipe_names, resolve_recipes
from llmslm.resume import CheckpointFiles, resolve
from llmslm.writing import raise_if_full

SUBCOMMANDS = ("fit", "validate", "test", "predict")
RUNS = Path("runs")
# Advice of Lightning that does not fit: nothing that a user of a recipe could or should act on.
QUIET = (
    r".*LeafSpec.*",  # its own use of a helper that torch renames
    r"Found .* module\(s\) in eval mode",  # the frozen encoder, on purpose
    r"It is recommended to use `self\.log\('(val|test)/",  # a metric, which is reduced when it is computed
    r"You are using a custom batch sampler",  # ours returns every index in evaluation
)


class Cli(LightningCLI):
    """LightningCLI with a run folder, a logger and a system folder for every recipe."""

    recipe_name = "run"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SaveSystem, "save_system")
        parser.add_lightning_class_args(WritePredictions, "predictions")
        parser.add_lightning_class_args(Safeguard, "safeguard")
        parser.add_lightning_class_args(WatchRanks, "watch")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.mode": "min",
                "checkpoint.save_last": True,
                "checkpoint.filename": "step-{step}",
                "checkpoint.auto_insert_metric_name": False,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Name the run folder and the MLflow run after recipe and system, where the recipe leaves them open."""
        config = self.config[self.subcommand]
        system = config.model.system
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(RUNS / self.recipe_name / system)
        if config.save_system.recipe is None:
            config.save_system.recipe = self.recipe_name
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(config.trainer.default_root_dir) / "checkpoints")
        logger = config.trainer.logger
        init = getattr(logger, "init_args", None)
        if init is not None and "run_name" in init and init.run_name is None:
            init.run_name = f"{self.recipe_name}/{system}"
        strategy = config.trainer.strategy
        if hasattr(strategy, "as_dict"):
            strategy = strategy.as_dict()
        _check_strategy(strategy)
        sharding = translated(strategy, config.trainer.devices)
        if sharding is not strategy:
            rank_zero.rank_zero_info(f"FSDPStrategy is run as FSDP2: {sharding}")
            config.trainer.strategy = dict_to_namespace(sharding)
        config.ckpt_path = self._checkpoint(config.ckpt_path, config.checkpoint.dirpath)

    def _checkpoint(self, given: str | None, folder: str) -> str | None:
        """Find the checkpoint to begin with; only `fit` may do without one unasked."""
        found = resolve(given, folder)
        if found is None and self.subcommand != "fit":
            if given is not None:
                raise UserError(f"there is no whole checkpoint in {folder}; train first, or give another (--ckpt_path)")
            rank_zero.rank_zero_info(
                f"no --ckpt_path: {self.subcommand} takes the weights from before training; --ckpt_path last takes the "
                f"newest whole checkpoint of {folder}"
            )
        return found

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Write the Trainer's checkpoints safely, whatever its strategy; draw a bar that does not slow it down.

        Copies (DDP) reduce gradients where they lie: without a view into DDP's buckets each rank holds them twice.
        """
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy._ddp_kwargs["gradient_as_bucket_view"] = True
        bar, chosen = trainer.progress_bar_callback, self._get(self.config_init, "trainer.callbacks") or []
        if bar is not None and bar not in chosen:
            trainer.callbacks[trainer.callbacks.index(bar)] = TrainingProgress()  # type: ignore[attr-defined]
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments; Lightning would warn that they are not those of the process."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            keys = self._subcommand_parsers[args[0]].get_defaults().keys(branches=True)
            raise ArgumentError(None, f"{error}{_hint(str(error), keys)}") from error

    def _parse_ckpt_path(self) -> None:
        """Let the command line win: Lightning would let the checkpoint's hyperparameters override it."""


@contextmanager
def _in_words() -> Iterator[None]:
    """Turn what stops a training from outside into a line for the user.

    Raises:
        UserError: for settings that Lightning refuses, a device or a disk without room, and where another rank is gone.
    """
    try:
        yield
    except MisconfigurationException as error:
        no_gpu = "No supported gpu backend" in str(error)
        advice = "; --config hardware/cpu runs without one (trainer.accelerator)" if no_gpu else ""
        raise UserError(f"{plain(error)}{advice}") from error
    except OutOfMemoryError as error:
        advice = "lower data.micro_batch_size; `llmslm plan` says what else saves memory"
        raise UserError(f"{plain(error)}; {advice}") from error
    except ValueError as error:
        if not isinstance(error, UserError) and isinstance(error.__cause__, UserError):
            raise error.__cause__ from None  # what a part says of itself, where the parser then tried other types
        raise
    except (OSError, RuntimeError) as error:
        raise_if_full(error, "nothing more was written; free some space and resume with --ckpt_path last")
        if not isinstance(error, RuntimeError) or not is_lost_rank(error):
            raise
        raise UserError(
            "another rank of this run is gone, so this one stops; the rank that went first says why, if it could; "
            "start all again with --ckpt_path last"
        ) from error


@_in_words()
def run(args: list[str], callbacks: Sequence[Callback] = ()) -> None:
    """Run `fit`, `validate`, `test` or `predict` with the given arguments.

    Args:
        args: of the command line.
        callbacks: for programs that watch the run; recipes name their own.

    Raises:
        UserError: for mistakes in recipe, data or models, no room on device or disk, and where another rank is gone.
        jsonargparse.ArgumentError: for unknown keys and values of the wrong type.
    """
    args, Cli.recipe_name = resolve_recipes(args)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    rank_zero.log.addFilter(_is_no_advertisement)
    strict = {"exit_on_error": False, "allow_abbrev": False}
    Cli(
        SystemModule,
        TextDataModule,
        args=args,
        save_config_callback=RecordRun,
        # The data module deals out batches itself, the same number to every rank.
        trainer_defaults={
            "logger": {"class_path": f"{MlflowLogger.__module__}.MlflowLogger"},
            "use_distributed_sampler": False,
            "callbacks": [LogThroughput(), *callbacks],
        },
        parser_kwargs=strict | dict.fromkeys(SUBCOMMANDS, strict),
        auto_configure_optimizers=False,
    )


def _check_strategy(strategy: Any) -> None:
    """Refuse a strategy that is nothing but a name to the parser, and no name to Lightning.

    Raises:
        UserError: with an example, or where the arguments of a class are listed.
    """
    names = ("auto", *StrategyRegistry.available_strategies())
    if not isinstance(strategy, str) or strategy.lower() in names:
        return
    if strategy.startswith("{"):
        raise UserError(
            f"trainer.strategy {strategy} cannot be used: no such class, or one of its init_args is wrong; "
            "`llmslm fit --trainer.strategy.help CLASS` lists them"
        )
    raise UserError(
        f"trainer.strategy is {strategy}; expected auto, ddp or a class_path, for example llmslm.parallel.Fsdp"
    )


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Let pass what Lightning says, but for the services that it recommends at each start."""
    return not (isinstance(record.msg, str) and record.msg.startswith("💡 Tip: For seamless cloud"))


def _hint(message: str, keys: Iterable[str]) -> str:
    """Say what a parser's message may be about: a misspelt key, a misspelt part, or no recipe at all."""
    if "arguments are required" in message:
        return f"; give a recipe: --config NAME or FILE ({', '.join(recipe_names()[:4])}, ...)"
    if option := re.search(r"Option '([^']+)' is not accepted", message):
        names = _argument_names(message)
        return _meant(option[1], names) or (f"; expected one of {', '.join(names)}" if names else "")
    if key := re.search(r"unrecognized arguments: --([^\s=]+)|does not accept option '([^']+)'", message):
        names = [*keys]
        return _meant(_first_unknown(key[1] or key[2], names), names)
    part = re.search(r"dot import path string: (\w+)|has no attribute '(\w+)'", message)
    return _meant(part[1] or part[2], _part_names()) if part else ""


def _meant(given: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _first_unknown(key: str, names: Sequence[str]) -> str:
    """Cut a key behind the first part of it that there is not: it may be a section that is misspelt."""
    parts = key.split(".")
    heads = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return next((head for head in heads if head not in names), key)


def _argument_names(message: str) -> list[str]:
    """List the arguments with a default of the class that a parser's message names."""
    path = re.search(r"class_path[= ]'([\w.]+)\.(\w+)'", message)
    if path is None:
        return []
    try:
        parameters = inspect.signature(getattr(importlib.import_module(path[1]), path[2])).parameters
    except (ImportError, AttributeError, ValueError):
        return []
    return [name for name, parameter in parameters.items() if parameter.default is not parameter.empty]


def _part_names() -> list[str]:
    """List the projectors, fusions and alignments, those of the user too once their modules are imported."""
    names, found = [], [Component]
    while found:
        found += (cls := found.pop()).__subclasses__()
        names.append(cls.__name__)
    return names


def plain(values: Any) -> str:
    """Join a library's multi-line message into one line."""
    return " ".join(str(values).split())
