"""Pictures to batches: training pictures are varied, validation pictures are decoded as in the worker."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2

from beeline import pixels
from beeline.errors import RequestError, TooManyPixels
from beeline.spec import Geometry
from host.machine import cores, free_memory
from train import parallel
from train.cache import Cache
from train.config import AugmentConfig, TrainConfig
from train.data import DataSet, LabelledPictures, Picture, split
from train.errors import DataError
from train.index import most_pixels

# What a process that decodes pictures may take of the memory: PyTorch, its batches, and a picture of 50 megapixels.
_LOADER_BYTES = 1 << 30
_NO_CACHE = Cache(0)


class Draws(Sampler[tuple[int, int]]):
    """Yields every picture once an epoch, in random order, each with a seed of its own for its variation.

    Since the seed comes with the index, the number of loader processes does not change the pictures. Of processes that
    train together each draws its share: a batch of each makes the batch of a single process.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed, self._epoch = count, seed, 0
        self._own = slice(parallel.rank(), None, parallel.size())

    def __len__(self) -> int:
        return len(range(self._count)[self._own])

    def set_epoch(self, epoch: int) -> None:
        """Make the next draws those of an epoch, the first of which is 0; Lightning calls it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng((self._seed, self._epoch))
        self._epoch += 1
        order = random.permutation(self._count).tolist()
        return iter(list(zip(order, random.integers(2**63, size=self._count).tolist(), strict=True))[self._own])


class VaryingPictures(Dataset[tuple[Tensor, int]]):
    """Training pictures: uint8 `[3, crop, crop]`, cut, flipped and coloured at random.

    They are shrunk first, to where the smallest cut still has twice the sides of the input; `cache` keeps that. Shrunk
    to once its sides, ants and bees were 0.945 right over three seeds, and 0.952 if they were not shrunk.
    """

    def __init__(
        self, pictures: Sequence[Picture], augment: AugmentConfig, geometry: Geometry, cache: Cache = _NO_CACHE
    ) -> None:
        self._pictures, self._cache = pictures, cache
        narrowest = min(1.0, *augment.ratio, *(1 / ratio for ratio in augment.ratio))
        self._side = math.ceil(2 * max(geometry.shape) / math.sqrt(augment.scale[0] * narrowest))
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
            array = _decoded(picture, self._cache, f"at most {self._side}", partial(_shrunk, side=self._side))
            return self._vary(Image.fromarray(array)), picture.truth


class FixedPictures(Dataset[tuple[Tensor, int]]):
    """Pictures exactly as the worker sees them: uint8 `[3, crop, crop]` of the spec's geometry."""

    def __init__(self, pictures: Sequence[Picture], geometry: Geometry, cache: Cache = _NO_CACHE) -> None:
        self._pictures, self._geometry, self._cache = pictures, geometry, cache

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self._pictures[index]
        array = _decoded(picture, self._cache, str(self._geometry), partial(_seen, geometry=self._geometry))
        return torch.from_numpy(np.array(array)).permute(2, 0, 1), picture.truth


class Pictures:
    """The halves of a data set as loaders of batches; `watched` are training pictures that nothing is fitted to.

    There are such only where `schedule.patience` asks for them.
    """

    def __init__(self, data: DataSet, config: TrainConfig) -> None:
        self._config, self.train, self.val = config, data.train, data.val
        self.watched: LabelledPictures | None = None
        if config.schedule.patience is not None:
            self.train, self.watched = split(data.train, config.schedule.watched)
        self.loaders = _loaders() if config.data.loaders is None else config.data.loaders
        # Training and validation have such processes each.
        self._cache = Cache(int(config.data.cache * 1e9))

    def train_dataloader(self, geometry: Geometry | None = None) -> DataLoader[tuple[Tensor, int]]:
        """Return the varying training pictures, in a new order each epoch; `geometry` replaces the input's."""
        config, pictures = self._config, self.train.pictures
        varying = VaryingPictures(pictures, config.augment, geometry or config.model.geometry, self._cache)
        return self._loader(varying, Draws(len(pictures), config.seed))

    def fixed(self, pictures: Sequence[Picture]) -> DataLoader[tuple[Tensor, int]]:
        """Return these pictures in their order, as the worker sees them."""
        return self._loader(FixedPictures(pictures, self._config.model.geometry, self._cache))

    def _loader(
        self, pictures: Dataset[tuple[Tensor, int]], draws: Draws | None = None
    ) -> DataLoader[tuple[Tensor, int]]:
        # Without a generator of its own a loader changes the global random state.
        own = torch.Generator().manual_seed(0)
        together, size, pinned = parallel.size(), self._config.fit.batch, torch.cuda.is_available()
        count = len(self.train) if draws else 0
        # Batch normalisation that learns has no variance of one picture: rather than alone it joins other batches.
        # Of several processes each needs a picture of the last batch.
        while count > 1 and 0 < count % size < max(2, together) <= size:
            size += together
        size //= together
        return DataLoader(pictures, size, sampler=draws, num_workers=self.loaders, generator=own, pin_memory=pinned)


def _opened(data: bytes, side: int) -> Image.Image:
    """Open an upright RGB picture; a JPEG of over four times `side` pixels a side is scaled in its decoder."""
    return pixels.open_rgb(data, most_pixels(data), 2 * side)


def _seen(data: bytes, geometry: Geometry) -> NDArray[np.uint8]:
    """Decode as the worker does; a JPEG of more pixels than it takes is scaled while it is decoded."""
    try:
        return pixels.decode(data, geometry)
    except TooManyPixels:
        return pixels.resize_crop(_opened(data, 2 * max(geometry.resize, *geometry.shape)), geometry)


def _loaders() -> int:
    """Return how many processes decode pictures: on a CPU, the network needs the cores more."""
    spare = cores() - 1 if torch.cuda.is_available() else cores() // 4
    return max(0, min(spare, 16, free_memory() // (2 * _LOADER_BYTES)) // parallel.local())


def _shrunk(data: bytes, side: int) -> NDArray[np.uint8]:
    """Decode a picture to upright RGB whose shorter side is at most `side` pixels."""
    image = _opened(data, side)
    if (short := min(image.size)) > side:
        wide, high = (round(each * side / short) for each in image.size)
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _decoded(
    picture: Picture, cache: Cache, kind: str, decode: Callable[[bytes], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    try:
        # Pixels depend on Pillow too, which may come from another package.
        return cache.get(picture.path, f"{kind} {pixels.GEOMETRY} {PIL.__version__}", decode)
    except (RequestError, OSError) as error:
        raise DataError(
            f"the picture {picture.path} cannot be used: {error}; repair it or take it out of the folder"
        ) from error
