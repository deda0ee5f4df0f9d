"""Answers from a run without a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from beeline import tasks
from beeline.answer import Answer
from beeline.decoder import Decoder
from beeline.engines.torch import TorchEngine
from beeline.errors import ArchiveError
from beeline.settings import Limits
from beeline.spec import FILE_NAME, ModelSpec
from train.errors import RunError
from train.export import export
from train.runs import open_run
from vision_handler import VisionHandler


class RunPredictor(VisionHandler):
    """The worker's handler around a run's export, which is made where it is missing, or around an exported folder."""

    def __init__(self, folder: Path, all_labels: bool = False) -> None:
        """Open a run by its folder or id, or a folder with `model_spec.json`; answer as it does, or with all labels.

        Raise `RunError` when it is neither, `SpecError` or `ArchiveError` for a damaged export.
        """
        if not (folder / FILE_NAME).is_file():
            run = open_run(folder)
            folder = run.export
            if not (folder / FILE_NAME).is_file():
                try:
                    export(run)
                except (ArchiveError, OSError) as error:
                    why = f"has no export, from which it answers, and none can be made: {error}"
                    raise RunError(f"{run.folder} {why}") from error
        spec, threads = ModelSpec.load(folder), torch.get_num_threads()
        self.spec = replace(spec, top_k=len(spec.labels)) if all_labels else spec
        self.engine = TorchEngine(folder, self.spec, threads=threads)
        self.task = tasks.of(self.spec)
        self.task.load(folder, self.engine)
        self.decoder = Decoder(self.spec.geometry, Limits.from_environment(), threads)

    def predict(self, pictures: list[bytes]) -> list[Answer]:
        """Answer every picture, in order; a bad one gets its own 4xx."""
        batch = self.preprocess([{"body": data} for data in pictures])
        return self.postprocess(self.inference(batch), batch)
