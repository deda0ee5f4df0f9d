"""`docker compose up` as users do it: the page, curl, management, several backends, ends under load."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from playwright.sync_api import sync_playwright

from tests.docker.conftest import (
    API,
    CIRCLES,
    MANAGEMENT,
    PAGE,
    PATIENCE,
    PROJECT,
    ROOT,
    STRIPES,
    Compose,
    inside,
    inspect,
    ping,
    predict,
    run,
    under_load,
    wait_until,
)
from tests.frontend.conftest import CHROMIUM, QUIET, Visit

pytestmark = pytest.mark.docker
# Sends a request as a program in another container would, and prints the status.
_ASK = """
import sys, urllib.request
asked = urllib.request.Request(sys.argv[1], headers={"Host": "localhost"})
try: print(urllib.request.urlopen(asked, timeout=5).status)
except OSError as error: print(error)
"""


def addresses() -> list[str]:
    """Return this machine's addresses that others may know."""
    every = [each for card in psutil.net_if_addrs().values() for each in card if each.family == socket.AF_INET]
    return [each.address for each in every if not each.address.startswith("127.")]


def models(url: str = MANAGEMENT) -> requests.Response:
    return requests.get(f"{url}/models/resnet18", timeout=10)


def test_the_page_and_the_users_lines(site: Compose) -> None:
    for path in ("/", "/index.html"):
        for url in (PAGE, API):
            assert "<title>" in requests.get(url + path, timeout=10).text
    for picture, label in ((CIRCLES, "circles"), (STRIPES, "stripes")):
        for url in (PAGE, API):
            assert next(iter(predict(picture, url).json())) == label
    said = run("curl", "-s", f"{API}/predictions/resnet18", "-T", str(CIRCLES))
    assert next(iter(json.loads(said))) == "circles"
    # The log says when it was ready, counted from its start.
    assert re.search(r"gateway Healthy, after \d+\.\d s", site.logs("gateway"))


def test_an_upload_through_the_browser(site: Compose) -> None:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        visit = Visit(chromium.new_page(), PAGE)
        visit.watch()
        visit.open()
        visit.pick(CIRCLES)
        visit.expect_answer("circles")
        visit.page.locator("#samples button").first.click()
        visit.wait_done(2)
        assert visit.problems == []
        chromium.close()


def test_scaling_through_the_management_api(site: Compose) -> None:
    answer = requests.put(f"{MANAGEMENT}/models/resnet18?min_worker=3&synchronous=true", timeout=PATIENCE)
    assert answer.status_code == 200
    wait_until(lambda: [each["status"] for each in models().json()[0]["workers"]] == ["READY"] * 3, "three workers")
    assert predict().status_code == 200
    requests.put(f"{MANAGEMENT}/models/resnet18?min_worker=1&max_worker=1&synchronous=true", timeout=PATIENCE)


def test_management_is_for_this_machine_alone(site: Compose) -> None:
    assert models().status_code == 200
    for address in addresses():
        with pytest.raises(requests.ConnectionError):
            models(f"http://{address}:8081")
    for network in ("outside", "inside"):
        options = ["--rm", "--network", f"{PROJECT}_{network}", "--entrypoint", "python", "beeline-gateway:0.1.0"]
        said = run("docker", "run", *options, "-c", _ASK, "http://gateway:8081/models")
        assert "403" in said, network
    (backend,) = site.containers("backend")
    assert "403" in inside(backend, "python", "-c", _ASK, "http://gateway:8081/models")
    # Nor through the public ports, nor may a model be registered through its own.
    for url in (PAGE, API):
        assert requests.get(f"{url}/models", timeout=10).status_code == 404
    assert requests.post(f"{MANAGEMENT}/models?url=x.mar", timeout=10).status_code == 405
    # The backend itself is published nowhere.
    assert inspect(backend)["NetworkSettings"]["Ports"] in ({}, {"8080/tcp": None})


def test_nothing_is_allowed_that_is_not_needed(site: Compose) -> None:
    for service in ("backend", "gateway"):
        (container,) = site.containers(service)
        status = dict(line.split(":\t", 1) for line in inside(container, "cat", "/proc/1/status").splitlines())
        assert (status["Uid"].split()[0], int(status["CapEff"], 16), status["NoNewPrivs"]) == ("10001", 0, "1")
        assert inside(container, "cat", "/proc/1/comm").strip() == "tini"
        host = inspect(container)["HostConfig"]
        assert host["ReadonlyRootfs"] is True
        assert host["Memory"] > 0
        assert host["PidsLimit"] > 0
        for folder in ("/", "/opt/beeline", "/usr/local/bin"):
            assert "Read-only file system" in inside(container, "touch", f"{folder}/x", check=False)


def test_a_backend_reaches_nothing_but_its_own_networks(site: Compose) -> None:
    url = f"http://{addresses()[0]}:8080/ping"
    (gateway,), (backend,) = site.containers("gateway"), site.containers("backend")
    assert inside(gateway, "python", "-c", _ASK, url).strip() == "200"
    assert re.search("timed out|unreachable", inside(backend, "python", "-c", _ASK, url))


@pytest.fixture(scope="module")
def three(site: Compose) -> Iterator[Compose]:
    """Three backends, made under load."""
    with under_load() as load:
        site("up", "--detach", "--scale", "backend=3", "--no-recreate")
        wait_until(lambda: len(ready_backends(site)) == 3, "three backends answer")
    assert (load.failures, load.refused) == ([], 0)
    print(f"\nscaled to three under load: {dict(load.statuses)}")
    yield site
    site("up", "--detach", "--scale", "backend=1", "--no-recreate")
    wait_until(lambda: models().status_code == 200, "one backend is left")


def ready_backends(site: Compose) -> set[str]:
    """Return the backends that answered one of the last requests."""
    return {line["backend"] for line in site.access_log()[-200:] if line["status"] == 200 and line["backend"]}


def test_three_share_the_load(three: Compose) -> None:
    begun = len(three.access_log())
    for _ in range(12):
        assert predict().status_code == 200
    wait_until(lambda: len(three.access_log()) >= begun + 12, "the log has them")
    answered = [line["backend"] for line in three.access_log()[begun:] if line["request"].startswith("PUT")]
    assert len(set(answered)) == 3


def test_management_does_not_guess_which_of_three_is_meant(three: Compose) -> None:
    answer = requests.put(f"{MANAGEMENT}/models/resnet18?min_worker=2", timeout=10)
    assert (answer.status_code, answer.json()["type"]) == (409, "SeveralBackends")
    container = three.containers("backend")[1]
    assert "2 workers ready" in inside(container, "beeline", "serve", "scale", "resnet18", "--min", "2")


def test_one_that_is_killed_costs_no_request(three: Compose) -> None:
    victim = three.containers("backend")[0]
    with under_load() as load:
        time.sleep(3)
        # Not `docker kill`: the engine would not start it again.
        inside(victim, "sh", "-c", "kill -KILL $(cat /proc/[0-9]*/stat | awk '$2 == \"(java)\" {print $1}')")
        time.sleep(3)
        run("docker", "kill", victim)
        time.sleep(8)
    print(f"\none of three killed under load: {dict(load.statuses)}")
    assert (load.failures, load.refused) == ([], 0)
    assert load.statuses[200] > 20


def test_one_that_is_stopped_costs_no_request(three: Compose) -> None:
    with under_load() as load:
        time.sleep(2)
        run("docker", "stop", "--time", "60", three.containers("backend")[-1])
        time.sleep(2)
    print(f"\none stopped under load: {dict(load.statuses)}")
    assert (load.failures, load.refused) == ([], 0)


def test_stop_under_load_answers_what_was_accepted(site: Compose) -> None:
    """At the gateway's own address: the engine's proxy of published ports accepts what nobody listens to any more."""
    (gateway,) = site.containers("gateway")
    networks = inspect(gateway)["NetworkSettings"]["Networks"]
    url = f"http://{networks[f'{PROJECT}_outside']['IPAddress']}:8080"
    wait_until(lambda: ping(url) == 200, "ready")
    running = [gateway, *site.containers("backend")]
    with under_load(url) as load:
        time.sleep(3)
        load.closing = time.monotonic()
        site("stop")
    print(f"\nstopped under load: {dict(load.statuses)}; {load.refused} connections were not taken any more")
    assert load.failures == []
    assert load.statuses[200] > 5
    # By themselves, and not killed when their time was up.
    assert [inspect(each)["State"]["ExitCode"] for each in running] == [0] * len(running)
    site("start")
    wait_until(lambda: ping(API) == 200, "ready again")


def test_the_commands_of_the_readme(site: Compose) -> None:
    """Each block as it stands there, in order, from the folder of a clone; the users' own line of `ab` among them."""
    if shutil.which("ab") is None:
        pytest.skip("there is no ab: install apache2-utils")
    blocks = re.findall(
        r"^```shell\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 3
    environ = {**os.environ, "COMPOSE_PROJECT_NAME": PROJECT, "PYTORCH_INDEX": os.environ.get("PYTORCH_INDEX", "")}
    for block in blocks:
        if "--index 2" in block:
            # A person reads the page before the next line; a script waits for the second backend.
            first, rest = block.split("\n", 1)
            run("bash", "-euo", "pipefail", "-c", first, cwd=site.folder, env=environ)
            wait_until(lambda: inspect_health(site) == ["healthy"] * 3, "three are healthy")
            block = rest
        said = run("bash", "-euo", "pipefail", "-c", block, cwd=site.folder, env=environ)
        if "ab -k" in block:
            shown = [
                line for line in said.splitlines() if re.match("{|Requests per|Complete|Failed|Non-2xx|  95%", line)
            ]
            print("\n" + "\n".join(shown))
            assert next(iter(json.loads(said[said.index("{") : said.index("}") + 1]))) == "circles"
            assert re.search(r"Complete requests: +1000\b", said)
            assert re.search(r"Failed requests: +0\b", said)
            assert "Non-2xx" not in said
        if "up --build" in block:
            wait_until(lambda: ping(API) == 200, "ready")
    site("up", "--detach", "--scale", "backend=1")
    wait_until(lambda: ping(API) == 200, "ready again")


def inspect_health(site: Compose) -> list[str]:
    return [inspect(each)["State"]["Health"]["Status"] for each in site.containers("backend")]


def test_both_spellings(site: Compose) -> None:
    names = ("/usr/local/lib/docker/cli-plugins", "/usr/libexec/docker/cli-plugins", "/usr/lib/docker/cli-plugins")
    found = shutil.which("docker-compose") or next(
        str(path) for path in (Path(name) / "docker-compose" for name in names) if path.is_file()
    )
    other = Compose(site.folder, (found,))
    assert other.containers("backend") == site.containers("backend")


def test_the_accelerators_file(site: Compose, tmp_path: Path) -> None:
    values = json.loads(
        run("docker", "compose", "-f", "awsei-docker-compose.yml", "config", "--format", "json", cwd=ROOT)
    )
    backend = values["services"]["backend"]
    devices = backend["deploy"]["resources"]["reservations"]["devices"]
    assert [(one["driver"], one["capabilities"]) for one in devices] == [("nvidia", ["gpu"])]
    assert backend["build"]["dockerfile"] == "docker/accelerator.Dockerfile"
    # Copied alone to an instance it says which image it lacks.
    shutil.copy(ROOT / "awsei-docker-compose.yml", tmp_path)
    said = run(
        *("docker", "compose", "-p", f"{PROJECT}-alone", "-f", "awsei-docker-compose.yml", "up", "--no-build"),
        check=False,
        cwd=tmp_path,
    )
    assert "beeline-accelerator" in said
