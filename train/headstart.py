"""Solve for the head on frozen features before anything else moves.

A new head is random, and the first training steps with it would distort good features (Kumar et al. 2022,
"Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"). On frozen features the best
linear head is a small convex problem with one solution, whatever the seed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.learner import normalised
from train.loader import Batch
from train.model import head

_ITERATIONS = 200


def solve(
    network: nn.Module,
    batches: Iterable[Batch],
    penalty: float,
    mean: list[float],
    std: list[float],
    mirrored: bool = True,
) -> float:
    """Set the head of `network` to the best one for `batches`; return its accuracy on them.

    Args:
        network: its last layer is replaced in place; nothing else is touched.
        batches: uint8 `[N, 3, H, W]` pictures with their labels `[N]`.
        penalty: half of it times the head's squared norm is added to the mean cross-entropy.
        mean: per channel, of pixel values in 0..1; `std` likewise.
        std: see `mean`.
        mirrored: take each picture's mirror image too.
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
                    network(normalised(view, mean, std))
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
        # SqueezeNet clips its head's maps at zero before it averages them. Adding a constant to every logit changes
        # no probability, so all maps are raised above zero, where nothing is clipped.
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
    solver = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = nn.functional.cross_entropy(inputs @ weight.T + bias, truths) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
