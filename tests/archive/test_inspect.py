"""The card: every fact of an archive, and nothing of it run."""

from __future__ import annotations

import json

from archive.build import Built
from archive.inspect import card
from tests.archive.conftest import LABELS


def test_the_card_says_what_the_archive_is(tiny_built: Built) -> None:
    shown = card(tiny_built.path)
    rows = dict(shown.rows())
    assert rows["model"] == "tiny 1.0, tiny"
    assert rows["labels"] == "3: ants, bees, crickets"
    assert rows["input"] == "shorter side to 36, middle 32 x 32, bilinear"
    assert rows["engine"] == "torch, fp32, exported program"
    assert rows["licence"] == "MIT"
    assert rows["accuracy"] == "not measured"
    assert rows["golden"].startswith("4 pictures within 0.02: ants 0.")
    assert rows["they notice"] == "labels, channels, normalisation, exif, geometry"
    assert rows["sha256"] == tiny_built.sha256


def test_the_json_holds_everything(tiny_built: Built) -> None:
    values = json.loads(json.dumps(card(tiny_built.path).to_dict()))
    assert values["spec"]["labels"] == list(LABELS)
    assert values["fingerprint"] == tiny_built.spec.fingerprint()
    assert values["handler"]["file"] == "vision_handler.py"
    assert len(values["golden"]["pictures"]) == 4
    assert set(values["parts"]) == {"model", "handler", "golden", "other"}
    assert 0 < sum(values["parts"].values()) < values["bytes"]
