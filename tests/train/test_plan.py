"""Plans: what is found, which recipe follows, and a fingerprint that changes exactly when it should."""

from __future__ import annotations

import ast
import copy
import dataclasses
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import train.plan
from tests import digests
from tests.conftest import ROOT
from train.generate import generate
from train.plan import plan
from train.progress import silent

# What fit.py imports of this room and what cannot change a fit that starts from the same values.
NOT_SHAPING = {"config", "errors", "plan", "progress", "runs", "weights", "download", "hymenoptera", "generate"}
WORDS = ["model.name=squeezenet1_1", "model.resize=72", "model.crop=64"]


def fingerprint(environ: dict[str, str], *words: str) -> str:
    return plan([*WORDS, *words], silent, environ=environ).fingerprint


def test_the_fingerprint_is_stable_and_knows_no_paths(environ: dict[str, str], tmp_path: Path) -> None:
    moved = {
        "BEELINE_DATA": str(shutil.copytree(environ["BEELINE_DATA"], tmp_path / "pictures")),
        "BEELINE_WEIGHTS": str(shutil.copy(environ["BEELINE_WEIGHTS"], tmp_path / "other.pth")),
    }
    assert fingerprint(environ) == fingerprint(environ) == fingerprint(moved)


@pytest.mark.parametrize("word", ["export.version='2.0'", "export.name=bees", "data.loaders=3"])
def test_what_changes_only_export_or_speed_does_not_train_anew(environ: dict[str, str], word: str) -> None:
    assert fingerprint(environ) == fingerprint(environ, word)


@pytest.mark.parametrize("word", ["seed=1", "fit.epochs=1", "augment.flip=0.4", "model.crop=65", "fit=scratch"])
def test_what_shapes_the_run_changes_the_fingerprint(environ: dict[str, str], word: str) -> None:
    assert fingerprint(environ) != fingerprint(environ, word)


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
    assert len({before, recipe, fingerprint(environ)}) == 3


def test_the_code_that_shapes_a_fit_is_the_recorded_one() -> None:
    digests.check("RECIPE")


def test_a_comment_in_the_code_that_shapes_a_fit_trains_nothing_anew(environ: dict[str, str], tmp_path: Path) -> None:
    for room in ("train", "handlers", "config"):
        shutil.copytree(ROOT / room, tmp_path / room)
    for file in (file for name in ("RECIPE", "GEOMETRY") for file in digests.VERSIONS[name][1]):
        with (tmp_path / file).open("a") as source:
            source.write("# A comment that was corrected.\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(tmp_path / 'handlers')!r}]\n"
        "import train.plan\n"
        f"assert train.plan.__file__.startswith({str(tmp_path)!r})\n"
        f"print(train.plan.plan({WORDS!r}, lambda text: None, environ={environ!r}).fingerprint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(environ)


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
    from train.weights import Weights

    monkeypatch.setattr("train.weights.find_weights", lambda *_: Weights("random", "none"))
    said: list[str] = []
    made = plan([*WORDS, "fit.epochs=1"], said.append, environ=environ)
    assert (made.config.fit.recipe, made.config.fit.batch_norm, made.config.fit.epochs) == ("scratch", "learnt", 1)
    assert said[-1] == "recipe: scratch, because there are no weights to start from"


def test_scratch_asked_for_looks_for_no_weights(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.weights.find_weights", lambda *_: pytest.fail("weights were looked for"))
    assert not plan([*WORDS, "fit=scratch"], silent, environ=environ).weights.pretrained


def test_generated_pictures_may_be_asked_for(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.generate", lambda cache: generate(cache, train=2, val=1))
    made = plan(WORDS, silent, tmp_path, environ, generated=True)
    assert (made.data.generated, made.data.labels) == (True, ("circles", "stripes"))


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
    for name in ("model", "augment", "fit"):
        section = getattr(made.config, name)
        for field in dataclasses.fields(section):
            if (name, field.name) == ("model", "weights"):
                continue
            changed = copy.copy(section)
            object.__setattr__(changed, field.name, "changed")
            other = dataclasses.replace(made, config=dataclasses.replace(made.config, **{name: changed}))
            assert other.fingerprint != made.fingerprint, f"{name}.{field.name}"


def test_pillow_simd_in_pillows_place_is_another_pillow(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package has another name; a fake of what is installed."""

    def version(name: str) -> str:
        if name == "pillow":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    before = fingerprint(environ)
    monkeypatch.setattr("train.plan.version", version)
    assert fingerprint(environ) == before
    monkeypatch.setattr("PIL.__version__", "0.0.post1")
    assert fingerprint(environ) != before
