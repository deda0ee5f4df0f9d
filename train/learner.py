"""How a whole network learns: its epochs, as a Lightning module. Importing Lightning takes seconds."""

from __future__ import annotations

import logging
import math
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from beeline.errors import short
from host import Say
from train import parallel, runs
from train.config import TrainConfig
from train.distil import Teacher, shrunk
from train.errors import RunError
from train.loader import Pictures
from train.logs import Logs
from train.model import Batch, Tally, head, normalised, write_state
from train.progress import Step, progress
from train.runs import Epoch, Report, ignore

# The least size of a tensor that a rate is relative to: a new bias is all zeros.
_LEAST_SIZE = 0.01
# As Lightning names them.
_PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Learner(LightningModule):
    """Trains `network` on uint8 batches; the configuration and the number of steps fix the schedule.

    `class_weights` are what a picture of each class counts in the loss, float32 `[classes]`; None: 1. With a `teacher`
    batches may be of larger pictures than the input.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TrainConfig,
        steps: int,
        class_weights: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self._config, self._fit, self._steps = config, config.fit, steps
        self._head = head(network)[1]
        # No part of this module, whose tensors are those that learn and are kept.
        self._class_weights, self._teacher = class_weights, teacher
        self.training_tally, self.validation_tally, self.watched_tally = Tally(), Tally(), Tally()

    def forward(self, pictures: Tensor) -> Tensor:
        """Turn uint8 `[N, 3, crop, crop]` into logits `[N, classes]`."""
        model = self._config.model
        logits: Tensor = self.network(normalised(pictures, model.mean, model.std))
        return logits

    def on_train_epoch_start(self) -> None:
        """Switch to training mode; frozen layers learn nothing, frozen batch normalisation no statistics.

        What is random in the network, as dropout, depends on seed, epoch and process, so that a resumed fit repeats it.
        """
        torch.manual_seed((parallel.rank() << 48) + (self._config.seed << 16) + self.current_epoch)
        self.training_tally = Tally()
        self.network.train()
        frozen = self.current_epoch < self._config.schedule.frozen
        for parameter in self.network.parameters():
            parameter.requires_grad_(not frozen)
        self._head.requires_grad_(True)
        if frozen or self._fit.batch_norm == "frozen":
            for layer in self.network.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the loss of a batch, with the penalty that the head was solved with."""
        pictures, truths = batch
        logits = self(shrunk(pictures, self._config.model.geometry.shape))
        own = None if self._class_weights is None else self._class_weights.to(logits)
        loss = nn.functional.cross_entropy(logits, truths, own, label_smoothing=self._fit.label_smoothing)
        self.training_tally.add(loss, logits, truths)
        share = 1.0
        if (size := parallel.size()) > 1:
            # The mean over the processes is that over the pictures only where each has as much to say.
            counted = float(len(truths) if own is None else own[truths].sum()), float(len(truths))
            every = torch.tensor(parallel.gather(counted))
            of_labels, share = (every[parallel.rank()] * size / every.sum(0)).tolist()
            loss = loss * of_labels
        if self._teacher:
            loss = self._teacher.loss(pictures, logits, loss, share)
        if self._fit.head_penalty:
            loss = loss + self._fit.head_penalty / 2 * self._head.weight.square().sum()
        if not torch.isfinite(loss):
            epoch, rate = self.current_epoch + 1, self._fit.rate
            raise RunError(f"the loss is {loss.item()} in epoch {epoch}; lower fit.rate, which is {rate:g}")
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start new tallies; statistics that each process has learnt for itself become those that are kept."""
        self.validation_tally, self.watched_tally = Tally(), Tally()
        for buffer in self.network.buffers() if parallel.size() > 1 else ():
            torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, index: int, dataloader_idx: int = 0) -> None:
        """Count a batch of validation pictures, or of watched ones, which come second."""
        pictures, truths = batch
        logits = self(pictures)
        tally = self.watched_tally if dataloader_idx else self.validation_tally
        tally.add(nn.functional.cross_entropy(logits, truths), logits, truths)

    def configure_optimizers(self) -> Any:
        """AdamW, or SGD, with a rate for each tensor, which rises and falls over all steps.

        Adam moves every weight by about the rate, however large the weight is. Weights differ in size by a factor of
        fifty between layers, and frozen batch normalisation does not compensate: a rate that suits the first layer
        destroys the last. So a tensor's rate is relative to the size of its weights.
        """
        how, rate, groups = self._config.optimiser, self._fit.rate, []
        for tensor in self.network.parameters():
            size = max(_LEAST_SIZE, float(tensor.detach().square().mean().sqrt())) if how.relative else 1.0
            groups.append({"params": [tensor], "lr": rate * size})
        decay = self._fit.weight_decay
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=(how.momentum, 0.999), weight_decay=decay)
        if how.name == "sgd":
            optimizer = torch.optim.SGD(groups, rate, how.momentum, weight_decay=decay, nesterov=how.momentum > 0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def share(self, step: int) -> float:
        """Return the share of the full rate at `step`: a straight rise, then half a cosine down to zero, or all."""
        rise = max(1, round(self._fit.warm_up * self._steps))
        if step < rise:
            return (step + 1) / rise
        if self._config.schedule.shape == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self._steps - rise)))


def train_epochs(
    network: nn.Module,
    config: TrainConfig,
    pictures: Pictures,
    device: Mapping[str, str],
    run: Path,
    say: Say,
    class_weights: Tensor | None = None,
    taught_by: runs.Run | None = None,
    report: Report = ignore,
) -> list[Epoch]:
    """Train all epochs that the folder `run` has no checkpoint of; `network` becomes the one that is kept.

    `report` gets all rows so far after each epoch; what it raises stops the fit. `taught_by` is the run of a teacher.
    `device` has a `value`, `cpu` or `cuda`, and a `precision`, one of `fit.precision`. Return a row for each
    epoch up to the one whose network is kept: the last one, or the best for the watched pictures. Raise `RunError` for
    a loss that is not finite, a checkpoint that cannot be written, or an interrupt.
    """
    teacher = Teacher(taught_by, device["value"]) if taught_by else None
    inputs = [config.model.geometry, *([teacher.geometry] if teacher else [])]
    # Both see the same picture, and the one with the smaller input sees it shrunk.
    batches = pictures.train_dataloader(max(inputs, key=lambda each: each.shape))
    checkpoint = run / runs.CHECKPOINT
    halves = [half for half in (pictures.val, pictures.watched) if half is not None]
    learner = Learner(network, config, len(batches) * config.fit.epochs, class_weights, teacher)
    with quiet(), closing(Logs(run, config)) as logs:
        epochs = _Epochs(config, run, say, logs, report)
        trainer = _trainer(config, device, epochs)
        try:
            trainer.fit(
                learner,
                batches,
                [pictures.fixed(half.pictures[parallel.rank() :: parallel.size()]) for half in halves],
                ckpt_path=str(checkpoint) if checkpoint.is_file() else None,
                weights_only=True,
            )
        except SystemExit as error:
            if parallel.rank():
                raise
            # Lightning turns Ctrl-C and SIGTERM into this, the latter with exit code 0.
            done = f"{len(epochs.rows)} of {config.fit.epochs} epochs"
            raise RunError(f"the fit was interrupted after {done}; `beeline train --resume {run}` goes on") from error
        except RuntimeError as error:
            if parallel.size() == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
                raise
            if parallel.rank():
                raise SystemExit(RunError.exit_code) from error
            fix = f"start the same command again, or `beeline train --resume {run}` in one process"
            raise RunError(f"another process of the fit has ended ({short(error, 80)}); {fix}") from error
        if parallel.rank():
            return epochs.rows
        # A fit that was resumed after its last epoch has trained nothing, so the network comes from the checkpoint.
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        last = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
        network.load_state_dict(last if epochs.best is None else epochs.best)
        logs.files(epochs.rows, epochs.kept)
    return epochs.rows[: epochs.kept + 1]


def _trainer(config: TrainConfig, device: Mapping[str, str], epochs: Callback) -> Trainer:
    averaging = [] if config.fit.average is None else [EMAWeightAveraging(decay=config.fit.average)]
    # Buffers are sent before a validation: its batches are not as many in each process.
    several = DDPStrategy(broadcast_buffers=False, find_unused_parameters=config.schedule.frozen > 0)
    strategy: Any = several if parallel.size() > 1 else "auto"
    return Trainer(
        accelerator=device["value"],
        devices=parallel.local(),
        num_nodes=parallel.local("GROUP_WORLD_SIZE"),
        strategy=strategy,
        precision=_PRECISIONS[device["precision"]],
        max_epochs=config.fit.epochs,
        # The rows come first: averaging takes the averaged weights out at the end of a validation.
        callbacks=[epochs, *averaging],
        plugins=[_WholeFiles()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


class _WholeFiles(TorchCheckpointIO):
    """Writes checkpoints whole: Lightning's own way goes through another disk, from where it may be copied in part."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_state(checkpoint, Path(path))


class _Epochs(Callback):
    """Keeps a row and a checkpoint of each epoch, says it, and stops when the watched pictures get no better.

    `best` is the network that was best for them; None without such pictures.
    """

    def __init__(self, config: TrainConfig, run: Path, say: Say, logs: Logs, report: Report) -> None:
        self.rows: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None
        self._config, self._run, self._say, self._logs, self._start = config, run, say, logs, 0.0
        self._report, self._open = report, ExitStack()
        self._step: Step = lambda done: None

    @property
    def kept(self) -> int:
        """The index of the row whose network is kept: the best for the watched pictures, else the last."""
        losses = [row.watched_loss for row in self.rows if row.watched_loss is not None]
        return losses.index(min(losses)) if losses else len(self.rows) - 1

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.best = [Epoch(**row) for row in state["rows"]], state["best"]

    def on_train_start(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        self._stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        self._start = time.monotonic()
        text = f"epoch {len(self.rows) + 1}/{self._config.fit.epochs}"
        self._step = self._open.enter_context(progress(text, int(trainer.num_training_batches), self._say, "batches"))

    def on_train_batch_end(self, trainer: Trainer, learner: Learner, *batch: object) -> None:  # type: ignore[override]
        self._step(trainer.fit_loop.epoch_loop.batch_progress.current.completed)

    def on_exception(self, trainer: Trainer, learner: Learner, exception: BaseException) -> None:  # type: ignore[override]
        self._open.close()

    def on_validation_epoch_end(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        self._open.close()
        train, val = learner.training_tally.together(), learner.validation_tally.together()
        watching = learner.watched_tally.together()
        watched = watching.loss if watching.pictures else None
        seconds = round(time.monotonic() - self._start, 3)
        scores = val.loss, val.accuracy, seconds, watched, val.not_sure_under
        row = Epoch(len(self.rows) + 1, train.loss, train.accuracy, *scores)
        self.rows.append(row)
        if watched is not None and self.kept == len(self.rows) - 1:
            self.best = {key: value.cpu().clone() for key, value in learner.network.state_dict().items()}
        also = "" if watched is None else f"; watched loss {watched:.3f}"
        self._say(
            f"epoch {row.epoch}/{self._config.fit.epochs}: "
            f"training loss {row.train_loss:.3f}, accuracy {row.train_accuracy:.3f}; "
            f"validation loss {row.val_loss:.3f}, accuracy {row.val_accuracy:.3f} ({val.hits}/{val.pictures}){also}; "
            f"{seconds:.0f} s"
        )

    def on_train_epoch_end(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        path, count = self._run / runs.CHECKPOINT, len(self.rows)
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            kept = f"that of epoch {count - 1}" if path.is_file() else "none"
            what = (
                f"the checkpoint of epoch {count} cannot be written to {self._run} ({error.strerror}), {kept} is kept"
            )
            raise RunError(f"{what}; make room, then `beeline train --resume {self._run}` goes on") from error
        if not parallel.rank():
            self._logs.write(self.rows, self.kept)
        self._stop(trainer)
        self._report(self.rows)

    def _stop(self, trainer: Trainer) -> None:
        """Stop if the epochs since the kept one are as many as the patience, also right after a resume."""
        patience = self._config.schedule.patience
        if patience and self.rows and len(self.rows) - 1 - self.kept >= patience and not trainer.should_stop:
            trainer.should_stop = True
            better = f"the watched pictures got no better for {patience} epochs"
            self._say(f"stopped: {better}; epoch {self.kept + 1} is kept")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the advice of libraries, such as Lightning's "consider more workers"."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(lightning|torch|torchvision|timm|mlflow)\..*")
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
