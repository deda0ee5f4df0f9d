"""Any classifier of torchvision or timm by name, with a head that is solved for; Lightning is not needed for either."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from archive import architectures
from beeline.errors import ConfigError, short
from host.files import write_whole
from train import parallel
from train.config import ModelConfig

# An answer is a guess where fewer than three of four such are right; fewer pictures than these do not show where.
_SURE, _LEAST = 0.75, 20
# uint8 `[N, 3, crop, crop]` and the indices of their labels.
Batch = tuple[Tensor, Tensor]


def build(name: str, classes: int) -> nn.Module:
    """Return the architecture with random weights: float32 `[N, 3, H, W]` to logits `[N, classes]`."""
    if name in architectures.AUXILIARY:
        raise ConfigError(f"model.name is {name!r}, which returns several outputs while it trains; take another")
    return architectures.build(name, classes)


def head(network: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Return the layer that makes the logits, with its dotted name: the last linear or convolutional layer.

    In every torchvision classifier that is `fc`, `classifier.<n>`, `heads.head` or `head`. Those of timm name it.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    classifier = getattr(network, "get_classifier", lambda: layers[-1][1])()
    for name, layer in layers:
        if layer is classifier:
            return name, layer
    raise ConfigError(f"{type(network).__name__} has no single head, so it cannot be trained; take another")


def check_input(network: nn.Module, shape: tuple[int, int], name: str) -> None:
    """Run one empty picture through the network; raise `ConfigError` if it cannot take one of this height and width."""
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, *shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        high, wide = shape
        crop = f"model.crop is {high}" + ("" if wide == high else f" and model.width {wide}")
        raise ConfigError(f"{crop}, which {name} cannot take ({short(error)}); most take 224") from error
    finally:
        network.train(training)


def write_state(values: object, path: Path) -> None:
    """Write what `torch.save` takes whole or not at all; raise OSError when there is no room."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    write_whole(path, buffer.getvalue(), sync=True)


def guess_under(answered: Iterable[tuple[float, bool]]) -> float | None:
    """Return the score under which fewer than three of four answers are right; None where these show no such score.

    `answered` are best scores, each with whether it was right, smoothed to rise with the score (isotonic regression).
    """
    from scipy.optimize import isotonic_regression

    pairs = sorted(answered)
    if len(pairs) < _LEAST:
        return None
    shares = isotonic_regression([float(right) for _, right in pairs]).x
    guesses = int((shares < _SURE).sum())
    if guesses in (0, len(pairs)):
        return None if guesses == 0 else 1.0
    return round((pairs[guesses - 1][0] + pairs[guesses][0]) / 2, 2)


@dataclass
class Tally:
    """Loss and hits summed over the pictures of an epoch."""

    pictures: int = 0
    hits: int = 0
    total: float = 0.0
    answers: list[tuple[float, bool]] = field(default_factory=list)

    def add(self, loss: Tensor, logits: Tensor, truths: Tensor) -> None:
        """Count a batch; `loss` is its mean."""
        self.pictures += len(truths)
        best = logits.detach().softmax(1).max(1)
        right = best.indices == truths
        self.hits += int(right.sum())
        self.answers += zip(best.values.tolist(), right.tolist(), strict=True)
        self.total += float(loss.detach()) * len(truths)

    def together(self) -> Tally:
        """Return the sum over all processes that train together."""
        every = parallel.gather(self)
        answers = [answer for each in every for answer in each.answers]
        return Tally(len(answers), sum(each.hits for each in every), sum(each.total for each in every), answers)

    @property
    def not_sure_under(self) -> float | None:
        """The score under which the best label is a guess, or None where these pictures do not show it."""
        return guess_under(self.answers)

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.total / self.pictures

    @property
    def accuracy(self) -> float:
        """The share of hits."""
        return self.hits / self.pictures


def balanced(counts: Sequence[int]) -> Tensor:
    """Return what a picture of each class counts, float32 `[classes]`, so that every class counts the same in all."""
    found = torch.tensor(counts, dtype=torch.float32)
    return found.sum() / (len(counts) * found)


def normalised(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn uint8 `[N, 3, H, W]` into the network's float32, channels last in memory (faster convolutions)."""
    scaled = pictures.float() / 255
    centre, spread = (torch.tensor(values, device=pictures.device).view(1, 3, 1, 1) for values in (mean, std))
    return ((scaled - centre) / spread).contiguous(memory_format=torch.channels_last)


def solve_head(
    network: nn.Module,
    batches: Iterable[Batch],
    penalty: float,
    model: ModelConfig,
    mirrored: bool = True,
    class_weights: Tensor | None = None,
) -> Tally:
    """Set the head of `network` to the best one for `batches`, in place; return its loss and hits on them.

    A new head is random, and the first training steps with it would distort good features (Kumar et al. 2022,
    "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"). On frozen features the best
    linear head is a small convex problem with one solution, whatever the seed.

    Half of `penalty` times the head's squared norm is added to the mean cross-entropy. With `mirrored` each picture's
    mirror image counts too. `class_weights` are what a picture of each class counts, float32 `[classes]`.
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
    weight, bias = _softmax_regression(inputs.clone(), wanted.clone(), layer.weight.shape[0], penalty, class_weights)
    tally, logits = Tally(), inputs @ weight.T + bias
    tally.add(nn.functional.cross_entropy(logits, wanted), logits, wanted)
    if isinstance(layer, nn.Conv2d):
        # SqueezeNet clips its head's maps at zero before it averages them. A constant added to every logit changes no
        # probability, so all maps are raised above zero, where nothing is clipped.
        bias = bias - bias.min() + weight.abs().max(0).values @ torch.stack(deepest).amax(0)
    with torch.no_grad():
        layer.weight.copy_(weight.float().reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(bias.float())
    return tally


def tallied(network: nn.Module, batches: Iterable[Batch], model: ModelConfig) -> Tally:
    """Return loss and hits of `network` in evaluation mode on `batches`."""
    tally, device = Tally(), head(network)[1].weight.device
    network.eval()
    with torch.inference_mode():
        for pictures, truths in batches:
            truths = truths.to(device)
            logits = network(normalised(pictures.to(device), model.mean, model.std))
            tally.add(nn.functional.cross_entropy(logits, truths), logits, truths)
    return tally


def _softmax_regression(
    inputs: Tensor, truths: Tensor, classes: int, penalty: float, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Minimise cross-entropy + penalty/2 * |weight|^2 over float64 `[N, features]`; L-BFGS from zero."""
    weight = torch.zeros(classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        own = None if class_weights is None else class_weights.double()
        loss = nn.functional.cross_entropy(inputs @ weight.T + bias, truths, own)
        value = loss + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
