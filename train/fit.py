"""Train a network as planned, and write the finished run."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from archive.artifact import read_weights
from host import Say
from host.files import write_json
from train import runs
from train.errors import DataError
from train.loader import Pictures
from train.model import build, check_input, solve_head, tallied
from train.plan import Plan
from train.runs import RUNS, Epoch, Run

# Enough pictures to solve for a head; the features of all are in memory at once.
_MOST_FOR_HEAD = 20_000


def fit(plan: Plan, say: Say, folder: Path = RUNS) -> Run:
    """Train as planned and return the run, a new folder under `folder`.

    The folder gets `config.yaml`, `checkpoint.pth` (a state dict), `metrics.csv`, `metrics.json` and, last,
    `run.json`. The schedule is fixed, and the model of the last epoch is kept. Raise `ConfigError` or `ArchiveError`
    for an architecture, size or weights that do not fit, `DataError` for a bad picture, `RunError` for a loss that is
    not finite, or an interrupt.
    """
    config = plan.config
    with _deterministic(config.seed):
        network = build(config.model.name, len(plan.data.labels))
        check_input(network, config.model.geometry.shape, config.model.name)
        if plan.weights.path is not None:
            weights = read_weights(plan.weights.path, config.model.name)
            weights.start(network)
            for note in weights.notes:
                say(note)
        run = runs.create(config.model.name.replace(":", "-"), plan.fingerprint, folder)
        config.save(run / "config.yaml")
        runs.write_pictures(run, plan.data)
        say(f"run: {run}")
        start = time.monotonic()
        epochs, device = _train(network, plan, say)
        seconds = time.monotonic() - start
    torch.save(network.cpu().state_dict(), run / "checkpoint.pth")
    rows = [asdict(epoch) for epoch in epochs]
    with (run / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_json(run / "metrics.json", {"epochs": rows, "last": rows[-1]}, sync=True)
    return runs.finish(run, _record(plan, epochs, seconds, device))


def _train(network: nn.Module, plan: Plan, say: Say) -> tuple[list[Epoch], dict[str, str]]:
    """Solve for the head where the recipe says so, then train all epochs; `network` is changed in place."""
    config, pictures, epochs = plan.config, Pictures(plan.data, plan.config), []
    if torch.cuda.is_available():
        device = {"value": "cuda", "reason": "a CUDA device is there"}
    else:
        device = {"value": "cpu", "reason": f"no CUDA device is there; {torch.get_num_threads()} threads"}
    network.to(device["value"]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        if config.fit.head_penalty is not None:
            start, train = time.monotonic(), plan.data.train.pictures
            some = train[:: -(-len(train) // _MOST_FOR_HEAD)]
            mirrored = config.augment.flip > 0
            solved = solve_head(network, pictures.fixed(some), config.fit.head_penalty, config.model, mirrored)
            right = f"{solved.accuracy:.3f} of them right"
            say(f"head: solved for on the frozen features of {len(some)} pictures, {right}")
            if not config.fit.epochs:
                val = tallied(network, pictures.val_dataloader(), config.model)
                seconds = round(time.monotonic() - start, 3)
                scores = val.loss, val.accuracy, seconds, val.not_sure_under
                epochs.append(Epoch(0, solved.loss, solved.accuracy, *scores))
        if config.fit.epochs:
            from train.learner import train_epochs

            epochs = train_epochs(network, config, pictures, device["value"], say)
    except DataError as error:
        # The error of a loader process arrives as a whole traceback; its last line is the sentence.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("train.errors.DataError: ")) from error
    return epochs, device


def _record(plan: Plan, epochs: list[Epoch], seconds: float, device: dict[str, str]) -> dict[str, object]:
    data, weights = plan.data, plan.weights
    return {
        "fingerprint": plan.fingerprint,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "accuracy": epochs[-1].val_accuracy,
        "not_sure_under": epochs[-1].not_sure_under,
        "labels": list(data.labels),
        "data": {
            "name": data.name,
            "source": data.source,
            "split": data.split,
            "generated": data.generated,
            "digest": data.digest,
            "train": data.train.counts(),
            "val": data.val.counts(),
            "skipped": [str(path) for path in (*data.train.skipped, *data.val.skipped)],
        },
        "weights": {"kind": weights.kind, "name": weights.name, "sha256": weights.sha256},
        "recipe": {"value": plan.config.fit.recipe, "reason": plan.reason},
        "device": device,
        "versions": {name: version(name) for name in ("torch", "torchvision", "lightning")},
    }


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seed everything and use deterministic operations inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # On a GPU some backward passes (adaptive pooling) have no deterministic version; PyTorch warns there.
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
