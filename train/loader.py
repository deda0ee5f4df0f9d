"""Pictures to batches: training pictures are varied, validation pictures are decoded as in the worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2

from beeline import pixels
from beeline.errors import RequestError, TooManyPixels
from beeline.spec import Geometry
from train.config import AugmentConfig, TrainConfig
from train.data import DataSet, Picture
from train.errors import DataError
from train.index import most_pixels

T = TypeVar("T")


class Draws(Sampler[tuple[int, int]]):
    """Yields every picture once an epoch, in random order, each with a seed of its own for its variation.

    Since the seed comes with the index, the number of loader processes does not change the pictures.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed, self._epoch = count, seed, 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng((self._seed, self._epoch))
        self._epoch += 1
        order = random.permutation(self._count).tolist()
        return iter(list(zip(order, random.integers(2**63, size=self._count).tolist(), strict=True)))


class VaryingPictures(Dataset[tuple[Tensor, int]]):
    """Training pictures: uint8 `[3, crop, crop]`, cut, flipped and coloured at random."""

    def __init__(self, pictures: Sequence[Picture], augment: AugmentConfig, geometry: Geometry) -> None:
        self._pictures, self._side = pictures, max(geometry.resize, *geometry.shape)
        mode = InterpolationMode(geometry.interpolation)
        steps: list[torch.nn.Module] = [
            v2.RandomResizedCrop(geometry.shape, augment.scale, augment.ratio, mode, antialias=True),
            v2.RandomHorizontalFlip(augment.flip),
        ]
        if augment.colour:
            steps.append(v2.ColorJitter(augment.colour, augment.colour, augment.colour))
        self._vary = v2.Compose([*steps, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = draw
        picture = self._pictures[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._vary(_decoded(picture, partial(_opened, side=self._side))), picture.truth


class FixedPictures(Dataset[tuple[Tensor, int]]):
    """Pictures exactly as the worker sees them: uint8 `[3, crop, crop]` of the spec's geometry."""

    def __init__(self, pictures: Sequence[Picture], geometry: Geometry) -> None:
        self._pictures, self._geometry = pictures, geometry

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self._pictures[index]
        array = _decoded(picture, partial(_seen, geometry=self._geometry))
        return torch.from_numpy(np.array(array)).permute(2, 0, 1), picture.truth


class Pictures:
    """The two halves of a data set as loaders of batches."""

    def __init__(self, data: DataSet, config: TrainConfig) -> None:
        self._data, self._config = data, config

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the varying training pictures, in a new order each epoch."""
        config, pictures = self._config, self._data.train.pictures
        varying = VaryingPictures(pictures, config.augment, config.model.geometry)
        return self._loader(varying, Draws(len(pictures), config.seed))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the validation pictures in their order."""
        return self.fixed(self._data.val.pictures)

    def fixed(self, pictures: Sequence[Picture]) -> DataLoader[tuple[Tensor, int]]:
        """Return these pictures in their order, as the worker sees them."""
        return self._loader(FixedPictures(pictures, self._config.model.geometry))

    def _loader(
        self, pictures: Dataset[tuple[Tensor, int]], draws: Draws | None = None
    ) -> DataLoader[tuple[Tensor, int]]:
        # Without a generator of its own a loader changes the global random state.
        own = torch.Generator().manual_seed(0)
        count, size, config = len(draws or ()), self._config.fit.batch, self._config
        # Batch normalisation that learns has no variance of one picture: rather than alone it joins other batches.
        while count > 1 and count % size == 1 < size:
            size += 1
        return DataLoader(pictures, size, sampler=draws, num_workers=config.data.loaders, generator=own)


def _opened(data: bytes, side: int) -> Image.Image:
    """Open a picture for a random crop of `side` pixels; a JPEG of over eight times that is scaled in its decoder."""
    return pixels.open_rgb(data, most_pixels(data), 4 * side)


def _seen(data: bytes, geometry: Geometry) -> NDArray[np.uint8]:
    """Decode as the worker does; a JPEG of more pixels than it takes is scaled while it is decoded."""
    try:
        return pixels.decode(data, geometry)
    except TooManyPixels:
        return pixels.resize_crop(_opened(data, max(geometry.resize, *geometry.shape)), geometry)


def _decoded(picture: Picture, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(picture.path.read_bytes())
    except (RequestError, OSError) as error:
        raise DataError(
            f"the picture {picture.path} cannot be used: {error}; repair it or take it out of the folder"
        ) from error
