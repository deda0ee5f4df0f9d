"""Ready: deaths of workers are counted, and a golden picture's answer is judged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from beeline.errors import BeelineError
from serve.ready import Busy, Watch, try_golden


def test_a_worker_that_ends_at_this_moment_is_one_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: set[int] = set()

    def status(pid: int) -> str:
        if pid in gone:
            raise psutil.NoSuchProcess(pid)
        return psutil.STATUS_SLEEPING

    def child(pid: int, model: str, parent: int = 6) -> SimpleNamespace:
        manifest = tmp_path / model / "MAR-INF" / "MANIFEST.json"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"model": {"modelName": model, "modelVersion": "1.0"}}))
        cwd = str(tmp_path / model)
        return SimpleNamespace(pid=pid, status=lambda: status(pid), cwd=lambda: cwd, ppid=lambda: parent)

    # Another model's worker, a worker's fork, and a process that has no archive yet, are none of this model's workers.
    children = [child(7, "fake"), child(8, "fake", parent=5), child(9, "other"), child(11, "fake", parent=8)]
    children.append(SimpleNamespace(pid=10, status=lambda: status(10), cwd=lambda: str(tmp_path)))
    monkeypatch.setattr("serve.ready.psutil.Process", lambda pid: SimpleNamespace(children=lambda recursive: children))
    watch = Watch(6, tmp_path, "fake", "1.0")
    assert (watch.workers(), watch.deaths, watch.forks()) == ({7, 8}, 0, 2)
    gone.add(7)
    assert (watch.workers(), watch.deaths) == ({8}, 1)


@pytest.mark.parametrize("answer", [[7], [True], 7, "bees", None, {"bees": "many"}, {}])
def test_an_answer_without_labels_is_one_sentence(answer: object) -> None:
    golden = SimpleNamespace(file="0.jpg", label="bees")
    archive = SimpleNamespace(model="resnet18", golden=golden, golden_bytes=lambda: b"")
    inference = SimpleNamespace(predict=lambda *_: SimpleNamespace(status=200, body=str(answer), json=lambda: answer))
    with pytest.raises(BeelineError, match="which names no label; build the archive with Beeline's own handler"):
        try_golden(inference, archive, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [(503, {}, Busy), (507, {}, Busy), (500, {}, Busy), (500, {"X-Batch-Size": "1"}, BeelineError)],
)
def test_a_golden_picture_that_dies_with_its_worker_says_nothing_about_the_model(
    status: int, headers: dict[str, str], kind: type[BeelineError]
) -> None:
    archive = SimpleNamespace(model="fake", golden=SimpleNamespace(file="0.jpg"), golden_bytes=lambda: b"")
    inference = SimpleNamespace(predict=lambda *_: SimpleNamespace(status=status, body="", headers=headers))
    with pytest.raises(BeelineError) as caught:
        try_golden(inference, archive, None)  # type: ignore[arg-type]
    assert type(caught.value) is kind


def test_workers_killed_for_memory_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter([2, 5])
    monkeypatch.setattr("serve.ready.machine.oom_kills", lambda: next(kills))
    assert "killed 3 processes of this cgroup for memory" in Watch(6, tmp_path, "fake", "1.0").why()
