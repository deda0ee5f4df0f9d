"""Plans: the weights, the recipe that follows from them, and a fingerprint that changes exactly when it should."""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision import models

import train.plan
from host import silent
from tests import digests
from tests.train.conftest import FileServer
from train.errors import DownloadError, WeightsError
from train.plan import Weights, find_weights, plan

# What fit.py imports of this room and what cannot change a fit that starts from the same values.
NOT_SHAPING = {"cache", "config", "errors", "logs", "parallel", "plan", "progress", "runs", "table", "download"}
NOT_SHAPING |= {"generate"}
WORDS = ["model.name=squeezenet1_1", "model.resize=72", "model.crop=64"]


def fingerprint(environ: dict[str, str], *words: str) -> str:
    return plan([*WORDS, *words], silent, environ=environ).fingerprint


def test_the_fingerprint_is_stable_and_knows_no_paths(environ: dict[str, str], tmp_path: Path) -> None:
    moved = {
        "BEELINE_DATA": str(shutil.copytree(environ["BEELINE_DATA"], tmp_path / "pictures")),
        "BEELINE_WEIGHTS": str(shutil.copy(environ["BEELINE_WEIGHTS"], tmp_path / "other.pth")),
    }
    assert fingerprint(environ) == fingerprint(environ) == fingerprint(moved)


@pytest.mark.parametrize(
    "word", ["export.version='2.0'", "export.name=bees", "data.loaders=3", "data.cache=0", "log.tensorboard=true"]
)
def test_a_key_of_export_or_speed_alone_does_not_change_the_fingerprint(environ: dict[str, str], word: str) -> None:
    assert fingerprint(environ) == fingerprint(environ, word)


def test_a_changed_picture_weight_or_code_changes_the_fingerprint(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(environ)
    pictures = Path(shutil.copytree(environ["BEELINE_DATA"], tmp_path / "pictures"))
    shutil.copy(pictures / "val/circles/000.png", pictures / "val/circles/001.png")
    assert fingerprint({**environ, "BEELINE_DATA": str(pictures)}) != before
    weights = tmp_path / "weights.pth"
    weights.write_bytes(Path(environ["BEELINE_WEIGHTS"]).read_bytes() + b"\0")
    assert fingerprint({**environ, "BEELINE_WEIGHTS": str(weights)}) != before
    monkeypatch.setattr("train.plan.RECIPE", train.plan.RECIPE + 1)
    recipe = fingerprint(environ)
    monkeypatch.setattr("beeline.pixels.GEOMETRY", 1000)
    geometry = fingerprint(environ)
    # Pillow-SIMD has Pillow's folder, and a package of another name.
    monkeypatch.setattr("PIL.__version__", "0.0.post1")
    assert len({before, recipe, geometry, fingerprint(environ)}) == 4


def test_the_code_that_shapes_a_fit_is_the_recorded_one() -> None:
    digests.check("RECIPE")


def test_every_module_that_shapes_a_fit_is_in_the_recipe() -> None:
    room = Path(train.plan.__file__).parent
    seen, left = set(), {"fit"}
    while left:
        name = left.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((room / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "train":
                found = {node.module.removeprefix("train.")} if "." in node.module else {a.name for a in node.names}
                left |= found - seen
    shaping = {Path(file).stem for file in digests.VERSIONS["RECIPE"][1]}
    assert seen == shaping | NOT_SHAPING


def test_without_weights_the_recipe_is_scratch_and_says_why(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.plan.find_weights", lambda *_: Weights("random", "none"))
    said: list[str] = []
    made = plan([*WORDS, "fit.epochs=1"], said.append, environ=environ)
    assert (made.config.fit.recipe, made.config.fit.batch_norm, made.config.fit.epochs) == ("scratch", "learnt", 1)
    assert said[-1] == "recipe: scratch, because there are no weights to start from"


def test_a_fit_from_scratch_looks_for_no_weights(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.plan.find_weights", lambda *_: pytest.fail("weights were looked for"))
    assert plan([*WORDS, "fit=scratch"], silent, environ=environ).weights.path is None


def test_a_quick_plan_takes_the_recipe_by_the_weights_and_knows_the_whole_one(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    quick, whole = plan(WORDS, said.append, environ=environ, quick=True), plan(WORDS, silent, environ=environ)
    assert (quick.config.fit.recipe, quick.config.fit.epochs, quick.whole) == ("head", 0, whole.config)
    assert said[-1] == f"recipe: head, because {whole.reason}, and the quick recipe was asked for"
    assert quick.fingerprint != whole.fingerprint
    monkeypatch.setattr("train.plan.find_weights", lambda *_: Weights("random", "none"))
    small = plan([], silent, environ=environ, quick=True)
    assert (small.config.fit.recipe, small.config.model.crop, small.whole is None) == ("small", 64, False)
    assert plan(["model.crop=56"], silent, environ=environ, quick=True).config.model.crop == 56, "an override wins"


def test_a_named_recipe_is_taken_by_a_quick_plan_too(environ: dict[str, str]) -> None:
    planned = plan([*WORDS, "fit=finetune"], silent, environ=environ, quick=True)
    assert (planned.config.fit.recipe, planned.whole) == ("finetune", None)


def test_a_plan_on_generated_pictures_asks_for_no_others(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.plan.find_data", lambda *given: given[-2])
    assert plan(WORDS, silent, environ=environ, generated=True).data is True


def test_a_plan_imports_no_torch(environ: dict[str, str]) -> None:
    """So that a second start, which only compares fingerprints, is quick."""
    code = (
        "import sys; from train.plan import plan; from train.runs import find_run; import train.export\n"
        f"print(find_run(plan({WORDS!r}, lambda text: None, environ={environ!r}).fingerprint))\n"
        "print([name for name in ('torch', 'lightning', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n[]\n"


def test_a_fingerprint_covers_the_whole_configuration(environ: dict[str, str]) -> None:
    """A key that is added to the configuration is in the fingerprint unless it is taken out by name."""
    made = plan(WORDS, silent, environ=environ)
    assert fingerprint(environ, "seed=1") != made.fingerprint
    for name in ("model", "augment", "optimiser", "schedule", "fit"):
        section = getattr(made.config, name)
        for field in dataclasses.fields(section):
            if (name, field.name) in (("model", "weights"), ("fit", "distil")):  # Their digests stand for the paths.
                continue
            changed = copy.copy(section)
            object.__setattr__(changed, field.name, "changed")
            other = dataclasses.replace(made, config=dataclasses.replace(made.config, **{name: changed}))
            assert other.fingerprint != made.fingerprint, f"{name}.{field.name}"


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: FileServer) -> Path:
    """PyTorch's cache is a new folder; torchvision's weights lie where its `entry` says, on the local server."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def lie_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(models, "get_model_weights", lambda name: SimpleNamespace(DEFAULT=SimpleNamespace(url=url)))


def test_a_named_file_comes_first_then_the_environments(random_weights: Path) -> None:
    said: list[str] = []
    found = find_weights("squeezenet1_1", random_weights, said.append, {"BEELINE_WEIGHTS": "/missing"})
    assert (found.kind, found.name, found.path) == ("file", "squeezenet.pth", random_weights)
    assert found.sha256 == hashlib.sha256(random_weights.read_bytes()).hexdigest()
    assert said == [f"weights: the file {random_weights}"]
    assert find_weights("squeezenet1_1", None, print, {"BEELINE_WEIGHTS": str(random_weights)}) == found
    with pytest.raises(WeightsError, match="the weights file /missing is missing; name a state dict of squeezenet1_1"):
        find_weights("squeezenet1_1", None, print, {"BEELINE_WEIGHTS": "/missing"})
    folder = random_weights.parent
    with pytest.raises(WeightsError, match="is a folder; name the file in it, a state dict of squeezenet1_1"):
        find_weights("squeezenet1_1", folder, print, {})


def test_weights_of_transformers_are_refused_before_the_training(tmp_path: Path) -> None:
    values = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(WeightsError, match=r"ViTForImageClassification .*; to train, name weights of torchvision"):
            find_weights("resnet18", path, print, {})


def test_torchvisions_weights_are_downloaded_once_and_have_the_digest_in_their_name(
    torchvision: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = b"a state dict"
    name = f"net-{hashlib.sha256(server.content).hexdigest()[:8]}.pth"
    lie_at(monkeypatch, server.url.replace("set.zip", name))
    for _ in range(2):
        found = find_weights("squeezenet1_1", None, print, {})
        assert (found.kind, found.path) == ("torchvision", torchvision / name)
    assert len(server.seen) == 1
    lie_at(monkeypatch, server.url.replace("set.zip", "net-01234567.pth"))
    with pytest.raises(DownloadError, match="expected 01234567"):
        find_weights("squeezenet1_1", None, print, {})


def test_timms_weights_are_downloaded_once_and_a_name_without_any_says_so(
    torchvision: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = b"safetensors"
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda *names: server.url.replace("set.zip", "/".join(names)))
    for _ in range(2):
        found = find_weights("timm:resnet10t", None, print, {})
        assert found.path is not None
        assert (found.kind, found.path.parent, found.path.read_bytes()) == ("timm", torchvision, server.content)
    assert found.name == "timm timm/resnet10t.c3_in1k"
    assert len(server.seen) == 1
    said: list[str] = []
    assert find_weights("timm:efficientnet_b6", None, said.append, {}).kind == "random"
    assert said[0] == "no weights to download: timm has no weights for timm:efficientnet_b6"


def test_without_a_network_random_weights_come_with_a_warning(
    torchvision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie_at(monkeypatch, "http://127.0.0.1:1/net-01234567.pth")
    said: list[str] = []
    found = find_weights("squeezenet1_1", None, said.append, {})
    assert (found.kind, found.path, found.sha256) == ("random", None, None)
    assert any(line.startswith("WARNING: squeezenet1_1 starts from random weights") for line in said)
