"""Decodings beside each other, one of which this machine cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.studies import decoders


def test_a_run_prints_and_keeps_a_row_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((1200, 900))
    picture.save(tmp_path / "large.jpg")
    # Left out: nvJPEG reads none.
    picture.save(tmp_path / "large.png")
    decoders.main(tmp_path, tmp_path / "out.json", 1, 10)
    kept = json.loads((tmp_path / "out.json").read_text())
    full, scaled = kept["rows"][:2]
    assert [row["decoder"] for row in kept["rows"]] == ["full", "scaled", "cuda"][: 2 + torch.cuda.is_available()]
    assert full["version"].startswith("Pillow ")
    assert full["milliseconds"] > 0
    assert full["difference"] == 0 < scaled["difference"] < 3
    assert "scaled" in capsys.readouterr().out
