"""Train a network as planned, with Lightning, and write the finished run."""

from __future__ import annotations

import csv
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

from archive.artifact import read_weights
from host import Say
from host.files import write_json
from train import runs
from train.errors import DataError, RunError
from train.learner import Learner, solve_head
from train.loader import Pictures
from train.model import build, check_input
from train.plan import Plan
from train.progress import Step, progress
from train.runs import RUNS, Run

# Enough pictures to solve for a head; the features of all are in memory at once.
_MOST_FOR_HEAD = 20_000


@dataclass(frozen=True)
class Epoch:
    """One row of `metrics.csv`: losses are means, accuracies 0 to 1, seconds of wall time."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


def fit(plan: Plan, say: Say, folder: Path = RUNS) -> Run:
    """Train as planned and return the run, a new folder under `folder`.

    The folder gets `config.yaml`, `checkpoint.pth` (a state dict), `metrics.csv`, `metrics.json` and, last,
    `run.json`. The schedule is fixed, and the model of the last epoch is kept. Raise `ConfigError` or `ArchiveError`
    for an architecture, size or weights that do not fit, `DataError` for a bad picture, `RunError` for a loss that is
    not finite, or an interrupt.
    """
    config = plan.config
    with _quiet(), _deterministic(config.seed):
        network = build(config.model.name, len(plan.data.labels))
        check_input(network, config.model.geometry.shape, config.model.name)
        if plan.weights.path is not None:
            weights = read_weights(plan.weights.path, config.model.name)
            weights.start(network)
            for note in weights.notes:
                say(note)
        run = runs.create(config.model.name.replace(":", "-"), plan.fingerprint, folder)
        config.save(run / "config.yaml")
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
    config, pictures = plan.config, Pictures(plan.data, plan.config)
    batches = -(-len(plan.data.train) // config.fit.batch)
    lines = _Lines(config.fit.epochs, len(plan.data.val), say)
    averaging = [] if config.fit.average is None else [EMAWeightAveraging(decay=config.fit.average)]
    if torch.cuda.is_available():
        device = {"value": "cuda", "reason": "a CUDA device is there"}
    else:
        device = {"value": "cpu", "reason": f"no CUDA device is there; {torch.get_num_threads()} threads"}
    network.to(device["value"]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer(
        accelerator=device["value"],
        devices=1,
        max_epochs=config.fit.epochs,
        callbacks=[*averaging, lines],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    try:
        if config.fit.head_penalty is not None:
            train = plan.data.train.pictures
            some = train[:: -(-len(train) // _MOST_FOR_HEAD)]
            mirrored = config.augment.flip > 0
            right = solve_head(network, pictures.fixed(some), config.fit.head_penalty, config.model, mirrored)
            say(f"head: solved for on the frozen features of {len(some)} pictures, {right:.3f} of them right")
        learner = Learner(network, config.model, config.fit, batches * config.fit.epochs)
        trainer.fit(learner, datamodule=pictures)
    except DataError as error:
        # The error of a loader process arrives as a whole traceback; its last line is the sentence.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("train.errors.DataError: ")) from error
    except SystemExit as error:
        # Lightning turns Ctrl-C and SIGTERM into this, the latter with exit code 0.
        done, wanted = len(lines.epochs), config.fit.epochs
        raise RunError(f"the fit was interrupted after {done} of {wanted} epochs and not kept; train again") from error
    return lines.epochs, device


class _Lines(Callback):
    def __init__(self, epochs: int, pictures: int, say: Say) -> None:
        self.epochs: list[Epoch] = []
        self._count, self._pictures, self._say, self._start = epochs, pictures, say, 0.0
        self._open = ExitStack()
        self._step: Step = lambda done: None

    def on_train_epoch_start(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        self._start = time.monotonic()
        text = f"epoch {len(self.epochs) + 1}/{self._count}"
        self._step = self._open.enter_context(progress(text, int(trainer.num_training_batches), self._say, "batches"))

    def on_train_batch_end(self, trainer: Trainer, learner: Learner, *batch: object) -> None:  # type: ignore[override]
        self._step(trainer.fit_loop.epoch_loop.batch_progress.current.completed)

    def on_exception(self, trainer: Trainer, learner: Learner, exception: BaseException) -> None:  # type: ignore[override]
        self._open.close()

    def on_validation_epoch_end(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        self._open.close()
        train, val = learner.training_tally, learner.validation_tally
        seconds = time.monotonic() - self._start
        row = Epoch(len(self.epochs) + 1, train.loss, train.accuracy, val.loss, val.accuracy, round(seconds, 3))
        self.epochs.append(row)
        self._say(
            f"epoch {row.epoch}/{self._count}: training loss {row.train_loss:.3f}, accuracy {row.train_accuracy:.3f}; "
            f"validation loss {row.val_loss:.3f}, accuracy {row.val_accuracy:.3f} ({val.hits}/{self._pictures}); "
            f"{seconds:.0f} s"
        )


def _record(plan: Plan, epochs: list[Epoch], seconds: float, device: dict[str, str]) -> dict[str, object]:
    data, weights = plan.data, plan.weights
    return {
        "fingerprint": plan.fingerprint,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "accuracy": epochs[-1].val_accuracy,
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
        seed_everything(seed, verbose=False)
        # On a GPU some backward passes (adaptive pooling) have no deterministic version; PyTorch warns there.
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's advice, such as "consider more workers"."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
