"""A user's model-config.yaml: what it may say, and why not the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from archive.model_config import check
from beeline.errors import ConfigError


def test_what_does_not_touch_batching_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "model-config.yaml"
    path.write_text("deviceType: cpu\ndeviceIds: [0, 1]\nmaxRetryTimeoutInSec: 60\n")
    check(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("batchSize: 8", "sets batchSize to 8, which would override config/config.properties"),
        ("maxBatchDelay: 100", "maxBatchDelay"),
        ("minWorkers: 1", "set it there, under models"),
        ("maxWorkers: 1", "maxWorkers"),
        ("jobQueueSize: 1", "jobQueueSize"),
        ("batchsize: 8", "unknown key 'batchsize'; did you mean 'batchSize'"),
        ("devicetype: cpu", "did you mean 'deviceType'"),
        ("deviceType: 3", "deviceType to 3; allowed: text"),
        ("maxRetryTimeoutInSec: true", "allowed: a whole number"),
        ("clientTimeoutInMills: 100", "wait forever"),
        ("- deviceType", "holds a list"),
        ("deviceType: [", "cannot be read as YAML"),
        ("", "holds a NoneType"),
    ],
)
def test_what_would_be_ignored_or_override_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "model-config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        check(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        check(tmp_path / "none.yaml")
