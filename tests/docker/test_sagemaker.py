"""A container as SageMaker starts it: `docker run IMAGE serve`, with the model in /opt/ml/model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from serve import sagemaker
from tests.conftest import BLUE, pack
from tests.docker.conftest import Compose, inspect, ping, run, under_load, wait_until

pytestmark = pytest.mark.docker
CPU = "beeline-cpu:0.1.0"


@pytest.mark.parametrize("user", ["0:0", "10001:10001"])
def test_the_image_keeps_the_contract_as_root_and_as_its_own_user(
    compose: Compose, lone: Callable[..., str], openvino_model: Path, tmp_path: Path, user: str
) -> None:
    data = sagemaker.export(pack(openvino_model, tmp_path / "colours.mar"), tmp_path)
    shutil.unpack_archive(data, tmp_path / "model", filter="data")
    for folder in (tmp_path / "model", *tmp_path.parents[:2]):
        folder.chmod(0o755)
    options = (f"--volume={tmp_path / 'model'}:/opt/ml/model:ro", f"--user={user}", "--env=WORKERS=1")
    container = lone(CPU, *options, words=["serve"])
    url = f"http://{inspect(container)['NetworkSettings']['IPAddress']}:8080"

    def ready() -> bool:
        assert inspect(container)["State"]["Running"], run("docker", "logs", container, check=False)
        return ping(url) == 200

    wait_until(ready, "the container answers", sagemaker.START)
    answer = requests.post(f"{url}/invocations", data=BLUE, timeout=sagemaker.ANSWER)
    assert (answer.status_code, next(iter(answer.json()))) == (200, "blue")
    assert inspect(container)["Config"]["Labels"]["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"
    # Only /invocations and /ping are published there.
    with pytest.raises(requests.ConnectionError):
        requests.get(url.replace("8080", "8000"), timeout=5)
    (tmp_path / "blue.png").write_bytes(BLUE)
    with under_load(url, 6, picture=tmp_path / "blue.png", model="colours") as load:
        load.wait_for(50)
        assert requests.get(f"{url}/ping", timeout=sagemaker.PING).status_code == 200
        load.closing = time.monotonic()
        run("docker", "stop", "--time", str(sagemaker.STOP), container)
    assert load.failures == []
    # Had it been killed, it would be 137.
    assert inspect(container)["State"]["ExitCode"] == 0
