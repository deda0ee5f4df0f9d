"""Pictures to batches: the worker's own way for validation, a reproducible variety for training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beeline import pixels
from host import silent
from train.cache import Cache
from train.config import AugmentConfig
from train.data import DataSet, Picture, read
from train.errors import DataError
from train.index import examine
from train.loader import Draws, Pictures, VaryingPictures
from train.plan import Plan


def test_validation_pictures_are_the_workers(tiny_plan: Plan) -> None:
    batches = list(Pictures(tiny_plan.data, tiny_plan.config).fixed(tiny_plan.data.val.pictures))
    pictures, truths = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = tiny_plan.data.val.pictures
    assert truths.tolist() == [picture.truth for picture in expected]
    for row, picture in zip(pictures, expected, strict=True):
        decoded = pixels.decode(picture.path.read_bytes(), tiny_plan.config.model.geometry)
        assert np.array_equal(row.permute(1, 2, 0).numpy(), decoded)


def epoch(plan: Plan, loaders: int = 0, seed: int = 0, epochs: int = 1) -> torch.Tensor:
    config = dataclasses.replace(plan.config, seed=seed, data=dataclasses.replace(plan.config.data, loaders=loaders))
    loader = Pictures(plan.data, config).train_dataloader()
    for _ in range(epochs - 1):
        list(loader)
    return torch.cat([pictures for pictures, _ in loader])


def test_training_pictures_are_the_same_however_many_processes_load_them(tiny_plan: Plan) -> None:
    assert torch.equal(epoch(tiny_plan), epoch(tiny_plan, loaders=2))


def test_another_seed_and_another_epoch_give_other_pictures_and_the_global_state_stays(tiny_plan: Plan) -> None:
    before = torch.random.get_rng_state()
    first = epoch(tiny_plan)
    assert (first.shape, first.dtype) == ((16, 3, 64, 64), torch.uint8)
    assert not torch.equal(first, epoch(tiny_plan, seed=1))
    assert not torch.equal(first, epoch(tiny_plan, epochs=2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_picture_is_drawn_once_an_epoch() -> None:
    draws = Draws(10, seed=3)
    first, second = list(draws), list(draws)
    assert sorted(index for index, _ in first) == list(range(10))
    assert [index for index, _ in first] != [index for index, _ in second]
    assert len({seed for _, seed in first + second}) == 20


def test_no_picture_is_a_training_batch_of_its_own(tiny_plan: Plan) -> None:
    config = dataclasses.replace(tiny_plan.config, fit=dataclasses.replace(tiny_plan.config.fit, batch=5))
    sizes = [len(truths) for _, truths in Pictures(tiny_plan.data, config).train_dataloader()]
    assert sizes == [6, 6, 4], "16 pictures in batches of 5 leave one"


def test_an_epoch_can_be_drawn_without_those_before_it() -> None:
    draws, other = Draws(10, seed=3), Draws(10, seed=3)
    epochs = [list(draws) for _ in range(3)]
    other.set_epoch(2)
    assert list(other) == epochs[2]


def test_the_cache_changes_no_picture(tiny_plan: Plan, tmp_path: Path) -> None:
    pictures, geometry = tiny_plan.data.train.pictures, tiny_plan.config.model.geometry
    plain = VaryingPictures(pictures, tiny_plan.config.augment, geometry)
    cached = VaryingPictures(pictures, tiny_plan.config.augment, geometry, Cache(10**8, tmp_path))
    for _ in range(2):
        assert all(torch.equal(plain[index, 5][0], cached[index, 5][0]) for index in range(len(pictures)))
    assert len(list(tmp_path.iterdir())) == len(pictures)


def test_watched_pictures_are_a_share_of_each_class_of_the_training_pictures(tiny_plan: Plan) -> None:
    schedule = dataclasses.replace(tiny_plan.config.schedule, patience=2, watched=0.25)
    pictures = Pictures(tiny_plan.data, dataclasses.replace(tiny_plan.config, schedule=schedule))
    assert pictures.watched is not None
    assert pictures.watched.counts() == {"circles": 2, "stripes": 2}
    assert {*pictures.train.pictures, *pictures.watched.pictures} == {*tiny_plan.data.train.pictures}
    assert not {*pictures.train.pictures} & {*pictures.watched.pictures}
    assert pictures.val is tiny_plan.data.val
    assert Pictures(tiny_plan.data, tiny_plan.config).watched is None


def test_colours_vary_too(tiny_plan: Plan) -> None:
    augment = AugmentConfig(scale=(1, 1), ratio=(1, 1), flip=0, colour=0.5)
    varying = VaryingPictures(tiny_plan.data.train.pictures, augment, tiny_plan.config.model.geometry)
    assert not torch.equal(varying[0, 1][0], varying[0, 2][0])


@pytest.mark.parametrize("half", ["train", "val"])
def test_a_picture_that_breaks_off_is_named(tiny_plan: Plan, drawn: Path, tmp_path: Path, half: str) -> None:
    whole = (drawn / "train/circles/000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    found = read(drawn)
    broken = dataclasses.replace(found.train, pictures=(Picture(tmp_path / "cut.png", 0),))
    pictures = Pictures(DataSet("x", "", broken, broken, ""), tiny_plan.config)
    loader = pictures.train_dataloader() if half == "train" else pictures.fixed(broken.pictures)
    with pytest.raises(DataError, match=r"the picture \S*cut\.png cannot be used: the PNG picture's .*repair it"):
        list(loader)


@pytest.mark.parametrize(("size", "batches"), [(5, [6, 6, 4]), (3, [4] * 4), (16, [16]), (15, [16]), (1, [1] * 16)])
def test_no_batch_of_an_epoch_is_a_single_picture(tiny_plan: Plan, size: int, batches: list[int]) -> None:
    """Batch normalisation that learns has no variance of one picture."""
    config = dataclasses.replace(tiny_plan.config, fit=dataclasses.replace(tiny_plan.config.fit, batch=size))
    loader = Pictures(tiny_plan.data, config).train_dataloader()
    assert [len(truths) for _, truths in loader] == batches
    assert len(loader) == len(batches)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_scan_of_64_megapixels_is_scaled_while_it_is_decoded(tiny_plan: Plan, drawn: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8000, 8000), (200, 30, 60)).save(tmp_path / "scan.jpg")
    fact = examine(tmp_path, [tmp_path / "scan.jpg"], silent)[tmp_path / "scan.jpg"]
    assert (fact.kind, fact.fault) == ("JPEG", "")
    scan = dataclasses.replace(read(drawn).train, pictures=(Picture(tmp_path / "scan.jpg", 0),))
    pictures = Pictures(DataSet("x", "", scan, scan, ""), tiny_plan.config)
    sizes: list[tuple[int, int]] = []
    upright = pixels._upright

    def measured(image: Image.Image) -> Image.Image:
        sizes.append(image.size)
        return upright(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "_upright", measured)
        for loader in (pictures.train_dataloader(), pictures.fixed(scan.pictures)):
            batch, _ = next(iter(loader))
            assert (batch[0].float().mean((1, 2)) - torch.tensor([200.0, 30, 60])).abs().max() < 3
    assert sizes == [(1000, 1000)] * 2
