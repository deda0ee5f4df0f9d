"""Real TorchServe, Multi Model Server and LitServe: ready, scaled, healed, refused."""

from __future__ import annotations

import base64
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from requests.structures import CaseInsensitiveDict

from archive.mar import MANIFEST
from beeline.errors import BeelineError
from host import processes
from serve.addresses import Ports
from serve.client import InferenceClient, ManagementClient
from serve.config import Overrides
from serve.instance import MARK
from serve.instance.child import Running
from serve.scale import scale
from serve.status import status
from serve.up import Request, up
from tests.conftest import GREEN, RED, write_archive
from tests.serve.conftest import MakeArchive, wait_for

pytestmark = pytest.mark.server
SERVERS = ("torchserve", "mms", "litserve")


def request_for(server: str, archive: Path, name: str, **numbers: int) -> Request:
    return Request(
        server=server,
        wanted=(str(archive),),
        store=archive.parent,
        name=name,
        overrides=Overrides(**numbers),
        ports=Ports(0),
        gateway="none",
    )


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest, colour_archive: Path, state_home: Path) -> Iterator[Running]:
    """A running server with the project's handler; each test may leave another number of workers."""
    environ = {**os.environ, "BEELINE_STATE": str(state_home), "LINGER_MS": "20"}
    asked = request_for(request.param, colour_archive, f"shared-{request.param}", workers=1, batch_size=4)
    said: list[str] = []
    with up(asked, said.append, environ) as running:
        assert not [line for line in said if "metrics" in line]
        yield running
    scratch = Path(running.state.temporary)
    assert processes.marked(MARK, running.state.mark) == []
    assert not scratch.exists()
    assert running.instance.read() is None


def test_it_answers_with_the_same_numbers_on_every_server(served: Running) -> None:
    with InferenceClient(served.state.inference) as client:
        good, bad = client.predict("colours", RED), client.predict("colours", b"no picture")
    size = CaseInsensitiveDict(good.headers)["X-Batch-Size"]
    assert (good.status, next(iter(good.json())), size) == (200, "red", "1")
    assert bad.status == 415
    with ManagementClient(served.state.management) as management:
        model = management.describe("colours")
    assert model is not None
    assert (model.batch_size, model.max_batch_delay, model.min_workers) == (4, 20, 1)
    inherited = workers_of(served)[0].environ()
    assert inherited["OMP_NUM_THREADS"] == inherited["BEELINE_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert inherited["BEELINE_MAX_BYTES"] == "20000000"


def test_a_request_leaves_no_line_in_any_log(served: Running) -> None:
    sizes = {path.name: path.stat().st_size for path in served.instance.logs.iterdir()}
    with InferenceClient(served.state.inference) as client:
        for _ in range(20):
            assert client.predict("colours", GREEN).status == 200
    assert {path.name: path.stat().st_size for path in served.instance.logs.iterdir()} == sizes


def test_one_limit_holds_for_raw_bodies_and_leaves_room_for_base64(served: Running) -> None:
    limit = int(served.state.environment["BEELINE_MAX_BYTES"])
    url = f"{served.state.inference}/predictions/colours"
    over = requests.post(url, data=bytes(limit + 1), timeout=60)
    assert (over.status_code, over.json()["type"]) == (413, "TooManyBytes")
    # The largest body, in base64: the server lets it through, and the handler sees that it is no picture.
    encoded = base64.b64encode(bytes(limit)).decode()
    assert requests.post(url, json={"data": encoded}, timeout=60).json()["type"] == "NotAnImage"


def test_scaling_by_curl_or_by_the_command_waits_until_it_is_true(served: Running) -> None:
    url = f"{served.state.management}/models/colours?min_worker=2&synchronous=true"
    assert requests.put(url, timeout=120).status_code == 200
    done = scale(served.instance, served.state, "colours", 2, 4, print)
    assert (done.workers, done.healed) == (2, False)
    assert "'red', as expected" in done.golden
    for workers in (3, 1):
        assert scale(served.instance, served.state, "colours", workers, workers, print).workers == workers
        with ManagementClient(served.state.management) as management:
            model = management.describe("colours")
        assert model is not None
        assert (model.ready, len(model.workers)) == (workers, workers)
        # MMS has one process more, which forks the workers.
        wait_for(functools.partial(runs, served, workers + (served.state.server == "mms")))
    with pytest.raises(BeelineError, match=r"the server serves no model 'colour'; did you mean 'colours'\?"):
        scale(served.instance, served.state, "colour", 1, 1, print)
    with pytest.raises(BeelineError, match="--min is 2 and --max 1"):
        scale(served.instance, served.state, "colours", 2, 1, print)


def test_the_same_name_and_the_same_port_are_refused(
    served: Running, colour_archive: Path, environ: dict[str, str]
) -> None:
    again = request_for(served.state.server, colour_archive, served.instance.name)
    with pytest.raises(BeelineError, match="is running; stop it with `beeline serve down`, or give another --name"):
        up(again, print, environ)
    port = int(served.state.inference.rpartition(":")[2])
    other = Request(again.server, again.wanted, again.store, name="other", ports=Ports(port), gateway="none")
    with pytest.raises(BeelineError, match=rf"port {port} is taken by \w+ \(pid {served.state.server_process}\)"):
        up(other, print, environ)


@pytest.mark.parametrize("server", SERVERS)
def test_scaling_heals_a_model_without_living_workers(
    server: str, make_fake: MakeArchive, environ: dict[str, str], tmp_path: Path
) -> None:
    gate, said = tmp_path / "gate", list[str]()
    gate.touch()
    archive = make_fake(tmp_path, expected="red", gate=gate, retry=1)
    with up(request_for(server, archive, f"heal-{server}", workers=1), said.append, environ) as running:
        # Like one that an older Beeline built, this archive counts nothing.
        assert status(running.instance.folder.parent, running.instance.name)["servers"][0]["answers"] == {}
        (warning,) = (line for line in said if "warning" in line)
        assert warning.startswith("warning: fake is served without metrics: ")
        assert "for metrics build it again (`beeline archive build`)" in warning
        gate.unlink()
        # Kill the workers until TorchServe starts no more; MMS would go on for ever, ever more slowly.
        for worker in workers_of(running):
            worker.kill()
        log = running.instance.logs / "server.log"
        wait_for(lambda: server != "torchserve" or "Auto recovery failed again" in log.read_text())
        # The server's own answer, whatever it is, heals nothing: 206 or 210 "scaling in progress", or 200 while the
        # server takes the dead worker for READY, which Multi Model Server may do for ever.
        plain = requests.put(f"{running.state.management}/models/fake?min_worker=1&synchronous=true", timeout=60)
        assert plain.status_code in (200, 206, 210)
        with pytest.raises(BeelineError, match=r"no worker of fake stays up: .*the gate is shut"):
            scale(running.instance, running.state, "fake", 1, 1, print)
        gate.touch()
        done = scale(running.instance, running.state, "fake", 1, 2, print)
        assert (done.workers, "as expected" in done.golden) == (1, True)
        # And from none, for which MMS needs more than a request.
        for workers in (0, 2):
            assert scale(running.instance, running.state, "fake", workers, workers, print).workers == workers


@pytest.mark.parametrize("server", SERVERS)
def test_a_worker_that_refuses_its_archive_is_reported_at_once(
    server: str, make_fake: MakeArchive, environ: dict[str, str], tmp_path: Path
) -> None:
    archive = make_fake(tmp_path, gate=tmp_path / "nothing")
    with pytest.raises(BeelineError, match="the gate is shut"):
        up(request_for(server, archive, f"refused-{server}"), print, environ)
    assert processes.marked(MARK, environ["BEELINE_STATE"] + f"/refused-{server}:") == []


def test_a_handler_of_torchserve_that_lacks_a_package_is_told_with_the_package(
    environ: dict[str, str], tmp_path: Path
) -> None:
    archive = write_archive(tmp_path / "old.mar", "old", {"model.pt": b"no model"}, "image_classifier")
    with pytest.raises(BeelineError, match=r"captum'; its handler image_classifier imports captum, which "):
        up(request_for("torchserve", archive, "lacks"), print, environ)


def runs(running: Running, number: int) -> bool:
    return len(workers_of(running)) == number


def workers_of(running: Running) -> list[psutil.Process]:
    """Return the processes in the folder of an archive; the first of MMS's forks the others."""
    return [each for each in processes.marked(MARK, running.state.mark) if (Path(each.cwd()) / MANIFEST).is_file()]
