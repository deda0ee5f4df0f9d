"""Where the metrics of a run go: its own CSV and JSON, and on request TensorBoard and MLflow."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from beeline.errors import ConfigError
from host.files import write_json, write_whole
from train.config import TrainConfig
from train.runs import Epoch


class Logs:
    """Writes each epoch when it is done; `folder` is the run's. Raise `ConfigError` where a package is missing."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self._folder = folder
        self._board: Any = None
        self._mlflow: Any = None
        if config.log.tensorboard:
            self._board = _package("tensorboardX", "log.tensorboard").SummaryWriter(str(folder / "tensorboard"))
        if config.log.mlflow:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
            self._mlflow = _package("mlflow", "log.mlflow", "mlflow-skinny")
            self._mlflow.set_tracking_uri(config.log.mlflow)
            self._mlflow.start_run(run_name=folder.name)
            self._mlflow.log_params({"model": config.model.name, "seed": config.seed, **asdict(config.fit)})

    def write(self, epochs: Sequence[Epoch], kept: int) -> None:
        """Write all epochs so far to the run's files, and the last one elsewhere; `kept` is the index for `files`."""
        self.files(epochs, kept)
        values = {key: value for key, value in asdict(epochs[-1]).items() if key != "epoch" and value is not None}
        if self._board:
            for key, value in values.items():
                self._board.add_scalar(key, value, epochs[-1].epoch)
            self._board.flush()
        if self._mlflow:
            self._mlflow.log_metrics(values, step=epochs[-1].epoch)

    def files(self, epochs: Sequence[Epoch], kept: int) -> None:
        """Write `metrics.csv` and `metrics.json`, whose `last` is the row of the network that is kept."""
        rows, table = [asdict(epoch) for epoch in epochs], io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._folder / "metrics.csv", table.getvalue())
        write_json(self._folder / "metrics.json", {"epochs": rows, "last": rows[kept]}, sync=True)

    def close(self) -> None:
        """End what was begun elsewhere."""
        if self._board:
            self._board.close()
        if self._mlflow:
            self._mlflow.end_run()


def _package(name: str, key: str, installed_as: str | None = None) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        package = installed_as or name
        raise ConfigError(
            f"{key} needs {package}, which is not installed; `pip install {package}`, or unset it"
        ) from error
