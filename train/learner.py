"""A network's training and validation steps, as a Lightning module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.config import FitConfig, ModelConfig
from train.errors import RunError
from train.loader import Batch
from train.model import head

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
        logits = self.network(normalised(pictures, self._model.mean, self._model.std))
        assert isinstance(logits, Tensor)
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
            raise RunError(
                f"the loss is {loss.item()} in epoch {self.current_epoch + 1}; "
                f"lower fit.rate, which is {self._fit.rate:g}"
            )
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
        """AdamW with a rate for each tensor, rising and falling over all steps.

        Adam moves every weight by about the rate, however large the weight is. Weights differ in size by a factor of
        fifty between layers, and frozen batch normalisation does not compensate: a rate that suits the first layer
        destroys the last. So a tensor's rate is relative to the size of its weights.
        """
        groups = [
            {"params": [tensor], "lr": self._fit.rate * max(_LEAST_SIZE, _size(tensor))}
            for tensor in self.network.parameters()
            if tensor.requires_grad
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self._fit.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def share(self, step: int) -> float:
        """Return the share of the full rate at `step`: a straight rise, then half a cosine down to zero."""
        rise = max(1, round(self._fit.warm_up * self._steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self._steps - rise)))


@dataclass
class Tally:
    """Loss and hits summed over the pictures of an epoch."""

    pictures: int = 0
    hits: int = 0
    total: float = 0.0

    def add(self, loss: Tensor, logits: Tensor, truths: Tensor) -> None:
        """Count a batch; `loss` is its mean."""
        self.pictures += len(truths)
        self.hits += int((logits.detach().argmax(1) == truths).sum())
        self.total += float(loss.detach()) * len(truths)

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.total / self.pictures

    @property
    def accuracy(self) -> float:
        """The share of hits."""
        return self.hits / self.pictures


def normalised(pictures: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Turn uint8 `[N, 3, H, W]` into the network's float32, channels last in memory (faster convolutions)."""
    scaled = pictures.float() / 255
    centre, spread = (torch.tensor(values, device=pictures.device).view(1, 3, 1, 1) for values in (mean, std))
    return ((scaled - centre) / spread).contiguous(memory_format=torch.channels_last)


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())
