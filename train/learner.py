"""How a whole network learns: its epochs, as a Lightning module. Importing Lightning takes seconds."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from host import Say
from train.config import FitConfig, ModelConfig, TrainConfig
from train.errors import RunError
from train.loader import Pictures
from train.model import Batch, Tally, head, normalised
from train.progress import Step, progress
from train.runs import Epoch

# The least size of a tensor that a rate is relative to: a new bias is all zeros.
_LEAST_SIZE = 0.01


class Learner(LightningModule):
    """Fine-tunes `network` on uint8 batches; `fit` and the number of steps fix the schedule."""

    def __init__(self, network: nn.Module, model: ModelConfig, fit: FitConfig, steps: int) -> None:
        super().__init__()
        self.network = network
        self._model, self._fit, self._steps = model, fit, steps
        self._head = head(network)[1]
        self.training_tally, self.validation_tally = Tally(), Tally()

    def forward(self, pictures: Tensor) -> Tensor:
        """Turn uint8 `[N, 3, crop, crop]` into logits `[N, classes]`."""
        logits: Tensor = self.network(normalised(pictures, self._model.mean, self._model.std))
        return logits

    def on_train_epoch_start(self) -> None:
        """Switch to training mode; frozen batch normalisation stays in evaluation mode."""
        self.training_tally = Tally()
        self.network.train()
        if self._fit.batch_norm == "frozen":
            for layer in self.network.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the loss of a batch, with the penalty that the head was solved with."""
        pictures, truths = batch
        logits = self(pictures)
        loss = nn.functional.cross_entropy(logits, truths, label_smoothing=self._fit.label_smoothing)
        self.training_tally.add(loss, logits, truths)
        if self._fit.head_penalty:
            loss = loss + self._fit.head_penalty / 2 * self._head.weight.square().sum()
        if not torch.isfinite(loss):
            epoch, rate = self.current_epoch + 1, self._fit.rate
            raise RunError(f"the loss is {loss.item()} in epoch {epoch}; lower fit.rate, which is {rate:g}")
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start a new tally."""
        self.validation_tally = Tally()

    def validation_step(self, batch: Batch, index: int) -> None:
        """Count a batch of validation pictures."""
        pictures, truths = batch
        logits = self(pictures)
        self.validation_tally.add(nn.functional.cross_entropy(logits, truths), logits, truths)

    def configure_optimizers(self) -> Any:
        """AdamW with a rate for each tensor, which rises and falls over all steps.

        Adam moves every weight by about the rate, however large the weight is. Weights differ in size by a factor of
        fifty between layers, and frozen batch normalisation does not compensate: a rate that suits the first layer
        destroys the last. So a tensor's rate is relative to the size of its weights.
        """
        groups = []
        for tensor in self.network.parameters():
            if tensor.requires_grad:
                size = float(tensor.detach().square().mean().sqrt())
                groups.append({"params": [tensor], "lr": self._fit.rate * max(_LEAST_SIZE, size)})
        optimizer = torch.optim.AdamW(groups, weight_decay=self._fit.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def share(self, step: int) -> float:
        """Return the share of the full rate at `step`: a straight rise, then half a cosine down to zero."""
        rise = max(1, round(self._fit.warm_up * self._steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self._steps - rise)))


def train_epochs(network: nn.Module, config: TrainConfig, pictures: Pictures, device: str, say: Say) -> list[Epoch]:
    """Train all epochs on `device`, `cpu` or `cuda`, and return a row for each; `network` is changed in place.

    Raise `RunError` for a loss that is not finite, or an interrupt.
    """
    fit, batches, validation = config.fit, pictures.train_dataloader(), pictures.val_dataloader()
    lines = _Lines(fit.epochs, say)
    averaging = [] if fit.average is None else [EMAWeightAveraging(decay=fit.average)]
    with _quiet():
        trainer = Trainer(
            accelerator=device,
            devices=1,
            max_epochs=fit.epochs,
            callbacks=[*averaging, lines],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(Learner(network, config.model, fit, len(batches) * fit.epochs), batches, validation)
        except SystemExit as error:
            # Lightning turns Ctrl-C and SIGTERM into this, the latter with exit code 0.
            done = len(lines.epochs)
            raise RunError(
                f"the fit was interrupted after {done} of {fit.epochs} epochs and not kept; train again"
            ) from error
    return lines.epochs


class _Lines(Callback):
    """Collects one row an epoch and prints it, with progress through the batches."""

    def __init__(self, epochs: int, say: Say) -> None:
        self.epochs: list[Epoch] = []
        self._count, self._say, self._start = epochs, say, 0.0
        self._open = ExitStack()
        self._step: Step = lambda done: None

    def on_train_epoch_start(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        self._start = time.monotonic()
        text = f"epoch {len(self.epochs) + 1}/{self._count}"
        self._step = self._open.enter_context(progress(text, int(trainer.num_training_batches), self._say, "batches"))

    def on_train_batch_end(self, trainer: Trainer, learner: Learner, *batch: object) -> None:  # type: ignore[override]
        self._step(trainer.fit_loop.epoch_loop.batch_progress.current.completed)

    def on_exception(self, trainer: Trainer, learner: Learner, exception: BaseException) -> None:  # type: ignore[override]
        self._open.close()

    def on_validation_epoch_end(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        self._open.close()
        train, val = learner.training_tally, learner.validation_tally
        seconds = time.monotonic() - self._start
        scores = val.loss, val.accuracy, round(seconds, 3), val.not_sure_under
        row = Epoch(len(self.epochs) + 1, train.loss, train.accuracy, *scores)
        self.epochs.append(row)
        self._say(
            f"epoch {row.epoch}/{self._count}: training loss {row.train_loss:.3f}, accuracy {row.train_accuracy:.3f}; "
            f"validation loss {row.val_loss:.3f}, accuracy {row.val_accuracy:.3f} ({val.hits}/{val.pictures}); "
            f"{seconds:.0f} s"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's advice, such as "consider more workers"."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
