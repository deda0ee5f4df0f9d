"""Where metrics go: TensorBoard's events, MLflow, and a sentence where a package is missing."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from beeline.errors import ConfigError
from train.config import LogConfig, compose
from train.logs import Logs
from train.runs import Epoch

CONFIG = compose(environ={})
EPOCHS = [Epoch(1, 0.7, 0.5, 0.6, 0.75, 1.0), Epoch(2, 0.4, 0.8, 0.5, 0.875, 1.0)]


def written(folder: Path, log: LogConfig) -> None:
    logs = Logs(folder, dataclasses.replace(CONFIG, log=log))
    for count in (1, 2):
        logs.write(EPOCHS[:count], count - 1)
    logs.close()


def test_tensorboard_gets_a_scalar_of_each_metric_each_epoch(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    written(tmp_path, LogConfig(tensorboard=True))
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, scalars = file.read_bytes(), list[tuple[str, int, float]]()
    while content:
        size = int.from_bytes(content[:8], "little")
        assert int.from_bytes(content[8:12], "little") == masked_crc32c(content[:8])
        event = Event.FromString(content[12 : 12 + size])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    assert len(scalars) == 10
    assert ("val_accuracy", 2, 0.875) in scalars


def test_mlflow_gets_the_settings_and_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for a server; MLflow advises against one."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    written(tmp_path, LogConfig(mlflow=str(tmp_path / "mlflow")))
    (run,) = mlflow.MlflowClient(str(tmp_path / "mlflow")).search_runs(["0"])
    assert run.data.params["model"] == "resnet18"
    assert run.data.metrics["val_accuracy"] == 0.875


@pytest.mark.parametrize(
    ("log", "package"), [(LogConfig(tensorboard=True), "tensorboardX"), (LogConfig(mlflow="x"), "mlflow")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogConfig, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"log\.\w+ needs {package}\S*, which is not installed; `pip install"):
        Logs(tmp_path, dataclasses.replace(CONFIG, log=log))
