"""A small BLIP, trained from nothing on drawn pictures with captions; it is exported like any checkpoint."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from archive import caption
from archive.export import ExportRequest
from archive.goldens import scenes
from beeline.errors import ConfigError, did_you_mean, short
from beeline.spec import NAME, Accuracy, ModelSpec, Provenance
from host import ROOT, Say
from host.files import whole_folder

CONFIG = ROOT / "config" / "train" / "task" / "caption.yaml"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
_PAD, _END, _START = (_SPECIAL.index(each) for each in ("[PAD]", "[SEP]", "[DEC]"))
_PLACES = ["above", "on", "the", "left", "right", "##s"]
_WORDS = (*_SPECIAL, *scenes.COUNTS[1:], *scenes.COLOURS, *scenes.SHAPES, *scenes.GROUNDS, *_PLACES)
_EVERY = 100
_HEADS, _POSITIONS, _PATCH = 4, 64, 16


@dataclass(frozen=True)
class CaptionConfig:
    """The keys of config/train/task/caption.yaml, which says what they are."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    version: Annotated[str, Field(pattern=f"^{NAME}$")]
    seed: int
    pictures: PositiveInt
    held_out: PositiveInt
    steps: PositiveInt
    batch: PositiveInt
    rate: PositiveFloat
    side: Annotated[PositiveInt, Field(ge=_PATCH)]
    width: Annotated[PositiveInt, Field(multiple_of=_HEADS)]
    encoder: PositiveInt
    decoder: PositiveInt
    max_tokens: Annotated[PositiveInt, Field(lt=_POSITIONS)]


def compose(overrides: Sequence[str]) -> CaptionConfig:
    """Return the file's values with `key=value` over them; raise `ConfigError` for a key or value that does not fit."""
    known = [field.name for field in fields(CaptionConfig)]
    for word in overrides:
        if (key := word.partition("=")[0]) not in known:
            raise ConfigError(f"unknown key {key} of task=caption{did_you_mean(key, known)}")
    try:
        values = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(CONFIG), OmegaConf.from_dotlist([*overrides])))
        return TypeAdapter(CaptionConfig).validate_python(values)
    except (OmegaConfBaseException, ValidationError) as error:
        why = short(error, end=True)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{first['loc'][0]} is {first['input']!r}: {first['msg']}"
        raise ConfigError(f"task=caption: {why}; correct the value") from error


def fit(config: CaptionConfig, runs: Path, say: Say) -> tuple[Path, ModelSpec]:
    """Draw, train, measure and export; return the run's folder, with `checkpoint/` and `export/`, and the spec.

    Raise `ArchiveError` where it cannot be exported: a network that learned nothing notices no mistake.
    """
    start = time.monotonic()
    run = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.name}"
    with torch.random.fork_rng(), whole_folder(run) as folder:
        torch.manual_seed(config.seed)
        checkpoint = _checkpoint(config, folder / "checkpoint")
        say(f"drawing {config.pictures + config.held_out} pictures ...")
        _train(checkpoint, config, say)
        checkpoint.model.save_pretrained(folder / "checkpoint")
        right = exact(checkpoint, *drawn(config, "held out", config.held_out), config.max_tokens)
        say(f"{right:.3f} of {config.held_out} held-out captions are exactly right, {time.monotonic() - start:.0f} s")
        request = ExportRequest(
            name=config.name,
            version=config.version,
            labels=(),
            preprocessing=checkpoint.preprocessing,
            architecture="blip",
            accuracy=Accuracy(round(right, 4), config.held_out, "drawn pictures, the whole caption"),
            provenance=Provenance("drawn shapes", True, "random", "apache-2.0"),
        )
        spec = caption.export(checkpoint, request, folder / "export", max_tokens=config.max_tokens)
    return run, spec


def drawn(config: CaptionConfig, part: str, count: int) -> tuple[Any, list[str]]:
    """Return uint8 `[count, side, side, 3]` and captions; `part` names the set."""
    crops, captions = [], []
    for index in range(count):
        rng = random.Random(f"{config.seed}/{part}/{index}")
        picture, words = scenes.draw(rng, (rng.randint(64, 160), rng.randint(64, 160)))
        # As a worker squashes pictures.
        crops.append(np.asarray(picture.resize((config.side, config.side), Image.Resampling.BICUBIC)))
        captions.append(words)
    return np.stack(crops), captions


def exact(checkpoint: caption.Checkpoint, crops: Any, captions: Sequence[str], most: int) -> float:
    """Return the share of pictures whose greedy caption is exactly the one that was drawn."""
    planes, words = checkpoint.planes(crops), checkpoint.tokenizer
    rows = [checkpoint.model.generate(part, max_new_tokens=most, do_sample=False) for part in torch.split(planes, 100)]
    texts = [words.decode(row[1:], skip_special_tokens=True) for part in rows for row in part]
    expected = [words.decode(words(each).input_ids, skip_special_tokens=True) for each in captions]
    return float(np.mean([one == other for one, other in zip(texts, expected, strict=True)]))


def _checkpoint(config: CaptionConfig, folder: Path) -> caption.Checkpoint:
    """Return a network with random weights, by its files, so that it is read like any other."""
    transformers = caption.transformers_for("task=caption")
    shape = {"hidden_size": config.width, "intermediate_size": 4 * config.width, "num_attention_heads": _HEADS}
    tokens = {"bos_token_id": _START, "eos_token_id": _END, "sep_token_id": _END, "pad_token_id": _PAD}
    places = {"max_position_embeddings": _POSITIONS, "vocab_size": len(_WORDS), "num_hidden_layers": config.decoder}
    vision = {
        "image_size": config.side,
        "patch_size": _PATCH,
        "num_hidden_layers": config.encoder,
        "initializer_range": 0.02,
    }
    both = transformers.BlipConfig(text_config={**shape, **tokens, **places}, vision_config={**shape, **vision})
    network = transformers.BlipForConditionalGeneration(both)
    # As large as what a patch gives; of transformers' 0.02 the places are learned much later.
    torch.nn.init.normal_(network.vision_model.embeddings.position_embedding, std=0.5)
    network.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(_WORDS) + "\n", encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sides = {"height": config.side, "width": config.side}
    transformers.BlipImageProcessor(size=sides).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nTrained on drawn shapes.\n", encoding="utf-8")
    return caption.load(str(folder))


def _train(checkpoint: caption.Checkpoint, config: CaptionConfig, say: Say) -> None:
    """Train the network in place, on batches in a seeded order."""
    crops, captions = drawn(config, "train", config.pictures)
    rows = [[_START, *checkpoint.tokenizer(each).input_ids[1:]] for each in captions]
    ids = torch.full((len(rows), max(map(len, rows))), _PAD)
    for row, each in zip(ids, rows, strict=True):
        row[: len(each)] = torch.tensor(each)
    model = checkpoint.model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.rate, total_steps=config.steps, pct_start=0.1)
    begun = time.monotonic()
    for step in range(config.steps):
        chosen = torch.randint(len(rows), (config.batch,))
        given = ids[chosen]
        given = given[:, : int((given != _PAD).sum(1).max())]
        labels = given.masked_fill(given == _PAD, -100)
        loss = model(checkpoint.planes(crops[chosen.numpy()]), given, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % _EVERY == 0:
            say(f"step {step + 1} of {config.steps}: loss {loss.item():.3f}, {time.monotonic() - begun:.0f} s")
    model.eval()
