"""A run that can be stopped at any moment: checkpoints to resume from, SIGTERM, steps that would ruin the weights."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from llmslm.data.loader import batches_of_steps
from llmslm.errors import UserError
from llmslm.resume import remove, remove_leftovers, replaced

REQUEUE = 75
"""Exit code after SIGTERM or SIGUSR1: all is saved, start again with --ckpt_path last (sysexits' EX_TEMPFAIL)."""
WARNINGS = (signal.SIGTERM, signal.SIGUSR1)
PREFIX = "resume-"
KEPT = 2
BAD_BATCHES = "bad_batches"


@contextmanager
def requeued_when_warned() -> Iterator[None]:
    """End with REQUEUE on a warning before training has begun or after it: the last checkpoint says all.

    A second warning on the way out is ignored. It would end the process with another code, and `srun` hands on the
    highest of all tasks.
    """
    ends = False

    def stop(_signal: int, _frame: Any) -> None:
        nonlocal ends
        if not ends:
            ends = True
            raise SystemExit(REQUEUE)

    before = {one: signal.signal(one, stop) for one in WARNINGS}
    try:
        yield
    except SystemExit:
        ends = True
        raise
    finally:
        for one, handler in before.items():
            signal.signal(one, signal.SIG_IGN if ends else handler)


@dataclass
class _Decision:
    """What all ranks decided about an optimizer step; the device may still be on its way there.

    Args:
        step: its number, from 1.
        flags: (3,) on the host once `known`: is it bad, does somebody want to stop, is it time to save.
        known: recorded behind them; None where they were there at once.
        losses: of its micro-batches.
        batches: their ids.
        made: when.
    """

    step: int
    flags: Tensor
    known: torch.cuda.Event | None
    losses: list[Tensor]
    batches: list[Any]
    made: float

    def read(self) -> list[bool]:
        """Wait until the device has come there."""
        if self.known is not None:
            self.known.synchronize()
        return [value > 0 for value in self.flags.tolist()]


class Safeguard(Callback):
    """Saves regularly and on SIGTERM or SIGUSR1, and skips the steps whose loss or gradients are not finite.

    A resumed run goes on exactly as the first one would have: the random numbers of a batch (dropout) follow from
    seed, rank and the batch's number alone. All ranks decide together, once a step, with one small reduction. A fused
    optimizer skips on the device, and what was decided is read a step later: to wait for each would leave the device
    idle between steps.

    Args:
        every_minutes: minutes between two checkpoints to resume from; the newest two are kept.
        every_n_steps: optimizer steps between two of them, beside the minutes.
        bad_steps: this many skipped steps in a row end the run; their last batch is saved for study.
    """

    def __init__(self, every_minutes: float = 10.0, every_n_steps: int | None = None, bad_steps: int = 10) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"safeguard.every_n_steps is {every_n_steps}; expected at least 1")
        if bad_steps < 1:
            raise UserError(f"safeguard.bad_steps is {bad_steps}; expected at least 1")
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self.bad_steps = bad_steps
        self.skipped = 0
        """Steps skipped since the beginning."""
        self._seed: int | None = None
        self._saved_at = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        """Forget what another run left behind."""
        self._in_a_row = 0
        self._asked = self._stop = self._save = False
        self._losses: list[Tensor] = []
        self._batches: list[Any] = []
        self._decision: _Decision | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew."""
        self._begin()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep no batch of a run that is over."""
        self._begin()

    # --- random numbers ---------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which would broadcast and save wherever it is; it restores them."""
        self._asked = self._asked or trainer.received_sigterm  # one that came before
        for warning in WARNINGS:
            signal.signal(warning, self._ask_to_stop)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over where there was no sanity check, and begin."""
        self.on_sanity_check_start(trainer, pl_module)
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**63
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            remove_leftovers(_folder(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give the batch its own random numbers and keep its ids until the step is done."""
        number = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        state = np.random.SeedSequence([self._seed or 0, trainer.global_rank, number]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0] >> np.uint64(1)))
        self._batches.append({k: v for k, v in batch.items() if isinstance(v, Tensor) and not v.is_floating_point()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on the last step; leave the seed as it was, and no checkpoints that a newer one replaces."""
        self._act(trainer)
        torch.manual_seed(self._seed or 0)
        if trainer.is_global_zero:
            paths = sorted(_folder(trainer).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
            if paths and not paths[-1].name.startswith(PREFIX):
                _keep(trainer, 0)

    # --- steps --------------------------------------------------------------------------------------------------------

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss of one micro-batch."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decide with all ranks: is the step good, does somebody want to stop, is it time to save."""
        self._act(trainer)
        step = trainer.global_step + 1
        due = trainer.is_global_zero and not self._save and time.monotonic() - self._saved_at > 60 * self.every_minutes
        bad = ~torch.stack([loss.float() for loss in self._losses]).isfinite().all() | ~_gradients_are_finite(optimizer)
        wishes = [torch.full_like(bad, wish, dtype=torch.float32) for wish in (self._asked, due)]
        flags = _maximum(torch.stack([bad.float(), *wishes]))
        known = torch.cuda.Event() if flags.is_cuda else None
        host = flags.to("cpu", non_blocking=True)
        if known is not None:
            known.record()
        self._decision = _Decision(step, host, known, self._losses, self._batches, time.monotonic())
        self._losses, self._batches = [], []
        if _skips_by_itself(trainer, optimizer):
            optimizer.found_inf = flags[0]  # type: ignore[attr-defined]
        elif self._act(trainer):
            optimizer.zero_grad(set_to_none=True)
        self._save = self._save or (self.every_n_steps is not None and step % self.every_n_steps == 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, and stop, where a step decided so; never in the middle of accumulated gradients."""
        if self._save:
            self._save = False
            self.save(trainer)
        self._exit_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Stop in the middle of a validation, too: it may take longer than the time that is left."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._stop = _maximum(torch.tensor([float(self._asked)], device=pl_module.device)).item() > 0
        if self._stop:
            self.save(trainer)
        self._exit_if_asked(trainer)

    # --- saving and stopping ------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint to resume from and remove those before the last two."""
        trainer.save_checkpoint(_folder(trainer) / f"{PREFIX}{trainer.global_step}.ckpt")
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            _keep(trainer, KEPT)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with."""
        last = self._decision is not None and self._decision.read()[0]
        return {"seed": self._seed, "skipped": self.skipped + last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same random numbers."""
        self._seed, self.skipped = state_dict["seed"], state_dict["skipped"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count no batch whose optimizer step is still to come: its gradients are lost, so it is trained again."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        begun = progress["total"]["processed"] - batches_of_steps(trainer)
        if begun:
            for counts in (progress["total"], progress["current"]):
                counts |= dict.fromkeys(("ready", "started", "processed", "completed"), counts["processed"] - begun)

    def _ask_to_stop(self, _signal: int, _frame: Any) -> None:
        self._asked = True

    def _exit_if_asked(self, trainer: Trainer) -> None:
        if self._stop:
            rank_zero_info(f"Stopped on request at step {trainer.global_step}: go on with --ckpt_path last")
            raise SystemExit(REQUEUE)

    def _act(self, trainer: Trainer) -> bool:
        """Act on what was decided about the last step; return whether it is skipped."""
        decision, self._decision = self._decision, None
        if decision is None:
            return False
        is_bad, stop, due = decision.read()
        self._stop = self._stop or stop
        self._save = self._save or stop or (due and decision.made > self._saved_at)  # else it was saved since
        self._in_a_row = self._in_a_row + 1 if is_bad else 0
        if is_bad:
            self.skipped += 1
            for logger in trainer.loggers:
                logger.log_metrics({"train/skipped_steps": float(self.skipped)}, decision.step)
            rank_zero_warn(f"step {decision.step} is skipped: its loss or gradients are not finite")
        if self._in_a_row >= self.bad_steps:
            self._give_up(trainer, decision)
        return is_bad

    def _give_up(self, trainer: Trainer, decision: _Decision) -> None:
        path = Path(trainer.default_root_dir) / BAD_BATCHES / f"rank-{trainer.global_rank}.pt"
        losses = [float(loss) for loss in decision.losses]
        with replaced(path) as aside:
            torch.save({"step": decision.step, "losses": losses, "batches": decision.batches}, aside)
        raise UserError(
            f"{self._in_a_row} steps in a row had a loss or gradients that are not finite (last losses: {losses}); "
            f"their last batch is in {path}; lower the learning rate (model.optimizer) or look at the batch, "
            "then go on with --ckpt_path last"
        )


def _skips_by_itself(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Whether the optimizer's kernel leaves all as it is where found_inf is 1, and nothing else sets that.

    Not so the fused SGD: a first step that it skips leaves its momentum as the memory happened to be.
    """
    is_fused = isinstance(optimizer, Adam | AdamW) and all(group["fused"] for group in optimizer.param_groups)
    return is_fused and not getattr(trainer.precision_plugin, "scaler", None)


def _folder(trainer: Trainer) -> Path:
    """Where ModelCheckpoint writes, or would write."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder or Path(trainer.default_root_dir) / "checkpoints")


def _keep(trainer: Trainer, count: int) -> None:
    """Remove all checkpoints to resume from but the newest."""
    paths = sorted(_folder(trainer).glob(f"{PREFIX}*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    for path in paths[: len(paths) - count]:
        remove(path)


def _gradients_are_finite(optimizer: Optimizer) -> Tensor:
    """Look at this rank's part of the gradients; one number on their device."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return torch.nn.utils.get_total_norm(local).isfinite()


def _maximum(flags: Tensor) -> Tensor:
    """Take the maximum of each flag over all ranks."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags
