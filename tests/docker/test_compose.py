"""`docker compose up` as users run it: the page, curl, management, several backends, ends under load."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.docker.conftest import (
    ALONE,
    API,
    BUILD,
    CIRCLES,
    LABEL,
    MANAGEMENT,
    PAGE,
    PROJECT,
    ROOT,
    STRIPES,
    Compose,
    asked,
    inside,
    inspect,
    ping,
    predict,
    run,
    under_load,
    wait_until,
)
from train.generate import generate

pytestmark = pytest.mark.docker
# Sends requests as a program in another container would, and prints the statuses.
_ASK = """
import sys, urllib.request
for url in sys.argv[1:]:
    asked = urllib.request.Request(url, headers={"Host": "localhost"})
    try: print(urllib.request.urlopen(asked, timeout=2).status)
    except OSError as error: print(error)
"""
# The maker's image cannot be had without a registry; Debian's package is the same program.
PROMETHEUS = f"{PROJECT}-prometheus:debian"
_DOCKERFILE = """
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends prometheus \\
    && mkdir /prometheus && chown nobody:nogroup /prometheus
USER nobody
WORKDIR /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
"""


def addresses() -> list[str]:
    """Return this machine's addresses that other machines may know."""
    every = [each for card in psutil.net_if_addrs().values() for each in card if each.family == socket.AF_INET]
    return [each.address for each in every if not each.address.startswith("127.")]


def address(container: str, network: str) -> str:
    """Return a container's address on one of the project's networks."""
    return str(inspect(container)["NetworkSettings"]["Networks"][f"{PROJECT}_{network}"]["IPAddress"])


def models(url: str = MANAGEMENT) -> requests.Response:
    return requests.get(f"{url}/models/resnet18", timeout=10)


def test_the_page_and_predictions_by_curl(site: Compose) -> None:
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


def test_management_is_for_this_machine_alone(site: Compose) -> None:
    assert models().status_code == 200
    for address in addresses():
        with pytest.raises(requests.ConnectionError):
            models(f"http://{address}:8081")
    for network in ("outside", "inside"):
        options = ["--rm", "--label", LABEL, "--network", f"{PROJECT}_{network}", "--entrypoint", "python"]
        command = ("beeline-gateway:0.1.0", "-c", _ASK, "http://gateway:8081/models")
        assert "403" in run("docker", "run", *options, *command), network
    (backend,) = site.containers("backend")
    assert "403" in inside(backend, "python", "-c", _ASK, "http://gateway:8081/models")
    # The public ports do not pass it on, and its own port registers no model.
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


def test_a_backend_reaches_no_other_network(site: Compose) -> None:
    """It reaches no published port of the machine either; the machine's own programs are not tested."""
    (gateway,), (backend,) = site.containers("gateway"), site.containers("backend")
    urls = [f"http://{address}:8080/ping" for address in addresses()]
    assert "200" in inside(gateway, "python", "-c", _ASK, *urls)
    answers = inside(backend, "python", "-c", _ASK, *urls).splitlines()
    assert len(answers) == len(urls)
    assert all(re.search("timed out|unreachable", answer) for answer in answers), answers


@pytest.fixture(scope="module")
def three(site: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """Three backends, started under load, and Prometheus."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "Dockerfile").write_text(_DOCKERFILE)
    run("docker", "build", "--quiet", "--tag", PROMETHEUS, str(folder))
    with under_load() as load:
        site("up", "--detach", "--scale", "backend=3", "--no-recreate")
        wait_until(lambda: len(answering(site, load.agent)) == 3, "three backends answer")
    assert load.failures == []
    print(f"\nscaled to three under load: {dict(load.statuses)}")
    site("up", "--detach", "--no-deps", "prometheus", PROMETHEUS_IMAGE=PROMETHEUS)
    yield site
    site("rm", "--stop", "--force", "--volumes", "prometheus", PROMETHEUS_IMAGE=PROMETHEUS)
    run("docker", "rmi", "--force", PROMETHEUS)
    site("up", "--detach", "--scale", "backend=1", "--no-recreate")
    wait_until(lambda: models().status_code == 200, "one backend is left")


def answering(site: Compose, agent: str) -> set[str]:
    """Return the backends that answered requests of this agent."""
    return {asked(line)[-1] for line in site.access_log(agent) if line["status"] == 200}


def query(what: str) -> list[dict[str, Any]]:
    """Return the series that Prometheus has for a query now."""
    try:
        answer = requests.get("http://localhost:9090/api/v1/query", {"query": what}, timeout=10).json()
    except requests.RequestException:
        return []
    return list(answer["data"]["result"])


def test_three_share_the_load_and_prometheus_finds_them_by_name(three: Compose) -> None:
    ready = ["1"] * 3
    wait_until(lambda: [each["value"][1] for each in query('up{service="backend"}')] == ready, "all are scraped")
    for _ in range(12):
        assert predict(agent="in turn").status_code == 200
    assert {len(asked(line)) for line in three.access_log("in turn", 12)} == {1}
    assert len(answering(three, "in turn")) == 3
    wait_until(lambda: len(query("beeline_batch_size_count > 0")) == 3, "all have counted batches")
    assert {series["metric"]["model"] for series in query("beeline_queue_seconds_count")} == {"resnet18"}
    # Metrics are published nowhere.
    assert [requests.get(f"{url}/metrics", timeout=10).status_code for url in (PAGE, API)] == [404, 404]
    with pytest.raises(requests.ConnectionError):
        requests.get("http://localhost:8082/metrics", timeout=5)


def test_one_that_is_killed_costs_no_request(three: Compose) -> None:
    """The whole container at once, with its requests: twelve clients always have some at each of three backends."""
    backends = {address(each, "inside"): each for each in three.containers("backend")}
    with under_load(clients=12) as load:
        load.wait_for(30)
        wait_until(lambda: len(answering(three, load.agent)) == 3, "all three answer")
        victim = asked(three.access_log(load.agent)[-1])[-1]
        # The engine does not start again what was ended by its own command.
        run("docker", "kill", backends[victim.partition(":")[0]])
        load.wait_for(60)
    lines = three.access_log(load.agent, len(load.answers))
    again = [line for line in lines if len(asked(line)) > 1]
    print(f"\none of three killed under load: {dict(load.statuses)}; {len(again)} requests were asked of another")
    assert load.failures == []
    assert [line["status"] for line in lines] == [200] * len(load.answers)
    # Only the end of that backend is a reason to try another.
    assert {asked(line)[0] for line in again} <= {victim}
    after = [asked(line)[-1] for line in lines[-20:]]
    assert victim not in after
    assert len(set(after)) == 2


def test_stop_under_load_answers_what_was_accepted(site: Compose) -> None:
    """At the gateway's own address: the engine's proxy of published ports accepts what nobody listens to."""
    (gateway,) = site.containers("gateway")
    url = f"http://{address(gateway, 'outside')}:8080"
    wait_until(lambda: ping(url) == 200, "ready")
    running = [gateway, *site.containers("backend")]
    with under_load(url) as load:
        load.wait_for(20)
        # Nearly all of the gateway's BEELINE_DRAIN_SECONDS, in which it takes every request.
        load.closing = time.monotonic() + 2
        site("stop")
    print(f"\nstopped under load: {dict(load.statuses)}; {load.refused} connections were refused, {load.cut} cut")
    assert load.failures == []
    # nginx answered 200 to every request that it took, and the client has every answer, so none of these was cut.
    lines = site.access_log(load.agent, 20)
    assert {line["status"] for line in lines} == {200}
    assert len(lines) <= load.statuses[200]
    # They ended by themselves.
    assert [inspect(each)["State"]["ExitCode"] for each in running] == [0] * len(running)
    site("start")
    wait_until(lambda: ping(API) == 200, "ready again")


def test_the_commands_of_the_page_on_containers(site: Compose) -> None:
    """Each block of the page unchanged, in order, from the folder of a clone."""
    if shutil.which("ab") is None:
        pytest.skip("there is no ab: install apache2-utils")
    blocks = re.findall(
        r"^```shell\n(.*?)^```", (ROOT / "docs/containers.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 3
    environ = {**os.environ, **BUILD, "COMPOSE_PROJECT_NAME": PROJECT}
    for block in blocks:
        if "--index 2" in block:
            # A person reads the page before the next line; a script must wait for the backends.
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
            # The last line's answer, because curl ends with exit code 0 whatever the answer is.
            assert "Workers scaled to 3 for model: resnet18" in said
        if "up --build" in block:
            wait_until(lambda: ping(API) == 200, "ready")
    site("up", "--detach", "--scale", "backend=1")
    wait_until(lambda: ping(API) == 200, "ready again")


def inspect_health(site: Compose) -> list[str]:
    return [inspect(each)["State"]["Health"]["Status"] for each in site.containers("backend")]


def test_docker_compose_in_one_word(site: Compose) -> None:
    # It is the plugin's program, which is not on every machine's PATH.
    tops = ("/usr/local/lib/docker", "/usr/libexec/docker", "/usr/lib/docker", str(Path.home() / ".docker"))
    found = shutil.which(
        "docker-compose", path=os.pathsep.join([os.environ["PATH"], *(f"{e}/cli-plugins" for e in tops)])
    )
    assert found, f"no docker-compose is on the PATH, nor in cli-plugins of {', '.join(tops)}: install Compose v2 there"
    assert Compose(site.folder, (found,)).containers("backend") == site.containers("backend") != []


def test_the_accelerators_file(site: Compose, tmp_path: Path) -> None:
    values = json.loads(
        run("docker", "compose", "-f", "awsei-docker-compose.yml", "config", "--format", "json", cwd=ROOT)
    )
    backend = values["services"]["backend"]
    devices = backend["deploy"]["resources"]["reservations"]["devices"]
    assert [(one["driver"], one["capabilities"]) for one in devices] == [("nvidia", ["gpu"])]
    assert backend["build"]["dockerfile"] == "docker/accelerator.Dockerfile"
    # Alone on an instance it says which image is missing.
    shutil.copy(ROOT / "awsei-docker-compose.yml", tmp_path)
    compose = ("docker", "compose", "-p", ALONE, "-f", "awsei-docker-compose.yml")
    done = subprocess.run([*compose, "up", "--no-build"], cwd=tmp_path, capture_output=True, text=True)
    run(*compose, "down", cwd=tmp_path)
    assert done.returncode != 0
    # The engine's words without a network, and those with one.
    assert re.search("(No such image:|pull access denied for) beeline-accelerator", done.stderr + done.stdout)


def test_multi_model_server_in_its_profile(site: Compose) -> None:
    url = "http://localhost:9080"
    profile = ("--profile", "mms")
    site(*profile, "up", "--detach", "--no-build", "mms")
    try:
        wait_until(lambda: ping(url) == 200, "Multi Model Server's /ping is 200")
        assert next(iter(predict(STRIPES, url).json())) == "stripes"
    finally:
        site(*profile, "rm", "--stop", "--force", "mms")


def test_the_service_that_makes_an_archive(site: Compose, tmp_path: Path) -> None:
    pictures = generate(tmp_path, train=4, val=2)
    store = site.folder / "model_store"
    # SqueezeNet learns nothing from so few, and an archive needs pictures that its model is sure of.
    try:
        site(
            "run",
            "--rm",
            "-v",
            f"{pictures}:/pictures:ro",
            "archive",
            "--data=/pictures",
            "export.name=drawn",
            "fit=small",
        )
        listed = json.loads((store / "index.json").read_text())["archives"]
        assert list(listed) == ["drawn.mar"]
        assert listed["drawn.mar"]["sha256"] == hashlib.sha256((store / "drawn.mar").read_bytes()).hexdigest()
        assert (store / "drawn.mar").stat().st_uid == store.stat().st_uid
    finally:
        # The next start of a backend would serve it.
        for path in store.iterdir():
            if path.name != "README.md":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
