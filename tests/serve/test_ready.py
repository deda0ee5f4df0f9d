"""Ready: deaths of workers are counted, also of one that ends while it is looked at."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from serve.ready import Watch


def test_a_worker_that_ends_at_this_moment_is_one_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: set[int] = set()

    def status(pid: int) -> str:
        if pid in gone:
            raise psutil.NoSuchProcess(pid)
        return psutil.STATUS_SLEEPING

    children = [SimpleNamespace(pid=pid, status=lambda pid=pid: status(pid)) for pid in (7, 8)]
    monkeypatch.setattr("serve.ready.psutil.Process", lambda pid: SimpleNamespace(children=lambda recursive: children))
    watch = Watch(6, tmp_path)
    assert (watch.workers(), watch.deaths) == ({7, 8}, 0)
    gone.add(7)
    assert (watch.workers(), watch.deaths) == ({8}, 1)
