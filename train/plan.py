"""What a training run will do, its starting weights and its fingerprint; a plan is made without importing torch."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import PIL

from archive import hugging_face
from beeline import pixels
from beeline.errors import ConfigError
from host import Say
from host.files import sha256, write_json, write_whole
from train import runs
from train.config import TrainConfig, compose, load
from train.data import CACHE, DataSet, find_data, split
from train.distil import find_teacher
from train.download import fetch
from train.errors import RunError, Unavailable, WeightsError

# The version of data, fit, learner, loader and model: raise it when the same plan gives another model. A finished run
# of another version is not reused.
RECIPE = 2
VARIABLE = "BEELINE_WEIGHTS"
TIMM = "timm:"
# The recipes that take no weights to start from, the whole one and the quick one.
_FROM_NOTHING = ("scratch", "small")


@dataclass(frozen=True)
class Weights:
    """The starting weights of a network.

    `kind` is `file`, `torchvision`, `timm` or `random`; `name` goes into the spec.
    """

    kind: str
    name: str
    path: Path | None = None
    sha256: str | None = None


_RANDOM = Weights("random", "none (random initialisation)")


@dataclass(frozen=True)
class Plan:
    """A planned run: resolved configuration, pictures, starting weights, and why `config.fit.recipe` was chosen.

    `whole` is the configuration without `quick`, if that differs. `teacher` is that of `config.fit.distil`.
    """

    config: TrainConfig
    data: DataSet
    weights: Weights
    reason: str
    whole: TrainConfig | None = None
    teacher: runs.Run | None = None

    @property
    def fingerprint(self) -> str:
        """The sha256 over configuration, pictures, weights and the versions of the code that shapes a run.

        It leaves out paths, and what changes only the export or the speed.
        """
        values = asdict(self.config)
        del values["export"], values["log"], values["model"]["weights"]
        for key in ("folder", "loaders", "cache", "damaged"):
            del values["data"][key]
        # Without a teacher a run has the fingerprint of runs from before there were any.
        del values["fit"]["distil"]
        timm = ["timm"] if self.config.model.name.startswith(TIMM) and find_spec("timm") else []
        parts = {
            "config": values,
            "labels": self.data.labels,
            "data": self.data.digest,
            "weights": self.weights.sha256,
            "recipe": RECIPE,
            "geometry": pixels.GEOMETRY,
            # PIL may come from another package, Pillow-SIMD.
            "packages": {name: version(name) for name in ("torch", "torchvision", "lightning", *timm)}
            | {"pillow": PIL.__version__},
        }
        if self.teacher:
            parts["teacher"] = self.teacher.fingerprint
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def plan(
    overrides: Sequence[str],
    say: Say,
    cache: Path = CACHE,
    environ: Mapping[str, str] = os.environ,
    generated: bool = False,
    quick: bool = False,
) -> Plan:
    """Resolve the configuration, find pictures and weights, and choose the recipe by the weights.

    With `generated` the pictures are drawn, and no others are looked for. With `quick` the recipe takes half a minute
    instead of minutes. Raise `ConfigError` for a mistake in an override or a file, or two sources of pictures;
    `DataError`, `DownloadError` or `WeightsError` as these are found.
    """
    config = compose(overrides, environ=environ)
    if generated and any(word.startswith("data.folder=") for word in overrides):
        raise ConfigError("generated pictures and a folder of pictures are both asked for; leave one out")
    if (recipe := config.fit.recipe) in _FROM_NOTHING:
        weights, reason = _RANDOM, f"fit={recipe} was asked for"
    else:
        weights = find_weights(config.model.name, _path(config.model.weights), say, environ)
        reason = f"there are weights to start from ({weights.name})"
        if weights.path is None:
            config = compose(overrides, _FROM_NOTHING[0], environ)
            reason = "there are no weights to start from"
    whole = None
    if quick:
        quicker = compose(overrides, "head" if weights.path else "small", environ)
        if quicker != config:
            config, whole, reason = quicker, config, f"{reason}, and the quick recipe was asked for"
    wanted = config.data
    data = find_data(wanted.folder, say, wanted.held_out, cache, environ, generated, wanted.damaged)
    say(f"recipe: {config.fit.recipe}, because {reason}")
    return Plan(config, data, weights, reason, whole, find_teacher(config.fit, data, say))


def keep(planned: Plan, run: Path) -> None:
    """Write into the folder of a new run what `resumed` reads, and the lists of its pictures."""
    planned.config.save(run / "config.yaml")
    lists = io.StringIO()
    writer = csv.writer(lists)
    writer.writerow(["split", "label", "path", "sha256"])
    halves, schedule = {"train": planned.data.train, "val": planned.data.val}, planned.config.schedule
    if schedule.patience is not None:
        halves["train"], halves["watched"] = split(planned.data.train, schedule.watched)
    for name, half in halves.items():
        writer.writerows((name, half.labels[one.truth], one.path.absolute(), one.sha256) for one in half.pictures)
    write_whole(run / runs.PICTURES, lists.getvalue())
    weights = asdict(planned.weights) | {"path": planned.weights.path and str(planned.weights.path.absolute())}
    values = {"fingerprint": planned.fingerprint, "generated": planned.data.generated, "weights": weights}
    write_json(run / runs.PLANNED, values | {"reason": planned.reason}, sync=True)


def resumed(run: Path, say: Say, cache: Path = CACHE, environ: Mapping[str, str] = os.environ) -> Plan:
    """Return the plan of a run that was interrupted.

    Raise `RunError` for a folder that is no such run, or if pictures, weights, packages or code have changed since.
    """
    values, config = runs.unfinished(run), load(run / "config.yaml")
    had, generated = config.data, values["generated"]
    data = find_data(had.folder, say, had.held_out, cache, environ, generated, had.damaged)
    path = _path(values["weights"]["path"])
    stored = values["weights"] | {"path": path}
    # The weights are needed only until there is a checkpoint.
    if path is not None and path.is_file():
        stored["sha256"] = sha256(path)
    planned = Plan(config, data, Weights(**stored), values["reason"], None, find_teacher(config.fit, data, say))
    if planned.fingerprint != values["fingerprint"]:
        what = "its pictures, weights, packages or Beeline's code have changed since"
        raise RunError(f"the run {run} cannot be resumed: {what}; bring them back, or train again")
    return planned


def find_weights(architecture: str, file: Path | None, say: Say, environ: Mapping[str, str] = os.environ) -> Weights:
    """Return the first weights of `file`, `BEELINE_WEIGHTS` and torchvision's for `architecture`; else none.

    Raise `WeightsError` for a named file that is not there, `DownloadError` for a download that started and failed.
    """
    named = file or _path(environ.get(VARIABLE))
    if named is not None:
        if why := hugging_face.refusal(named):
            raise WeightsError(f"{why}; to train, name weights of torchvision or timm")
        if not named.is_file():
            what = "is a folder; name the file in it," if named.is_dir() else "is missing; name"
            raise WeightsError(f"the weights file {named} {what} a state dict of {architecture}")
        say(f"weights: the file {named}")
        return Weights("file", named.name, named, sha256(named))
    try:
        published = _timm if architecture.startswith(TIMM) else _torchvision
        found = published(architecture, say)
    except Unavailable as error:
        say(f"no weights to download: {error}")
        what = f"WARNING: {architecture} starts from random weights, which needs more pictures and epochs"
        say(f"{what}; set {VARIABLE} to a state dict of it")
        return _RANDOM
    say(f"weights: {found.name}")
    return found


def _timm(architecture: str, say: Say) -> Weights:
    """Download the weights that timm names for a network; a tag in the name chooses among several."""
    import torch

    try:
        import timm
        from huggingface_hub import hf_hub_url
    except ImportError:
        raise Unavailable(f"{architecture} needs timm, which is not installed; run `make setup`") from None
    config = timm.get_pretrained_cfg(architecture.removeprefix(TIMM))
    if config is None or not config.hf_hub_id:
        raise Unavailable(f"timm has no weights for {architecture}")
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{config.hf_hub_id.replace('/', '-')}.safetensors"
    if not target.is_file():
        url = hf_hub_url(config.hf_hub_id, "model.safetensors")
        say(f"downloading {url}")
        fetch(url, target, say)
    return Weights("timm", f"timm {config.hf_hub_id}", target, sha256(target))


def _torchvision(architecture: str, say: Say) -> Weights:
    """Download torchvision's default weights into PyTorch's own cache.

    PyTorch's downloader has no time limit and starts again from zero after an interruption, so ours is used. By
    PyTorch's convention the file's name ends in the first digits of its sha256.
    """
    import torch
    from torchvision import models

    try:
        entry = models.get_model_weights(architecture).DEFAULT
    except (AttributeError, ValueError):
        raise Unavailable(f"torchvision has no weights for {architecture}") from None
    name = entry.url.rpartition("/")[2]
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not target.is_file():
        say(f"downloading {entry.url}")
        match = re.search(r"-([0-9a-f]{8,})\.", name)
        fetch(entry.url, target, say, match[1] if match else None)
    return Weights("torchvision", f"torchvision {entry}", target, sha256(target))


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser() if text else None
