"""SageMaker's contract: the decisions, and a real server that is started as SageMaker starts a container."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from typer.testing import CliRunner

from beeline.errors import BeelineError
from cli.archive import app
from serve import config, sagemaker
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance import named
from serve.ports import Address, settle
from serve.properties import load
from serve.up import Request
from tests.conftest import BLUE, RED, ROOT, picture
from tests.serve.conftest import MakeArchive, wait_for

_REQUEST = Request()


def decided(
    folder: Path, environ: Mapping[str, str] = {}, request: Request = _REQUEST
) -> tuple[Request, dict[str, str], list[str]]:
    """Return what the contract makes of a request, the environment, and what it says."""
    said: list[str] = []
    return *sagemaker.contract(request, folder, environ, said.append), said


@pytest.fixture
def model(make_fake: MakeArchive, tmp_path: Path) -> Path:
    """SageMaker's folder with one archive."""
    return make_fake(tmp_path / "model").parent


def numbers(environ: dict[str, str]) -> dict[str, int]:
    """Return the limits that a server gets from this environment and the file."""
    resolved = config.resolve(load(Request().config_file, environ), (), Overrides(), environ, 2, 0, 0)
    return {name: setting.value for name, setting in resolved.numbers.items()}


def test_a_limit_is_no_larger_than_aws_allows_and_a_lower_one_stays(model: Path) -> None:
    limits = numbers(decided(model, {"BEELINE_STOP_SECONDS": "60", "BEELINE_DRAIN_SECONDS": "3"})[1])
    assert limits["beeline_max_image_bytes"] == sagemaker.PAYLOAD
    assert limits["beeline_deadline_seconds"] < sagemaker.ANSWER
    # What is left after the last answer is for the server's own end.
    assert limits["beeline_drain_seconds"] + limits["beeline_stop_seconds"] <= sagemaker.STOP - 5
    lower = {"BEELINE_MAX_IMAGE_BYTES": str(sagemaker.SERVERLESS_PAYLOAD), "BEELINE_DEADLINE_SECONDS": "10"}
    limits = numbers(decided(model, lower)[1])
    assert (limits["beeline_max_image_bytes"], limits["beeline_deadline_seconds"]) == (sagemaker.SERVERLESS_PAYLOAD, 10)
    # A picture is fetched before its prediction.
    fetching = numbers(decided(model, {"BEELINE_URL_HOSTS": "a.b", "BEELINE_URL_SECONDS": "9"})[1])
    assert fetching["beeline_deadline_seconds"] + 9 < sagemaker.ANSWER


def test_the_payload_is_that_of_awss_own_client() -> None:
    import botocore.session

    shapes = botocore.session.get_session().get_service_model("sagemaker-runtime")
    assert shapes.shape_for("BodyBlob").metadata["max"] == sagemaker.PAYLOAD


def test_the_variables_of_awss_torchserve_images_are_taken(model: Path) -> None:
    given = {"SAGEMAKER_TS_BATCH_SIZE": "16", "SAGEMAKER_TS_MAX_BATCH_DELAY": "5", "SAGEMAKER_TS_MIN_WORKERS": "3"}
    _, environ, said = decided(model, {**given, "SAGEMAKER_MODEL_SERVER_WORKERS": "4"})
    assert (environ["BATCH_SIZE"], environ["LINGER_MS"], environ["WORKERS"]) == ("16", "5", "3")
    assert "BATCH_SIZE is 16, from SAGEMAKER_TS_BATCH_SIZE" in said
    assert decided(model, {"BATCH_SIZE": "2", **given})[1]["BATCH_SIZE"] == "2"


def test_ports_are_those_that_sagemaker_leaves_to_the_container(model: Path) -> None:
    request, *_ = decided(model)
    assert request.ports == Ports(8080, 0, None, None)
    request, *_ = decided(model, {"SAGEMAKER_BIND_TO_PORT": "8501", "SAGEMAKER_SAFE_PORT_RANGE": "21000-22000"})
    assert (request.ports.inference, request.free) == (8501, range(21000, 22001))
    assert {each.port for each in settle([(Address("127.0.0.1", 0), "")] * 4, free=range(21000, 21004))} == {
        *range(21000, 21004)
    }


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"SAGEMAKER_BIND_TO_PORT": "http"}, "SAGEMAKER_BIND_TO_PORT is 'http'; allowed: a port"),
        ({"SAGEMAKER_BIND_TO_PORT": "0"}, "SAGEMAKER_BIND_TO_PORT is '0'; allowed: a port"),
        ({"SAGEMAKER_SAFE_PORT_RANGE": "21000"}, "SAGEMAKER_SAFE_PORT_RANGE is '21000'; allowed: at least four"),
        ({"SAGEMAKER_SAFE_PORT_RANGE": "21000-21002"}, "allowed: at least four ports"),
        ({"SAGEMAKER_MULTI_MODEL": "true"}, "this image serves one model"),
    ],
)
def test_a_variable_that_cannot_be_kept_is_one_sentence(model: Path, environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(BeelineError, match=sentence):
        decided(model, environ)


def test_the_folder_holds_one_archive_or_nothing(model: Path, make_fake: MakeArchive, tmp_path: Path) -> None:
    built = dataclasses.replace(Request(), store=make_fake(tmp_path / "built", "other").parent)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        assert decided(folder, request=built)[0].wanted == (str(tmp_path / "built" / "other.mar"),)
    request = decided(model, request=built)[0]
    assert request.wanted == (str(model / "fake.mar"),)
    assert request.invocations
    make_fake(model, "second")
    with pytest.raises(BeelineError, match=r"must hold one archive, and holds 2 \(fake.mar, second.mar\)"):
        decided(model, request=built)
    # Not the built-in archive: serving another model in silence would be worse.
    for path in model.glob("*.mar"):
        path.rename(path.with_suffix(".pth"))
    with pytest.raises(BeelineError, match=r"holds 0 \(none\); make model.tar.gz"):
        decided(model, request=built)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_the_folder_is_read_by_root_and_by_the_images_user(model: Path, mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # pytest's own folders are root's alone.
        Path(folder).chmod(0o755)
        model = Path(shutil.copytree(model, Path(folder) / "model"))
        model.chmod(mode)
        decided(model)
        said = _contract_of_another_user(model)
    assert ("fake.mar" if mode == 0o755 else "must be readable by all") in said


def _contract_of_another_user(model: Path) -> str:
    code = f"""
import os
from pathlib import Path
from serve import sagemaker, up
os.setgroups([]); os.setgid(10001); os.setuid(10001)
try:
    print(sagemaker.contract(up.Request(), Path({str(model)!r}), {{}}, print)[0].wanted)
except Exception as error:
    print(error)
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_export_writes_the_same_model_data_each_time(colour_archive: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        words = ["export", str(colour_archive), "--to", "sagemaker", "--out", str(tmp_path / name), "--json"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    first, second = ((tmp_path / name / "model.tar.gz").read_bytes() for name in ("a", "b"))
    assert first == second
    assert gzip.decompress(first)
    with tarfile.open(tmp_path / "a" / "model.tar.gz") as tar:
        (entry,) = tar.getmembers()
        assert (entry.name, entry.mtime, entry.uid, oct(entry.mode)) == ("colours.mar", 0, 0, "0o644")
        tar.extractall(tmp_path / "model", filter="data")
    assert (tmp_path / "model" / "colours.mar").read_bytes() == colour_archive.read_bytes()
    assert decided(tmp_path / "model")[0].wanted == (str(tmp_path / "model" / "colours.mar"),)
    done = CliRunner().invoke(app, [*words, "--gpus", "0"])
    assert done.exit_code != 0
    assert "takes no numbers" in str(done.exception)


class Container:
    """What `docker run IMAGE serve` runs, without a container: the image's entrypoint with other folders."""

    def __init__(
        self, folder: Path, archive: Path, state: Path, within: Sequence[str] = (), environ: Mapping[str, str] = {}
    ) -> None:
        model, programs = folder / "model", folder / "bin"
        model.mkdir()
        programs.mkdir()
        shutil.copy(archive, model)
        script = (ROOT / "docker" / "entrypoint").read_text()
        for inside, here in (("/opt/ml/model", model), ("/opt/beeline/model_store", folder / "none")):
            assert inside in script
            script = script.replace(inside, str(here))
        texts = {"entrypoint": script, "beeline": f'#!/bin/sh\nexec "{sys.executable}" -m cli "$@"\n'}
        for name, text in texts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (port,) = settle([(Address("127.0.0.1", 0), "")])
        self.url, self.state = f"http://127.0.0.1:{port.port}", state
        variables = {"SAGEMAKER_BIND_TO_PORT": str(port.port), "SAGEMAKER_SAFE_PORT_RANGE": "30000-30900"}
        # As in the image: longer than AWS waits.
        variables |= {"BEELINE_STOP_SECONDS": "60", "BEELINE_DRAIN_SECONDS": "3", "BEELINE_STATE": str(state)}
        variables |= {"WORKERS": "1", "PATH": f"{programs}:{os.environ['PATH']}", "BEELINE_SHOW_LOGS": "access"}
        self.log = (folder / "log").open("w+")
        command = [*within, str(programs / "entrypoint"), "serve"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **variables, **environ}, stdout=self.log, stderr=self.log
        )

    def stop(self) -> None:
        """End it, as SIGKILL does; its supervisor ends the rest."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    def ping(self) -> int:
        """Return the status of `/ping`, which AWS asks for with this patience; 0 where nobody listens."""
        assert self.process.poll() is None, Path(self.log.name).read_text()
        try:
            return requests.get(f"{self.url}/ping", timeout=sagemaker.PING).status_code
        except requests.ConnectionError:
            return 0

    def invoke(self, body: bytes = RED, content_type: str = "application/x-image") -> requests.Response:
        """Send one request as AWS does, with the headers that it adds."""
        headers = {"Content-Type": content_type, "X-Amzn-SageMaker-Custom-Attributes": "a", "Accept": "*/*"}
        return requests.post(f"{self.url}/invocations", data=body, headers=headers, timeout=sagemaker.ANSWER)


@pytest.fixture(scope="module", params=["torchserve", "mms"])
def container(
    colour_archive: Path, state_home: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Container]:
    folder, state = tmp_path_factory.mktemp("container"), state_home / f"sagemaker-{request.param}"
    container = Container(folder, colour_archive, state, environ={"BEELINE_SERVER": request.param})
    yield container
    container.stop()


@pytest.mark.server
def test_ping_is_200_only_once_the_model_answers(container: Container) -> None:
    seen = []

    def ping() -> int:
        seen.append(container.ping())
        return seen[-1]

    assert wait_for(ping, lambda status: status == 200, sagemaker.START) == 200
    assert container.invoke().status_code == 200
    # Before that nobody listened, or it said so.
    assert set(seen[:-1]) <= {0, 503}
    assert 503 in seen


@pytest.mark.server
def test_every_body_gets_the_status_and_the_answer_of_a_prediction(container: Container) -> None:
    wait_for(container.ping, lambda status: status == 200)
    encoded = base64.b64encode(BLUE).decode()
    texts = [json.dumps({"data": encoded}), json.dumps({"instances": [{"b64": encoded}]}), '{"data": "!"}', "{"]
    bodies = [(BLUE, "image/png"), (BLUE, "application/x-image"), (RED, "application/octet-stream"), (b"", "image/png")]
    bodies += [(picture((9, 200, 60), kind=kind), f"image/{kind}") for kind in ("JPEG", "WEBP", "GIF", "BMP")]
    bodies += [
        (BLUE[:60], "image/png"),
        (b"no picture", "image/png"),
        *((text.encode(), "application/json") for text in texts),
    ]
    seen = []
    for body, kind in bodies:
        answer = container.invoke(body, kind)
        plain = requests.post(f"{container.url}/predictions/colours", data=body, timeout=60)
        first = next(iter(plain.json())) if plain.ok else plain.json()["code"]
        assert (answer.status_code, answer.json()) == (plain.status_code, plain.json()), kind
        assert answer.headers["Content-Type"].startswith("application/json")
        seen.append(first)
    assert seen == ["blue", "blue", "red", 400, *["green"] * 4, 422, 415, "blue", "blue", 400, 400]
    refused = requests.get(f"{container.url}/invocations", timeout=60)
    assert (refused.status_code, refused.headers["Allow"], refused.json()["code"]) == (405, "POST", 405)


@pytest.mark.server
def test_a_picture_may_be_as_large_as_awss_payload_and_no_larger(container: Container) -> None:
    wait_for(container.ping, lambda status: status == 200)
    # What follows a JPEG's end does not matter to its decoder.
    whole = picture((220, 30, 40), kind="JPEG").ljust(sagemaker.PAYLOAD, b"\0")
    answer = container.invoke(whole)
    assert answer.status_code == 200, answer.text
    assert container.invoke(whole + b"\0").json()["type"] == "TooManyBytes"


@pytest.mark.server
def test_addresses_are_within_the_ports_that_sagemaker_leaves(container: Container) -> None:
    wait_for(container.ping, lambda status: status == 200)
    state = named(container.state, "default").read()
    assert state is not None
    found = {name: Address.parse(text) for name, text in state.addresses.items() if text}
    assert str(found.pop("inference").local) == container.url
    assert all(30000 <= each.port <= 30900 and each.loopback for each in found.values()), found


@pytest.mark.server
def test_ping_answers_in_time_under_full_load_and_what_is_held_at_sigterm_is_answered(container: Container) -> None:
    """The last test of the module: AWS kills the container 30 s after SIGTERM."""
    wait_for(container.ping, lambda status: status == 200)
    large = picture((20, 200, 60), (2500, 2000), "JPEG")
    stop, closing, wrong, answers = threading.Event(), threading.Event(), [], []

    def load() -> None:
        while not stop.is_set():
            sent_before = not closing.is_set()
            try:
                answers.append(container.invoke(large).status_code)
            except requests.ConnectionError as error:
                # Once it stops, a connection may be refused; one that was sent before may not.
                if sent_before:
                    wrong.append(error)

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(load) for _ in range(16)]
        wait_for(lambda: len(answers) >= 32)
        assert [container.ping() for _ in range(20)] == [200] * 20
        closing.set()
        container.process.send_signal(signal.SIGTERM)
        assert container.process.wait(timeout=sagemaker.STOP) == 0
        stop.set()
        for client in clients:
            client.result()
    assert wrong == []
    assert set(answers) == {200}
