"""A container alone, as `docker run` starts it: its environment, its mounts, odd pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import requests

from archive.store import Entry, put
from archive.variants import Variant
from beeline import pixels
from beeline.errors import RequestError
from beeline.files import sha256
from beeline.spec import Geometry, ModelSpec
from bench.compare.peers import CONFINED
from tests.conftest import BLUE, GREEN, RED, pack
from tests.docker.conftest import CIRCLES, LABEL, STRIPES, Compose, inside, inspect, ping, run, wait_until
from tests.handlers.engines.test_contract import converted

pytestmark = pytest.mark.docker
CPU, MMS = "beeline-cpu:0.1.0", "beeline-mms:0.1.0"
Start = Callable[..., str]


def address(container: str, port: int = 8080) -> str:
    return f"http://{inspect(container)['NetworkSettings']['IPAddress']}:{port}"


def ready(container: str) -> str:
    """Wait until the container answers predictions; return its address."""

    def now() -> bool:
        assert inspect(container)["State"]["Running"], run("docker", "logs", container, check=False)
        return ping(address(container)) == 200

    wait_until(now, "the container is ready")
    return address(container)


def last_words(container: str) -> str:
    """Wait until the container has failed, and return its output."""
    wait_until(lambda: not inspect(container)["State"]["Running"], "the container has ended")
    assert inspect(container)["State"]["ExitCode"] == 1
    return run("docker", "logs", container, check=False)


def store(folder: Path, archive: Path) -> Path:
    """Make a store that lists the archive, as `beeline archive build` leaves one."""
    folder.mkdir()
    draft = Path(shutil.copyfile(archive, folder / "draft"))
    put(folder, draft, Entry(sha256(archive), "colours", "1.0", "", archive.stat().st_size))
    # The container has another user.
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module", params=[CPU, MMS])
def server(compose: Compose, request: pytest.FixtureRequest) -> Iterator[str]:
    """A container of each server, with the variables of the servers' own images."""
    numbers = [f"--env={name}" for name in ("BATCH_SIZE=32", "WORKERS=2", "LINGER_MS=10")]
    published = "--publish=127.0.0.1:18080:8080"
    options = ("--label", LABEL, *CONFINED, *numbers, published)
    container = run("docker", "run", "--detach", *options, request.param).strip()
    yield container
    run("docker", "rm", "--force", container)


def test_the_variables_of_the_servers_images(server: str) -> None:
    ready(server)
    url = "http://localhost:18080"
    (model,) = requests.get(f"{url}/catalog.json", timeout=10).json()["models"]
    assert (model["batch_size"], model["max_batch_delay_ms"]) == (32, 10)
    both = {"workers": 2, "ready": 2}
    # One ready worker is enough for 200.
    wait_until(lambda: requests.get(f"{url}/ping", timeout=10).json()["models"]["resnet18"]["1.0"] == both, "two ready")
    for picture, label in ((CIRCLES, "circles"), (STRIPES, "stripes")):
        answer = requests.put(f"{url}/predictions/resnet18", data=picture.read_bytes(), timeout=60)
        assert next(iter(answer.json())) == label
    assert "<title>" in requests.get(url, timeout=10).text
    wait_until(lambda: inspect(server)["State"]["Health"]["Status"] == "healthy", "the engine's own health check")


def test_management_is_off_by_default(server: str) -> None:
    ready(server)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{address(server, 8081)}/models", timeout=5)
    assert "resnet18" in inside(server, "beeline", "serve", "status")


def by_pillow(body: bytes) -> int:
    """Return the status of a picture that Pillow itself decodes."""
    try:
        pixels.decode(body, Geometry(256, 224))
    except RequestError as error:
        return int(error.status)
    return 200


@pytest.mark.shared
def test_pillow_simd_answers_odd_pictures_as_pillow_does(server: str) -> None:
    """Every picture gets the status that Pillow gives it here; no worker is lost."""
    if "BEELINE_SHARED" not in os.environ:
        pytest.skip("BEELINE_SHARED names no folder of real pictures")
    url = ready(server)
    folder = Path(os.environ["BEELINE_SHARED"])
    seen: dict[int, int] = {}
    for path in sorted(each for each in (folder / "awkward").rglob("*") if each.is_file()):
        answer = requests.put(f"{url}/predictions/resnet18", data=path.read_bytes(), timeout=120)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code == by_pillow(path.read_bytes()), (path.name, answer.text)
    for path in sorted((folder / "imagenet_samples").rglob("*.jp*g"), key=lambda path: path.name)[:20]:
        assert requests.put(f"{url}/predictions/resnet18", data=path.read_bytes(), timeout=60).status_code == 200
    print(f"\nodd pictures under Pillow-SIMD: {seen}")
    assert seen[200] > 20
    assert "2 of 2 workers ready" in inside(server, "beeline", "serve", "status")


@pytest.mark.parametrize("image", [CPU, MMS])
def test_a_mounted_archive_for_openvino_is_served_and_scaled_where_management_is_on(
    lone: Start, colour_model: Path, tmp_path: Path, image: str
) -> None:
    """In the images OpenVINO lacks the readers of other formats, and its other devices."""
    variant = tmp_path / "variant"
    variant.mkdir()
    geometry = ModelSpec.load(colour_model).geometry
    crops = np.stack([pixels.decode(data, geometry) for data in (RED, GREEN, BLUE)] * 20)
    converted(colour_model, variant, Variant("openvino", "int8"), crops, 0.1)
    folder = store(tmp_path / "store", pack(variant, tmp_path / "colours.mar"))
    options = ("--volume", f"{folder}:/model_store:ro", "--env=WORKERS=1", "--publish=127.0.0.1:18081:8081")
    container = lone(image, *CONFINED, *options, "--env=BEELINE_MANAGEMENT_ADDRESS=http://0.0.0.0:8081")
    answer = requests.put(f"{ready(container)}/predictions/colours", data=BLUE, timeout=60)
    assert next(iter(answer.json())) == "blue"
    assert "archives: /model_store" in run("docker", "logs", container, check=False)
    url = "http://localhost:18081/models"
    assert requests.put(f"{url}/colours?min_worker=2&synchronous=true", timeout=120).status_code == 200
    assert requests.post(f"{url}?url=http://192.0.2.1/x.mar", timeout=10).status_code == 405
    assert requests.get(url, timeout=10, headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize("image", [CPU, MMS])
def test_an_archive_for_pytorch_ends_a_container_with_the_build_argument(
    lone: Start, colour_archive: Path, tmp_path: Path, image: str
) -> None:
    folder = store(tmp_path / "store", colour_archive)
    words = last_words(lone(image, *CONFINED, "--volume", f"{folder}:/model_store:ro"))
    (sentence,) = (line for line in words.splitlines() if line.startswith("beeline: "))
    assert "needs the engine torch, and torch is not installed here" in sentence
    assert "(images: --build-arg ENGINES=torch)" in sentence


def test_the_build_argument_brings_pytorch_and_onnx_runtime(
    compose: Compose, lone: Start, colour_archive: Path, tmp_path: Path
) -> None:
    name = "beeline-cpu-engines:0.1.0"
    compose("build", "--quiet", "backend", BEELINE_CPU_IMAGE=name, ENGINES="torch onnxruntime")
    options = (*CONFINED, "--volume", f"{store(tmp_path / 'store', colour_archive)}:/model_store:ro")
    answer = requests.put(f"{ready(lone(name, *options))}/predictions/colours", data=BLUE, timeout=60)
    assert next(iter(answer.json())) == "blue"
    run("docker", "run", "--rm", "--label", LABEL, "--entrypoint", "python", name, "-c", "import onnxruntime")


def test_a_changed_archive_and_a_wrong_setting_end_a_container_with_one_sentence(
    lone: Start, colour_archive: Path, tmp_path: Path
) -> None:
    folder = store(tmp_path / "store", colour_archive)
    with (folder / colour_archive.name).open("ab") as file:
        file.write(b"\0")
    changed = lone(CPU, *CONFINED, "--volume", f"{folder}:/model_store:ro")
    wrong = lone(CPU, *CONFINED, "--env=BATCH_SIZE=none")
    assert "it was changed after it was built" in last_words(changed)
    words = last_words(wrong)
    assert "BATCH_SIZE is 'none'; allowed: a whole number of requests, 1 to 1024" in words
    assert "Traceback" not in words
