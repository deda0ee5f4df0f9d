"""What gives a server's models their workers again; tests/serve/test_faults.py shows it on real servers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest

from beeline.errors import BeelineError
from host.files import write_json
from serve import instance, scale
from serve.client import READY, Model, WorkerStatus
from serve.config import ModelSettings, Setting
from tests.serve.instance.test_supervisor import EMPTY

WORKERS = tuple(WorkerStatus(str(number), READY) for number in range(2))
SERVED, NONE = Model("fake", "1.0", 2, 3, 8, 2, WORKERS), Model("fake", "1.0", 0, 0, 8, 2, ())


@pytest.mark.parametrize(
    ("patient", "now", "forks", "call"),
    [
        # MMS knows no model after its start, and after workers that did not start.
        (True, None, 0, "register"),
        (True, NONE, 0, ""),
        (True, SERVED, 2, ""),
        (True, SERVED, 0, "revive"),
        # TorchServe knows all its models, without workers after its start.
        (False, NONE, 0, "register"),
        (False, SERVED, 0, ""),
    ],
)
def test_only_a_model_that_has_lost_all_workers_gets_new_ones_and_a_failure_is_told(
    patient: bool, now: Model | None, forks: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings("fake", "1.0", "fake.mar", True, *[Setting(1, "test")] * 6)
    given_up = dataclasses.replace(settings, model="broken")
    values = [dataclasses.asdict(each) for each in (given_up, settings)]
    state = dataclasses.replace(EMPTY, configuration={"models": values})
    one = instance.named(tmp_path, "one")
    one.clear()
    write_json(one.failed, {"broken/1.0": "the gate is shut"})
    management, kind = MagicMock(), Mock(patient=patient)
    management.__enter__.return_value.unready.return_value = None
    management.__enter__.return_value.describe.side_effect = [None, now, SERVED]
    monkeypatch.setattr(scale, "ManagementClient", lambda url: management)
    monkeypatch.setattr("serve.servers.named", lambda name: kind)
    monkeypatch.setattr(scale, "Watch", lambda *where: Mock(forks=lambda: forks))
    assert scale.restore(one, state)
    assert [name for name, _, _ in kind.method_calls if name != "path"] == ([call] if call else [])
    management.__enter__.return_value.describe.side_effect = [None, now, SERVED]
    kind.register.side_effect = kind.revive.side_effect = BeelineError("no worker stays up")
    assert scale.restore(one, state) is not bool(call)
