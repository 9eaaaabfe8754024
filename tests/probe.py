"""Callbacks for recipes of tests: they note losses, and kill or disturb the run at a given moment."""

import os
import signal
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback

import llmslm.resume
from llmslm.data import features, shards


class Losses(Callback):
    """Appends "<number> <loss>" of each micro-batch to losses.<rank>.txt, exactly."""

    def __init__(self, file: str = "losses", seconds: float = 0.0) -> None:
        self.file, self.seconds = file, seconds

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        number = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        with Path(f"{self.file}.{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{number} {outputs['loss'].item().hex()}\n")
        time.sleep(self.seconds)


class SlowValidation(Callback):
    """Says in <file>.begun that a validation has begun, then takes its time."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        Path(f"{self.file}.begun").touch()
        time.sleep(0.3)


class SlowEnd(Callback):
    """Says in <file>.begun that training is over and its weights are to be saved, then takes its time."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_fit_end(self, trainer, module):
        Path(f"{self.file}.begun").touch()
        for _ in range(300):  # a signal that another thread gets does not end a sleep
            time.sleep(0.1)


class SlowShards(Callback):
    """Makes shards of features small, and the writing of each slow: half of a file is there while it is written."""

    def __init__(self, shard_bytes: int, seconds: float) -> None:
        features.SHARD_BYTES, write = shard_bytes, shards.save_file

        def slowly(states, path):
            path.write_bytes(b"half")
            time.sleep(seconds)
            write(states, path)

        shards.save_file = slowly


class KillWhileSaving(Callback):
    """SIGKILL while the checkpoint of a step is written: "half" of it, before it is "renamed", or "after"."""

    def __init__(self, step: int, moment: str) -> None:
        self.step, self.moment = step, moment

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        if self.moment == "half":
            torch.save = self._half
        elif self.moment == "renamed":
            llmslm.resume.put = lambda *_: self._kill()
        else:
            rename = llmslm.resume.put
            llmslm.resume.put = lambda *paths: (rename(*paths), self._kill())

    def _half(self, checkpoint, file):
        file.write(os.urandom(20_000))
        file.flush()
        self._kill()

    def _kill(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)


class BadLoss(Callback):
    """Makes the loss of some steps NaN or infinite."""

    def __init__(self, steps: list[int], value: str) -> None:
        self.steps, self.value = steps, float(value)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step + 1 in self.steps and not hasattr(module, "_terms"):
            module._terms, module.loss_terms = module.loss_terms, lambda *args: self._spoil(module, *args)
        elif hasattr(module, "_terms"):
            module.loss_terms = module.__dict__.pop("_terms")

    def _spoil(self, module, *args):
        terms, tokens = module._terms(*args)
        return {name: term * self.value for name, term in terms.items()}, tokens
