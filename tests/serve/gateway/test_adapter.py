"""The adapter behind real nginx, in front of a stand-in that can misbehave: pictures by URL, KServe, its own end."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from serve.gateway.runtime import ADAPTER_SOCKET
from serve.gateway.settings import Settings
from tests.serve.conftest import MakeArchive
from tests.serve.gateway.conftest import Site, start, stop, wait_for
from tests.serve.gateway.fake_web import Web
from tests.serve.gateway.test_runtime import written

pytestmark = pytest.mark.server
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    started = Web()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def site(make_fake: MakeArchive, web: Web) -> Iterator[Site]:
    """One gateway with everything on; its tests leave it as it was."""
    hosts = (f"pictures.test:{web.port}", f"private.test:{web.port}")
    on: dict[str, Any] = {"url_hosts": hosts, "url_http": True, "url_seconds": 5, "kserve": True, "server_routes": True}
    started = start(make_fake, module=("tests.serve.gateway.fake_web",), **on)
    yield started
    stop(started)


def by_url(site: Site, url: str, **options: Any) -> requests.Response:
    return site.predict(json.dumps({"url": url}), headers=JSON, **options)


def post(site: Site, path: str, values: object, **headers: str) -> requests.Response:
    body = values if isinstance(values, bytes) else json.dumps(values)
    return requests.post(f"{site.url}{path}", data=body, headers={**JSON, **headers}, timeout=30)


def adapter(site: Site) -> psutil.Process:
    """Return its process."""
    found = [each for each in psutil.Process(site.process.pid).children() if "python" in each.name()]
    assert len(found) == 1
    return found[0]


def test_a_picture_by_url_gets_the_answer_of_its_bytes(site: Site, web: Web) -> None:
    answer = by_url(site, web.url("red.png"), model="fake/1.0")
    assert (answer.status_code, answer.json()) == (200, {"red": 0.9, "other": 0.1})
    assert answer.headers["Server-Timing"].startswith("decode")
    assert answer.headers["X-Batch-Size"] == "1"
    url, more = json.dumps({"url": web.url("words/echo")}), {"X-Deadline-Ms": "2500"}
    echo = site.predict(url, headers={**JSON, **more}, model="urls").json()
    assert (echo["path"], echo["headers"]["Content-Type"]) == ("/predictions/urls", "application/octet-stream")
    assert echo["headers"]["X-Deadline-Ms"] == "2500"
    (echo,) = post(site, "/v1/models/fake:predict", {"instances": [{"url": web.url("words/echo")}]}, **more).json()[
        "predictions"
    ]
    assert echo["headers"]["X-Deadline-Ms"] == "2500"


def test_errors_have_one_form_whoever_answers(site: Site, web: Web) -> None:
    for answer, status, kind in (
        (by_url(site, "https://other.test/"), 403, "UrlNotAllowed"),
        (by_url(site, web.url("red.png", "private.test")), 403, "UrlNotAllowed"),
        (by_url(site, web.url("status/302")), 424, "UrlNotFetched"),
        (by_url(site, web.url("endless")), 413, "TooManyBytes"),
        (by_url(site, web.url("words/status_415")), 415, "FromTheServer"),
        (by_url(site, web.url("words/status_503")), 503, "FromTheServer"),
        (by_url(site, web.url("red.png"), model="fake/1.0/2"), 404, "NotFound"),
        (site.predict(b"{" * 20_000, headers=JSON), 200, None),
    ):
        assert answer.status_code == status, answer.text
        assert answer.json().get("type") == kind
        assert ("Retry-After" in answer.headers) == (status == 503)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert not web.other.connections


def test_the_plain_path_does_not_pass_the_adapter(site: Site, web: Web) -> None:
    """Pictures, and JSON that is longer than a URL; a shorter one without a URL is passed on as it is."""
    long = b'{"data": "' + b"a" * 10_000 + b'"}'
    for body, headers in ((b"a picture", {}), (long, JSON), (b"short", {"Content-Type": "image/png"})):
        assert site.predict(body, model="plain", headers=headers).status_code == 200
    assert site.predict(b"echo", model="passed", headers=JSON).json()["path"] == "/predictions/passed"

    def lines() -> list[dict[str, Any]]:
        return [line for line in site.log() if "/plain" in line["request"] or "/passed" in line["request"]]

    # The adapter's own request is a line too, without a client.
    logged = wait_for(lines, lambda found: len(found) >= 5)
    seen = [(line["request"].split()[1], line["client"], line["backend"][:4]) for line in logged]
    assert seen[:3] == [("/predictions/plain", "127.0.0.1", "127.")] * 3
    assert {*seen[3:]} == {("/predictions/passed", "127.0.0.1", "unix"), ("/predictions/passed", "unix:", "127.")}


def test_no_neighbour_waits_for_a_slow_host(site: Site, web: Web) -> None:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        slow = [pool.submit(by_url, site, web.url(path)) for path in 3 * ("slow", "drip")]
        wait_for(lambda: web.seen.count("/slow") + web.seen.count("/drip"), lambda count: count >= 6)
        assert by_url(site, web.url("red.png")).status_code == 200
        assert site.predict().status_code == 200
        assert not any(each.done() for each in slow)
        assert {each.result().status_code for each in slow} == {424}
    assert site.ping()[0] == 200


def test_the_queue_is_the_servers(site: Site, web: Web) -> None:
    """The stand-in holds four; what comes by URL or in a request of KServe counts as well."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        held = [pool.submit(by_url, site, web.url("words/hold"), model="queue") for _ in range(4)]
        wait_for(lambda: site.backends[0].busy, lambda busy: busy >= 4)
        full = by_url(site, web.url("red.png"))
        assert (full.status_code, full.headers["Retry-After"]) == (429, "1")
        refused = post(site, "/v1/models/fake:predict", {"instances": ["a", "b"]})
        assert (refused.status_code, refused.json()["type"]) == (429, "TooManyRequests")
        site.release()
        assert [each.result().status_code for each in held] == [200] * 4
    site.backends[0].released.clear()


def test_readiness_of_kserve_is_that_of_ping(site: Site) -> None:
    for path, values in (
        ("/v1/models", {"models": ["fake"]}),
        ("/v1/models/fake", {"name": "fake", "ready": True}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/fake/ready", {"name": "fake", "ready": True}),
        ("/v2/models/fake/versions/1.0/ready", {"name": "fake", "ready": True}),
    ):
        answer = requests.get(f"{site.url}{path}", timeout=30)
        assert (answer.status_code, answer.json()) == (200, values)
    assert requests.get(f"{site.url}/v2/models/fake", timeout=30).json()["inputs"][0]["datatype"] == "BYTES"
    for path in ("/v1/models/none", "/v2/models/none", "/v2/models/fake/versions/2.0", "/v2/models/none/ready"):
        answer = requests.get(f"{site.url}{path}", timeout=30)
        assert (answer.status_code, answer.json()["error"]) == (404, answer.json()["message"])
    site.backends[0].ready = False
    site.wait_until(ready=False)
    for path, key in (("/v2/health/ready", "ready"), ("/v2/models/fake/ready", "ready"), ("/v1/models/fake", "ready")):
        answer = requests.get(f"{site.url}{path}", timeout=30)
        assert (answer.status_code, answer.json()[key]) == (503, False)
    assert requests.get(f"{site.url}/v2/health/live", timeout=30).status_code == 200
    assert by_url(site, "https://other.test/").status_code == 403
    site.backends[0].ready = True
    site.wait_until(ready=True)


def test_each_instance_is_judged_alone(site: Site, web: Web) -> None:
    instances = [{"b64": "aGVsbG8="}, {"url": web.url("words/status_415")}, {"url": "https://other.test/"}, "aGVsbG8="]
    answer = post(site, "/v1/models/fake:predict", {"instances": instances})
    assert answer.status_code == 200
    fine, *failed, last = answer.json()["predictions"]
    assert fine == last == {"red": 0.9, "other": 0.1}
    assert [(each["code"], each["type"]) for each in failed] == [(415, "FromTheServer"), (403, "UrlNotAllowed")]
    both = post(site, "/v1/models/fake:predict", {"instances": instances[1:3]})
    assert (both.status_code, both.json()["type"], both.json()["error"]) == (415, "FromTheServer", "its own words")


def test_tensors_of_bytes_come_and_go_in_json_and_in_binary(site: Site) -> None:
    tensor: dict[str, Any] = {"name": "picture", "shape": [2], "datatype": "BYTES", "data": ["aGVsbG8=", "aGVsbG8="]}
    path = "/v2/models/fake/versions/1.0/infer"
    values = post(site, path, {"id": "7", "inputs": [tensor]}).json()
    assert (values["id"], values["model_name"], values["model_version"]) == ("7", "fake", "1.0")
    answers, statuses = values["outputs"]
    assert [json.loads(each) for each in answers["data"]] == [{"red": 0.9, "other": 0.1}] * 2
    assert (statuses["datatype"], statuses["data"]) == ("INT32", [200, 200])
    raw = b"".join(struct.pack("<I", len(each)) + each for each in (b"a picture", b"status 422"))
    tensor = {"name": "picture", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    answer = post(site, path, head + raw, **{"Inference-Header-Content-Length": str(len(head))})
    size = int(answer.headers["Inference-Header-Content-Length"])
    answers, statuses = json.loads(answer.content[:size])["outputs"]
    assert struct.unpack("<2i", answer.content[-8:]) == (200, 422)
    sizes = [each["parameters"]["binary_data_size"] for each in (answers, statuses)]
    assert sum(sizes) == len(answer.content) - size
    asked = {"inputs": [{"datatype": "BYTES", "data": ["YQ=="]}], "outputs": [{"name": "status"}]}
    only = post(site, path, asked)
    assert [each["name"] for each in only.json()["outputs"]] == ["status"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models/fake:predict", b""),
        ("/v1/models/fake:predict", b"[" * 3000),
        ("/v1/models/fake:predict", {"instances": []}),
        ("/v1/models/fake:predict", {"instances": {"b64": "aa"}}),
        ("/v1/models/fake:predict", {"instances": ["YQ=="] * 129}),
        ("/v2/models/fake/infer", {"inputs": []}),
        ("/v2/models/fake/infer", {"inputs": [7]}),
        ("/v2/models/fake/infer", {"inputs": [{"datatype": "FP32", "data": [1.0]}]}),
        ("/v2/models/fake/infer", {"inputs": [{"datatype": "BYTES", "data": ["YQ=="]}], "outputs": [{"name": "x"}]}),
        ("/v2/models/fake/infer", {"inputs": [{"datatype": "BYTES", "parameters": {"binary_data_size": 9}}]}),
    ],
)
def test_a_request_of_another_form_is_a_400_that_shows_the_right_one(site: Site, path: str, body: Any) -> None:
    answer = post(site, path, body)
    assert (answer.status_code, answer.json()["type"]) == (400, "BadEncoding")
    assert "instances" in answer.json()["error"]


def test_methods_and_addresses_that_are_not_there(site: Site) -> None:
    for method, path, status, allowed in (
        ("GET", "/v1/models/fake:predict", 405, "POST"),
        ("GET", "/v2/models/fake/infer", 405, "POST"),
        ("POST", "/v2/health/live", 405, "GET, HEAD"),
        ("POST", "/v1/models/fake%0d%0aX:predict", 404, None),
        ("GET", "/v2/models/fake%3Fx", 404, None),
        ("GET", "/v1/other", 404, None),
        ("POST", "/adapter/predictions/fake", 404, None),
        ("GET", "/description.json", 404, None),
    ):
        answer = requests.request(method, f"{site.url}{path}", timeout=30)
        assert (answer.status_code, answer.headers.get("Allow")) == (status, allowed), path
        assert answer.json()["code"] == status


def test_polls_of_readiness_are_not_logged(site: Site) -> None:
    for path in ("/v2/health/ready", "/v2/models/fake/ready"):
        requests.get(f"{site.url}{path}", timeout=30)
    site.predict(model="after")
    wait_for(site.log, lambda lines: any("/after" in line["request"] for line in lines))
    assert not [line for line in site.log() if "/health/" in line["request"] or "/ready" in line["request"]]


def test_the_servers_other_names_of_a_prediction(site: Site) -> None:
    for path in ("/fake/predict", "/models/fake/invoke"):
        assert requests.post(f"{site.url}{path}", data=b"echo", timeout=30).json()["path"] == "/predictions/fake"
    assert requests.get(f"{site.url}/fake/predict", timeout=30).status_code == 405
    assert requests.post(f"{site.url}/fake/invoke", data=b"echo", timeout=30).status_code == 404


def test_a_killed_adapter_comes_back_and_requests_wait_for_it(site: Site, web: Web) -> None:
    before = adapter(site)
    before.send_signal(signal.SIGKILL)
    before.wait(10)
    assert by_url(site, web.url("red.png")).status_code == 200
    assert adapter(site).pid != before.pid
    assert "the adapter ended by itself" in (site.settings.folder.parent / "process.log").read_text()


def test_a_gateway_that_stops_answers_what_the_adapter_has(make_fake: MakeArchive, web: Web) -> None:
    hosts = (f"pictures.test:{web.port}",)
    stopping = start(make_fake, module=("tests.serve.gateway.fake_web",), url_hosts=hosts, url_http=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        under_way = pool.submit(by_url, stopping, web.url("words/sleep_1.5"))
        wait_for(lambda: stopping.backends[0].busy, lambda busy: busy >= 1)
        stopping.process.send_signal(signal.SIGTERM)
        assert under_way.result().status_code == 200
    stop(stopping)


@pytest.fixture(params=[""])
def telling(make_fake: MakeArchive, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A gateway that keeps at most a megabyte of what was answered wrongly, with the token of the parameter."""
    folder = str(tmp_path / "kept")
    started = start(make_fake, feedback=folder, feedback_megabytes=1, feedback_token=request.param)
    yield started
    stop(started)


def picture(size: int = 9) -> bytes:
    return b"\xff\xd8\xff".ljust(size, b"-")


def tell(site: Site, label: str, body: bytes = picture(), **headers: str) -> int:
    sent = {**({"X-Label": label} if label else {}), **headers}
    return requests.post(f"{site.url}/feedback/fake", data=body, headers=sent, timeout=30).status_code


def tell_adapter(site: Site, **headers: str) -> bytes:
    """Send a picture to the adapter's socket, as any program of this machine can; return the first line."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(site.settings.folder / ADAPTER_SOCKET))
        lines = "".join(f"{name}: {value}\r\n" for name, value in {"X-Label": "blue", **headers}.items())
        client.sendall(
            f"POST /feedback/fake HTTP/1.1\r\nHost: b\r\n{lines}Content-Length: 9\r\n\r\n".encode() + picture()
        )
        return client.recv(12)


def kept(site: Site) -> list[tuple[str, bytes]]:
    return [(path.parent.name, path.read_bytes()) for path in Path(site.settings.feedback).glob("fake/*/*")]


def test_a_picture_is_kept_once_with_the_label_that_was_told_last(telling: Site) -> None:
    assert [tell(telling, label) for label in ("blue", "gr%C3%BCn%20%26%20co")] == [200, 200]
    assert kept(telling) == [("grün & co", picture())]
    assert not (Path(telling.settings.feedback) / "fake" / "blue").exists()
    for body in (
        b"status 415",
        b'{"data": "/9j/"}',
        b'\xef\xbb\xbf{"data": "/9j/"}',
        b"/9j/",
        b"data:;base64,/9j/",
        b"",
    ):
        assert tell(telling, "blue", body) == 415
    # Another site's page cannot send the header.
    for label in ("", "a%2Fb", "..", ".b", "%20", "a%00b", "a%0Ab", "x" * 101, "__pycache__", "%E2%82%AC" * 70):
        assert tell(telling, label) == 400, label
    assert len(kept(telling)) == 1


def test_the_folder_of_pictures_has_a_bound(telling: Site) -> None:
    """Small ones count as blocks of the disk; what is there may get another label."""
    assert [tell(telling, "blue", picture(size)) for size in range(90_000, 90_012)] == [200] * 11 + [507]
    assert [tell(telling, "blue", picture(size)) for size in (50, 51, 52)] == [200, 200, 507]
    assert tell(telling, "green", picture(50)) == 200
    # Of a person, which the bound does not stop.
    (Path(telling.settings.feedback) / "more").write_bytes(bytes(9_000))
    assert tell(telling, "blue", picture(50)) == 507


def test_without_a_token_only_a_browser_of_this_machine_tells(telling: Site) -> None:
    assert tell(telling, "blue", picture(90_000), Host="attacker.test") == 403
    # Tests listen on loopback only, so other addresses go to the adapter itself.
    for where in ("10.1.2.3 localhost", "127.0.0.1 a.test", "127.0.0.1 x localhost", "unix: localhost", ""):
        assert tell_adapter(telling, **{"X-From": where}).endswith(b" 403")
    assert not kept(telling)
    assert tell_adapter(telling, **{"X-From": "::1 [::1]"}).endswith(b" 200")


@pytest.mark.parametrize("telling", ["a-token-of-16-or-more"], indirect=True)
def test_where_there_is_a_token_nothing_is_kept_without_it(telling: Site) -> None:
    for wrong in ({}, {"Authorization": "Bearer a-token-of-16-or-mor"}, {"Authorization": "a-token-of-16-or-more"}):
        assert tell(telling, "blue", picture(), **wrong) == 403
        assert tell_adapter(telling, **{"X-From": "127.0.0.1 localhost"}, **wrong).endswith(b" 403")
    assert not kept(telling)
    assert tell(telling, "blue", Authorization="Bearer a-token-of-16-or-more", Host="site.test") == 200
    files = [path for path in telling.settings.folder.rglob("*") if path.is_file()]
    secret = {path.name: path.stat().st_mode & 0o777 for path in files if b"a-token-of" in path.read_bytes()}
    assert secret == {"settings.json": 0o600}


def test_with_nothing_configured_nothing_else_runs_and_nginx_reads_nothing_of_it(
    make_fake: MakeArchive, tmp_path: Path
) -> None:
    plain = start(make_fake)
    names = [each.name() for each in psutil.Process(plain.process.pid).children()]
    files = {path.name for path in (plain.settings.folder / "settings").iterdir()}
    text = "".join(path.read_text() for path in (plain.settings.folder / "settings").iterdir())
    assert tell(plain, "blue") == 404
    described = requests.options(f"{plain.url}/", timeout=30)
    same = [requests.request(method, f"{plain.url}/api-description", timeout=30) for method in ("GET", "OPTIONS")]
    stop(plain)
    assert [each.json() for each in same] == [described.json()] * 2
    assert described.headers["Content-Type"].startswith("application/json")
    on = described.json()["paths"].keys()
    assert {"/", "/ping", "/predictions/{model}", "/catalog.json"} <= on
    assert not [path for path in on if path.startswith(("/v1", "/v2", "/invocations", "/feedback", "/models"))]
    assert names == ["nginx"]
    assert "adapter" not in text + "".join(files)
    assert "include adapter.conf;" in written(tmp_path, "limits.conf", kserve=True)
    assert not Settings.__dataclass_fields__["kserve"].default
