"""Made pictures: smooth seeded colours, moved by gradient ascent until the model is sure of their class.

The project ships nobody else's pictures, so every archive has pictures that were made for it. They need not look like
anything: the model must answer them clearly, and another preprocessing must give another answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from archive.graph import Differentiable
from beeline.spec import Geometry

# Sure but not saturated: at 0.88 a small change of the input still moves the probability.
AIM = 0.88
_GOOD_ENOUGH = (0.8, 0.95)
_STEPS = 60
_RATE = 0.3
# Cells of colour along the shorter side; with fewer, ascent takes three times the steps.
_CELLS = 40
# Ascent on slightly noisy pixels finds pictures whose answer does not depend on a decoder's rounding.
_NOISE = 3.0

Mistake = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pattern:
    """One picture to make: the class it should get, its size in pixels, its seed.

    `against` is a mistake on crops `[N, crop, crop, 3]` that this picture should expose.
    """

    target: int
    width: int
    height: int
    seed: int
    against: Mistake | None = None


def ascend(
    run: Differentiable, output: str, geometry: Geometry, patterns: Sequence[Pattern]
) -> list[NDArray[np.uint8]]:
    """Make the pictures, uint8 `[height, width, 3]` RGB upright, one for each pattern.

    Args:
        run: floats of 0..255, `[N, crop, crop, 3]`, to `[N, classes]`, with gradients.
        output: what `run` returns, `logits` or `probabilities`.
        geometry: resize and crop that come before `run`.
        patterns: what to make. The caller must check how sure the model is of the results.

    Raises:
        RuntimeError: when no gradient reaches the pictures.
    """
    grids = [_start(pattern).requires_grad_() for pattern in patterns]
    optimiser = torch.optim.Adam(grids, lr=_RATE)
    active = list(range(len(patterns)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        crops = torch.cat([_crop(_paint(grids[i], patterns[i]), geometry) for i in active])
        crops = crops + _NOISE * torch.randn(crops.shape, generator=generator)
        likely, unlikely = _logarithms(run(crops), output, [patterns[i].target for i in active])
        chances = likely.exp()
        # Cross-entropy to AIM also pulls back what is too sure.
        loss = -(AIM * likely + (1 - AIM) * unlikely).sum()
        exposed = torch.ones(len(active), dtype=torch.bool)
        for place, i in enumerate(active):
            mistake = patterns[i].against
            if mistake is not None:
                fooled, wary = _logarithms(run(mistake(crops[place : place + 1])), output, [patterns[i].target])
                loss = loss - wary.sum()
                exposed[place] = bool(fooled.exp() < chances[place] - 0.3)
        done = (chances > _GOOD_ENOUGH[0]) & (chances < _GOOD_ENOUGH[1]) & exposed
        active = [i for place, i in enumerate(active) if not done[place]]
        if not active:
            break
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if not any(grid.grad is not None and bool(grid.grad.any()) for grid in grids):
            raise RuntimeError("every gradient is zero")
        optimiser.step()
    with torch.no_grad():
        painted = [_paint(grid, pattern)[0].round() for grid, pattern in zip(grids, patterns, strict=True)]
    return [np.ascontiguousarray(picture.to(torch.uint8).numpy()) for picture in painted]


def _start(pattern: Pattern) -> Tensor:
    short = min(pattern.width, pattern.height)
    rows, columns = (max(2, round(_CELLS * side / short)) for side in (pattern.height, pattern.width))
    generator = torch.Generator().manual_seed(pattern.seed)
    return torch.randn(1, 3, rows, columns, generator=generator) * 0.7


def _paint(grid: Tensor, pattern: Pattern) -> Tensor:
    """Grid to picture: `[1, height, width, 3]`, floats of 0..255."""
    smooth = functional.interpolate(grid, size=(pattern.height, pattern.width), mode="bicubic", align_corners=False)
    return torch.sigmoid(smooth).permute(0, 2, 3, 1) * 255


def _crop(picture: Tensor, geometry: Geometry) -> Tensor:
    """Resize and crop as `beeline.pixels` does, but with gradients."""
    planes = picture.permute(0, 3, 1, 2)
    height, width = planes.shape[2:]
    scale = geometry.resize / min(height, width)
    size = (max(geometry.resize, int(height * scale)), max(geometry.resize, int(width * scale)))
    planes = functional.interpolate(planes, size=size, mode="bilinear", antialias=True)
    # Rounded as torchvision rounds, halves to even: shifted by a pixel, the model answers these pictures differently.
    top, left = (round((side - geometry.crop) / 2) for side in size)
    return planes[:, :, top : top + geometry.crop, left : left + geometry.crop].permute(0, 2, 3, 1)


def _logarithms(rows: Tensor, output: str, targets: list[int]) -> tuple[Tensor, Tensor]:
    """Return the logarithms of each row's probability of its target, and of all other classes together.

    Logarithms keep a gradient where a probability is rounded to 0 or 1.
    """
    logarithms = rows.clamp_min(1e-12).log() if output == "probabilities" else rows.log_softmax(1)
    chosen = functional.one_hot(torch.tensor(targets), rows.shape[1]).bool()
    return logarithms[chosen], logarithms.masked_fill(chosen, -torch.inf).logsumexp(1)
