"""How a network learns: its head is solved for on frozen features, then all of it trains, as a Lightning module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


def normalised(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn uint8 `[N, 3, H, W]` into the network's float32, channels last in memory (faster convolutions)."""
    scaled = pictures.float() / 255
    centre, spread = (torch.tensor(values, device=pictures.device).view(1, 3, 1, 1) for values in (mean, std))
    return ((scaled - centre) / spread).contiguous(memory_format=torch.channels_last)


def solve_head(
    network: nn.Module, batches: Iterable[Batch], penalty: float, model: ModelConfig, mirrored: bool = True
) -> float:
    """Set the head of `network` to the best one for `batches`, in place; return its accuracy on them.

    A new head is random, and the first training steps with it would distort good features (Kumar et al. 2022,
    "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"). On frozen features the best
    linear head is a small convex problem with one solution, whatever the seed.

    Half of `penalty` times the head's squared norm is added to the mean cross-entropy. With `mirrored` each picture's
    mirror image counts too.
    """
    _, layer = head(network)
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features, truths, deepest = [], [], []
    network.eval()
    try:
        with torch.inference_mode():
            for pictures, truth in batches:
                pictures = pictures.to(layer.weight.device)
                for view in (pictures, pictures.flip(3)) if mirrored else (pictures,):
                    network(normalised(view, model.mean, model.std))
                    maps = seen.pop().flatten(2) if isinstance(layer, nn.Conv2d) else seen.pop()[..., None]
                    features.append(maps.mean(2).double().cpu())
                    deepest.append(maps.abs().amax(dim=(0, 2)).double().cpu())
                    truths.append(truth)
    finally:
        hook.remove()
    inputs, wanted = torch.cat(features), torch.cat(truths)
    weight, bias = _softmax_regression(inputs.clone(), wanted.clone(), layer.weight.shape[0], penalty)
    accuracy = float(((inputs @ weight.T + bias).argmax(1) == wanted).double().mean())
    if isinstance(layer, nn.Conv2d):
        # SqueezeNet clips its head's maps at zero before it averages them. A constant added to every logit changes no
        # probability, so all maps are raised above zero, where nothing is clipped.
        bias = bias - bias.min() + weight.abs().max(0).values @ torch.stack(deepest).amax(0)
    with torch.no_grad():
        layer.weight.copy_(weight.float().reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(bias.float())
    return accuracy


def _softmax_regression(inputs: Tensor, truths: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Minimise cross-entropy + penalty/2 * |weight|^2 over float64 `[N, features]`; L-BFGS from zero."""
    weight = torch.zeros(classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = nn.functional.cross_entropy(inputs @ weight.T + bias, truths) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
