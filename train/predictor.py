"""Answers from a run without a server, by its exported model or its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from beeline import pixels
from beeline.answer import Answer
from beeline.batch import Batch, Decoder
from beeline.engines.torch import TorchEngine
from beeline.golden import Forward
from beeline.settings import Limits
from beeline.spec import Artifact, ModelSpec
from train.export import description, network
from train.learner import normalised
from train.runs import Run, open_run
from vision_handler import VisionHandler


class RunPredictor(VisionHandler):
    """The worker's handler around a run's export, an exported folder or a run's checkpoint.

    `source` is the folder or file that answers.
    """

    def __init__(self, folder: Path, checkpoint: bool = False) -> None:
        """Open a run, or an exported folder.

        Args:
            folder: a run's folder, its id, or a folder with `model_spec.json`.
            checkpoint: use the run's checkpoint even where there is an export.

        Raises:
            RunError: when it is neither. SpecError, ArchiveError: for a damaged export.
        """
        run = None if (folder / "model_spec.json").is_file() else open_run(folder)
        exported = folder if run is None else run.export
        if run is not None and (checkpoint or not (exported / "model_spec.json").is_file()):
            self.spec, self._forward, self.source = _spec(run), _checkpoint(run), run.checkpoint
        else:
            self.spec = ModelSpec.load(exported)
            self._forward = TorchEngine(exported, self.spec, threads=torch.get_num_threads()).forward
            self.source = exported
        self.decoder = Decoder(self.spec.geometry, Limits.from_environment(), torch.get_num_threads())

    def inference(self, batch: Batch) -> NDArray[np.float32]:
        """Run the model over the good rows: float32 `[len(batch.good), classes]`."""
        return self._forward(batch.stack()) if batch.good else np.empty((0, 0), np.float32)

    def predict(self, pictures: list[bytes]) -> list[Answer]:
        """Answer every picture, in order; a bad one gets its own 4xx."""
        batch = self.preprocess([{"body": data} for data in pictures])
        return self.postprocess(self.inference(batch), batch)


def _checkpoint(run: Run) -> Forward:
    model, config = network(run), run.config().model

    def forward(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            output: Any = model(normalised(torch.from_numpy(batch).permute(0, 3, 1, 2), config.mean, config.std))
            return np.asarray(output.numpy())

    return forward


def _spec(run: Run) -> ModelSpec:
    """Return the spec that an export would have; a checkpoint is no artifact, so its digest is all zeros."""
    artifact = Artifact(run.checkpoint.name, "exported_program", "0" * 64, run.config().model.name)
    return ModelSpec(model=artifact, geometry_version=pixels.GEOMETRY, **description(run))
