"""Servers behind one gateway: what they must have in common, and what the gateway takes from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from archive.store import find_archives
from beeline.errors import BeelineError
from serve import config, properties
from serve.gateway import backends
from serve.instance import State
from tests.serve.conftest import MakeArchive


@pytest.fixture
def own(tmp_path: Path) -> properties.Properties:
    """The gateway's own file, with other numbers than the servers'."""
    path = tmp_path / "own.properties"
    path.write_text("job_queue_size=7\nbeeline_drain_seconds=3\n")
    return properties.load(path, {})


def server(folder: Path, name: str, numbers: str, overrides: config.Overrides | None = None) -> State:
    """Return the state of a server of the archives in its folder."""
    temporary = folder / name
    archives = find_archives(temporary / "store")
    file = temporary / "config.properties"
    file.write_text(numbers)
    resolved = config.resolve(
        properties.load(file, {}),
        archives,
        overrides or config.Overrides(workers=1),
        {},
        cores=2,
        gpus=0,
        memory=10**10,
    )
    return State(
        name=name,
        server="torchserve",
        mark="x:y",
        inference="",
        management="",
        temporary=str(temporary),
        short=str(temporary),
        command=[],
        environment={},
        archives={one.path.name: str(folder / "built" / one.path.name) for one in archives},
        configuration=resolved.to_dict(),
        started=0.0,
    )


def test_limits_and_batches_are_those_of_the_servers(
    tmp_path: Path, make_fake: MakeArchive, own: properties.Properties
) -> None:
    for name in ("one", "two"):
        make_fake(tmp_path / name / "store")
    overrides = config.Overrides(workers=1, batch_size=32, max_batch_delay=9)
    states = [
        server(tmp_path, "one", "job_queue_size=50\nbeeline_max_image_bytes=3000\n", overrides),
        server(tmp_path, "two", "job_queue_size=40\nbeeline_max_image_bytes=4000\nbeeline_deadline_seconds=9\n"),
    ]
    mine = config.resolve(own, (), config.Overrides(), {}, 2, 0, 10**10)
    found = backends.common(mine, states, find_archives(tmp_path / "one" / "store"))
    numbers = {name: setting.value for name, setting in found.numbers.items()}
    assert numbers["job_queue_size"] == 40
    assert numbers["beeline_requests_per_second"] == 400
    assert (numbers["beeline_max_image_bytes"], numbers["beeline_deadline_seconds"]) == (3000, 9)
    assert numbers["beeline_drain_seconds"] == 3
    (model,) = found.models
    assert (model.batch_size.value, model.max_batch_delay.value) == (32, 9)


def test_servers_must_serve_the_same_archives(tmp_path: Path, make_fake: MakeArchive) -> None:
    for name in ("one", "two"):
        make_fake(tmp_path / name / "store")
    states = [server(tmp_path, name, "") for name in ("one", "two")]
    backends.check_same(states)
    make_fake(tmp_path / "two" / "store", label="blue")
    with pytest.raises(BeelineError, match=r"two serves fake\.mar with sha256 \w{12}, one with \w{12}"):
        backends.check_same(states)
    states[1].archives["other.mar"] = ""
    with pytest.raises(
        BeelineError, match=r"two \(torchserve\) serves fake.mar, other.mar, one .* serve the same: name"
    ):
        backends.check_same(states)
