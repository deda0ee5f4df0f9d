"""Real servers behind the gateway that `serve up` chooses: ready, without workers, killed, drained, counted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from beeline.errors import Undetermined
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.ports import Address, settle
from serve.scale import scale
from serve.servers.torchserve import TorchServe
from serve.status import lines, status
from serve.up import Request, up
from tests.conftest import BLUE, RED, post_together
from tests.serve.gateway.conftest import ROOT, WHOSE, certificate, environment, wait_for

pytestmark = pytest.mark.server
TITLES = {"torchserve": "TorchServe 0.12.0", "mms": "Multi Model Server 1.1.11"}
ROUTES = ROOT / "frontend" / "nginx" / "ROUTES.md"
ROW = re.compile(r"\| (\w+) \| `(\w+) (\S+)` \| .*")


@pytest.fixture(scope="module")
def metrics_port() -> int:
    """The port of TorchServe's own metrics."""
    (address,) = settle([(Address("127.0.0.1", 0), "")])
    return address.port


@pytest.fixture(scope="module", params=[*zip(TITLES, WHOSE, strict=True)])
def running(
    request: pytest.FixtureRequest, colour_archive: Path, tmp_path_factory: pytest.TempPathFactory, metrics_port: int
) -> Iterator[Running]:
    """A server behind a gateway, with every port that there is; its tests leave it ready with one worker."""
    server, whose = request.param
    # A store with samples of another model of that name and version; the samples of the archive's own store count.
    store = tmp_path_factory.mktemp("store")
    (store / "samples" / "colours" / "1.0").mkdir(parents=True)
    others = [{"file": "other.png", "label": "blue", "source": "another store"}]
    (store / "samples" / "colours" / "1.0" / "samples.json").write_text(json.dumps(others))
    (store / "samples" / "colours" / "1.0" / "other.png").write_bytes(RED)
    chain, key = certificate(store)
    config = store / "config.properties"
    config.write_text(
        "job_queue_size=8\nbeeline_requests_per_second=100000\nbeeline_tls_address=https://127.0.0.1:0\n"
        f"beeline_tls_certificate={chain}\nbeeline_tls_key={key}\n"
    )
    overrides = Overrides(workers=1, batch_size=4, max_batch_delay=20)
    asked = Request(server, (str(colour_archive),), store, config, overrides=overrides, ports=Ports(0, page=0))
    environ = {**environment(whose), "BEELINE_STATE": str(tmp_path_factory.mktemp("state"))}
    # TorchServe's third port is off otherwise.
    metrics = {"enable_metrics_api": "true", "metrics_address": f"http://127.0.0.1:{metrics_port}"}
    before = TorchServe.values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchServe, "values", lambda *given: {**before(*given), **metrics})
        server_up = up(asked, print, environ)
    with server_up:
        assert whose in server_up.state.gateway_program
        yield server_up


def predict(running: Running, picture: bytes = RED, **options: Any) -> requests.Response:
    return requests.post(f"{running.state.inference}/predictions/colours", data=picture, timeout=90, **options)


def label(answer: requests.Response) -> str:
    return str(next(iter(answer.json())))


def ping(running: Running) -> requests.Response:
    return requests.get(f"{running.state.inference}/ping", timeout=30)


def answers(match: re.Match[str], running: Running, metrics_port: int) -> str:
    """Return a row of the table of routes with what the server and the gateway answer now."""
    port, method, route = match.groups()
    state = running.state
    own = {"inference": state.backend, "management": state.management, "metrics": f"http://127.0.0.1:{metrics_port}"}
    urls = (own[port], state.inference, state.addresses["management"])
    body = RED if method in ("POST", "PUT") else None
    statuses = [requests.request(method, f"{url}{route}", data=body, timeout=60).status_code for url in urls]
    can_pass = route.startswith(("/predictions/", "/ping")) and method in ("POST", "PUT", "GET")
    can_pass = can_pass or f"{method} {route}" in ("OPTIONS /", "GET /api-description")
    assert statuses[1] < 500 if can_pass else statuses[1] in (404, 405), (match[0], statuses)
    return f"| {port} | `{method} {route}` | {' | '.join(map(str, statuses))} |"


def test_the_table_of_routes_is_true_and_only_predictions_ping_and_catalog_pass(
    running: Running, metrics_port: int
) -> None:
    text = ROUTES.read_text(encoding="utf-8")
    parts = re.split(r"(?m)^(?=## )", text)
    title = TITLES[running.state.server]
    (number,) = (number for number, part in enumerate(parts) if part.startswith(f"## {title}"))
    parts[number], rows = ROW.subn(partial(answers, running=running, metrics_port=metrics_port), parts[number])
    if os.environ.get("BEELINE_WRITE_ROUTES"):
        ROUTES.write_text("".join(parts), encoding="utf-8")
    assert rows == {"torchserve": 40, "mms": 19}[running.state.server]
    assert "".join(parts) == text, "write it again with BEELINE_WRITE_ROUTES=1"
    for path in ("/", "/index.html", "/catalog.json", "/catalog/colours/1.0.json"):
        assert requests.get(f"{running.state.inference}{path}", timeout=30).status_code == 200, path


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_management_is_reached_from_no_published_port(running: Running) -> None:
    """By path, by its name in Host, and by an absolute address; on page, API, TLS and metrics."""
    state = running.state
    before = requests.get(f"{state.management}/models/colours", timeout=30).json()
    for url in (state.addresses[port] for port in ("inference", "page", "metrics", "tls")):
        assert url is not None
        for path in ("/models/colours", "//models/colours", "/predictions/..;/models/colours", "/%6dodels/colours"):
            for host in (state.management, str(state.addresses["management"])):
                for headers in ({}, {"Host": host.removeprefix("http://")}, {"X-Original-URL": "/models"}):
                    target = f"{url}{path}?min_worker=0"
                    answer = requests.put(target, headers=headers, timeout=30, verify=False)
                    assert answer.status_code in (404, 405), (target, headers, answer.text)
        absolute = f"PUT {state.management}/models/colours?min_worker=0 HTTP/1.1\r\nHost: x\r\n"
        assert raw(url, f"{absolute}Connection: close\r\nContent-Length: 0\r\n\r\n") in (400, 404, 405), url
    assert requests.get(f"{state.management}/models/colours", timeout=30).json() == before


def raw(url: str, text: str) -> int:
    """Send a request as it is written and return the answer's status."""
    parts = urlsplit(url)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", parts.port or 0), timeout=30))
        if parts.scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = stack.enter_context(context.wrap_socket(connection))
        connection.sendall(text.encode())
        return int(connection.makefile("rb").readline().split()[1])


def test_page_and_api_have_one_origin_on_both_ports(running: Running) -> None:
    page = running.state.addresses["page"]
    assert page is not None
    for url in (running.state.inference, page):
        assert "<html" in requests.get(url, timeout=30).text
        answer = requests.post(f"{url}/predictions/colours", data=RED, timeout=30)
        assert label(answer) == "red"
        # A golden picture of the gateway's may be in the same batch.
        assert answer.headers["X-Batch-Size"] in ("1", "2")
        assert answer.headers["Server-Timing"].startswith("queue;dur=")
        assert requests.get(f"{url}/ping", timeout=30).json()["status"] == "Healthy"


def test_the_catalog_has_what_is_served_and_samples_are_answered(running: Running) -> None:
    url = running.state.inference
    catalog = requests.get(f"{url}/catalog.json", timeout=30).json()
    (model,) = catalog["models"]
    assert (model["name"], model["batch_size"], model["max_batch_delay_ms"]) == ("colours", 4, 20)
    assert catalog["limits"] == {"bytes": 20_000_000, "pixels": 50_000_000, "in_flight": 8, "deadline_s": 60}
    assert catalog["gateway"]["kind"] == running.state.gateway_kind == "nginx"
    assert "another store" not in str(model["samples"])
    assert requests.get(f"{url}/samples/colours/1.0/samples.json", timeout=30).status_code == 404
    for sample in model["samples"]:
        picture = requests.get(f"{url}{sample['url']}", timeout=30).content
        assert label(requests.post(f"{url}{model['predictions']}", data=picture, timeout=30)) == sample["label"]
    card = wait_for(lambda: requests.get(f"{url}{model['card']}", timeout=30).json(), lambda card: "serving" in card)
    assert card["serving"]["device"]["reason"]
    assert str(Path(running.state.temporary).parent) not in str(card)


def test_metrics_have_the_same_names_on_both_servers(running: Running) -> None:
    predict(running, BLUE)
    predict(running, b"no picture")
    read = partial(samples, f"{running.state.addresses['metrics']}/metrics")
    counted = wait_for(read, lambda found: found.get(("beeline_errors_total", "not_an_image"), 0) >= 1)
    assert counted["beeline_answers_total", "200"] >= 2
    assert counted["beeline_answers_total", "415"] >= 1
    assert counted["beeline_workers", ""] == 1
    for name in ("batch_size", "queue_seconds", "decode_seconds", "forward_seconds", "encode_seconds"):
        assert counted[f"beeline_{name}_count", ""] >= 1, name


def test_everything_listens_on_loopback_alone_and_status_shows_it(running: Running) -> None:
    seen = status(running.instance.folder.parent, running.instance.name)
    (server,) = seen["servers"]
    assert (server["state"], server["gateway"]) == ("ready", running.state.gateway_kind)
    assert server["models"][0]["ready"] >= 1
    assert server["answers"]["colours"]["200"] >= 1
    assert server["configuration"]["models"][0]["batch_size"]["reason"] == "--batch-size"
    assert {"supervisor", "server", "gateway", "nginx", "worker"} <= {each["kind"] for each in server["processes"]}
    assert {"supervisor", "server", "worker"} <= {each["kind"] for each in server["processes"] if each["megabytes"] > 1}
    assert f"  gateway: {running.state.gateway_program}; page http" in "\n".join(lines(seen))
    listening = [
        connection.laddr
        for process in server["processes"]
        for connection in psutil.Process(process["pid"]).net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    known = {int(url.rpartition(":")[2]) for url in running.state.addresses.values() if url is not None}
    assert known <= {address.port for address in listening}


def test_more_clients_than_it_holds_get_429_and_retry_after(running: Running) -> None:
    before = workers(running)
    answers = post_together(f"{running.state.inference}/predictions/colours", [RED] * 200)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}, statuses
    assert {label(answer) for answer in answers if answer.status_code == 200} == {"red"}
    assert {answer.headers.get("Retry-After") for answer in answers if answer.status_code == 429} == {"1"}
    assert workers(running) == before
    assert ping(running).status_code == 200


def test_a_worker_that_dies_is_counted_and_replaced(running: Running) -> None:
    metrics = f"{running.state.addresses['metrics']}/metrics"
    before = samples(metrics).get(("beeline_worker_restarts_total", ""), 0)
    psutil.Process(max(workers(running))).kill()
    wait_for(lambda: samples(metrics).get(("beeline_worker_restarts_total", ""), 0), lambda now: now > before)
    wait_for(lambda: predict(running).status_code, lambda status: status == 200)


def test_without_workers_it_is_not_ready_and_comes_back(running: Running) -> None:
    """MMS says READY of workers that are not; there the golden picture tells."""
    scale(running.instance, running.state, "colours", 0, 0, print)
    # Until the prober has seen it, for a second at most, the server's own 503 passes.
    refused = wait_for(lambda: predict(running), lambda answer: answer.json().get("type") == "NotReady")
    assert refused.status_code == 503
    assert "Retry-After" in refused.headers
    assert "0 of 0 workers of colours are ready" in ping(running).json()["reason"]
    scale(running.instance, running.state, "colours", 1, 1, print)
    wait_for(lambda: ping(running).status_code, lambda status: status == 200)
    assert predict(running).status_code == 200


def test_a_killed_gateway_comes_back(running: Running) -> None:
    state = running.instance.read()
    assert state is not None
    assert state.gateway_process is not None
    os.kill(state.gateway_process, signal.SIGKILL)

    def is_ready_again() -> bool:
        now = running.instance.read()
        if now is None or now.gateway_process == state.gateway_process:
            return False
        try:
            return ping(running).status_code == 200
        except requests.ConnectionError:
            return False

    wait_for(is_ready_again, seconds=20)
    assert predict(running).status_code == 200


def test_a_gateway_that_cannot_start_says_why(colour_archive: Path, tmp_path: Path) -> None:
    """A fake nginx that has a version and then fails, as a broken installation does."""
    fake = tmp_path / "nginx"
    fake.write_text(
        "#!/bin/sh\n[ \"$1\" = -v ] && { echo 'nginx version: nginx/1.22.1' >&2; exit 0; }\n"
        "echo no such module >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "BEELINE_STATE": str(tmp_path / "state")}
    asked = Request("torchserve", (str(colour_archive),), colour_archive.parent, ports=Ports(0))
    with pytest.raises(Undetermined, match="nginx refuses its configuration: no such module"):
        up(asked, print, environ)
    assert not [path for path in (tmp_path / "state").rglob("*") if path.name == "instance.json"]


def test_it_starts_with_a_strict_umask_and_answers_what_is_under_way_when_it_stops(
    colour_archive: Path, tmp_path: Path
) -> None:
    """Started by root, nginx's workers are nobody, and must read their files; a batch waits to be filled meanwhile."""
    overrides = Overrides(workers=1, batch_size=64, max_batch_delay=3000)
    asked = Request("torchserve", (str(colour_archive),), colour_archive.parent, overrides=overrides, ports=Ports(0))
    before = os.umask(0o077)
    try:
        with up(asked, print, {**os.environ, "BEELINE_STATE": str(tmp_path)}) as running:
            assert requests.get(running.state.inference, timeout=30).status_code == 200
            assert requests.get(f"{running.state.inference}/nothing", timeout=30).json()["code"] == 404
            assert Path(running.state.temporary).stat().st_mode & 0o066 == 0
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                under_way = [pool.submit(predict, running) for _ in range(8)]
                wait_for(lambda: connections(running), lambda count: count >= 8)
                running.stop()
                assert [each.result().status_code for each in under_way] == [200] * 8
    finally:
        os.umask(before)


def connections(running: Running) -> int:
    """Return how many requests nginx has at the server: it opens a connection for each at once."""
    port = int(running.state.backend.rpartition(":")[2])
    found = [psutil.Process(pid) for pid in processes(running, "nginx")]
    opened = [each for process in found for each in process.net_connections(kind="tcp")]
    return sum(each.status == psutil.CONN_ESTABLISHED and each.raddr.port == port for each in opened)


def samples(url: str) -> dict[tuple[str, str], float]:
    """Return a scrape by name and status or reason, without the buckets of histograms."""
    families = text_string_to_metric_families(requests.get(url, timeout=30).text)
    return {
        (sample.name, sample.labels.get("status", sample.labels.get("reason", ""))): sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }


def workers(running: Running) -> set[int]:
    """Return the process ids of its workers."""
    return processes(running, "worker")


def processes(running: Running, kind: str) -> set[int]:
    found = status(running.instance.folder.parent, running.instance.name)["servers"][0]["processes"]
    return {each["pid"] for each in found if each["kind"] == kind}
