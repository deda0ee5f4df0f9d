"""PyTorch's compiler: it names what it needs, and loads code only from a folder of the user's own."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch._dynamo.utils as dynamo

from beeline import engines
from beeline.engines.torch import TorchEngine
from beeline.engines.torch_compile import TorchCompileEngine, cache_folder, check_compiler
from beeline.errors import ConfigError
from beeline.spec import ModelSpec


@pytest.mark.server
def test_two_graphs_are_made_at_load_and_none_by_a_batch(colour_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(ModelSpec.load(colour_model), engine="torch_compile")
    before = dynamo.counters["stats"]["unique_graphs"]
    compiled = engines.load(colour_model, spec, device="cpu")
    assert isinstance(compiled, TorchCompileEngine)
    assert dynamo.counters["stats"]["unique_graphs"] == before + 2
    plain = TorchEngine(colour_model, ModelSpec.load(colour_model), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (33, 32, 32, 3), dtype=np.uint8)
    for count in (5, 1, 2, 33, 8):
        assert np.allclose(compiled.forward(pixels[:count]), plain.forward(pixels[:count]), atol=1e-4)
    assert dynamo.counters["stats"]["unique_graphs"] == before + 2


@pytest.mark.parametrize(
    ("lack", "sentence"),
    [
        ("compiler", r"no g\+\+ on the PATH: install g\+\+ .*or build .* --engine torch"),
        ("headers", r"no .*Python\.h: install python3-dev"),
        ("setuptools", "the package setuptools"),
    ],
)
def test_where_it_cannot_compile_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: str, sentence: str
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    if lack == "headers":
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    if lack == "setuptools":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=sentence):
        check_compiler({"PATH": "/nowhere" if lack == "compiler" else str(tmp_path)})


def test_the_cache_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    outer = tmp_path / f"beeline-compile-{os.geteuid()}"
    assert cache_folder({}, "x") == cache_folder({}, "x") == outer / "x"
    assert [path.stat().st_mode & 0o777 for path in (outer, outer / "x")] == [0o700] * 2
    named = tmp_path / "a" / "b"
    assert cache_folder({"BEELINE_COMPILE_CACHE": str(named)}, "x") == named / "x"


def test_a_cache_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, link, file, mine = (tmp_path / name for name in ("shared", "link", "file", "mine"))
    shared.mkdir()
    shared.chmod(0o777)
    link.symlink_to(tmp_path)
    file.write_text("")
    mine.mkdir(mode=0o700)
    for path, why in (
        (shared, r"may be written to by others \(its mode is 777\)"),
        (link, "is a link or a file"),
        (file, "cannot be made"),
        (file / "below", "cannot be made"),
        (mine, r"belongs to the user \d+, and this worker is 12345"),
    ):
        if path == mine:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(ConfigError, match=why):
            cache_folder({"BEELINE_COMPILE_CACHE": str(path)}, "x")
