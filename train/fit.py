"""Train a network as planned, and write the finished run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from archive.artifact import read_weights
from beeline.errors import ConfigError
from host import Say, silent
from host.machine import cores
from train import parallel, runs
from train.errors import DataError
from train.loader import Pictures
from train.logs import Logs
from train.model import balanced, build, check_input, solve_head, tallied, write_state
from train.plan import Plan, keep
from train.runs import RUNS, Epoch, Report, Run, ignore

# Enough pictures to solve for a head; the features of all are in memory at once.
_MOST_FOR_HEAD = 20_000


def fit(plan: Plan, say: Say, folder: Path = RUNS, resume: Path | None = None, report: Report = ignore) -> Run:
    """Train as planned and return the run, a new folder under `folder`, or the interrupted one `resume`.

    The folder gets `config.yaml`, `pictures.csv`, `checkpoint.pth` (a state dict), `metrics.csv`, `metrics.json` and,
    last, `run.json`. The model of the last epoch is kept, or with `schedule.patience` the best for the watched
    pictures. Raise `ConfigError` or `ArchiveError` for an architecture, size or weights that do not fit, `DataError`
    for a bad picture, `RunError` for a loss that is not finite, a full disk, or an interrupt. `report` gets the rows
    after each epoch; what it raises stops the fit.
    """
    config = plan.config
    if (batch := config.fit.batch) % (count := parallel.size()):
        raise ConfigError(f"fit.batch is {batch}, which {count} processes cannot share; take a multiple of {count}")
    if (few := len(plan.data.val)) < count:
        raise ConfigError(
            f"{few} validation pictures cannot be shared by {count} processes; take fewer with --processes"
        )
    with _deterministic(config.seed):
        network = build(config.model.name, len(plan.data.labels))
        check_input(network, config.model.geometry.shape, config.model.name)
        if not (is_begun := resume is not None and (resume / runs.CHECKPOINT).is_file()) and plan.weights.path:
            weights = read_weights(plan.weights.path, config.model.name)
            weights.start(network)
            for note in weights.notes:
                say(note)
        run = resume or runs.create(config.model.name.replace(":", "-"), plan.fingerprint, folder)
        if resume is None:
            keep(plan, run)
        say(f"run: {run}" if resume is None else f"run: {run}, which was interrupted, goes on")
        start = time.monotonic()
        with runs.held(run):
            if resume is not None:
                # What the fingerprint leaves out may be other: where the pictures are, or the name of the export.
                config.save(run / "config.yaml")
            epochs, device = _train(network, plan, run, is_begun, say, report)
            # Of all sessions, where there were several.
            seconds = max(time.monotonic() - start, sum(epoch.seconds for epoch in epochs))
            write_state(network.cpu().state_dict(), run / "checkpoint.pth")
            return runs.finish(run, _record(plan, epochs, seconds, device))


def _train(
    network: nn.Module, plan: Plan, run: Path, is_begun: bool, say: Say, report: Report
) -> tuple[list[Epoch], dict[str, str]]:
    """Solve for the head where the recipe says so, then train all epochs; `network` is changed in place."""
    config, pictures = plan.config, Pictures(plan.data, plan.config)
    own = balanced(list(pictures.train.counts().values())) if config.fit.class_weights == "balanced" else None
    device = _device(config.fit.precision)
    network.to(device["value"]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        if config.fit.head_penalty is not None and not is_begun:
            start, train = time.monotonic(), pictures.train.pictures
            some = train[:: -(-len(train) // _MOST_FOR_HEAD)]
            mirrored = config.augment.flip > 0
            solved = solve_head(network, pictures.fixed(some), config.fit.head_penalty, config.model, mirrored, own)
            right = f"{solved.accuracy:.3f} of them right"
            say(f"head: solved for on the frozen features of {len(some)} pictures, {right}")
            if not config.fit.epochs:
                val = tallied(network, pictures.fixed(pictures.val.pictures), config.model)
                seconds = round(time.monotonic() - start, 3)
                scores = val.loss, val.accuracy, seconds, None, val.not_sure_under
                epochs = [Epoch(0, solved.loss, solved.accuracy, *scores)]
                with closing(Logs(run, config)) as logs:
                    logs.write(epochs, 0)
                return epochs, device
        from train.learner import train_epochs

        parallel.gather((plan, run, network.state_dict(), own))
        return train_epochs(network, config, pictures, device, run, say, own, plan.teacher, report), device
    except DataError as error:
        # The error of a loader process arrives as a whole traceback; its last line is the sentence.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("train.errors.DataError: ")) from error


def follow() -> None:
    """Take part in the epochs of the fit that another process leads, if it gets so far."""
    try:
        plan, run, state, own = parallel.gather(None)[0]
    except RuntimeError:
        # The leader has ended, and says why.
        return
    from train.learner import train_epochs

    with _deterministic((config := plan.config).seed):
        network, device = build(config.model.name, len(plan.data.labels)), _device(config.fit.precision)
        network.load_state_dict(state)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        train_epochs(network, config, Pictures(plan.data, config), device, run, silent, own, plan.teacher)


def _device(precision: str) -> dict[str, str]:
    """Take a CUDA device where there is one, and with `auto` the mixed precision that it has; say why."""
    if torch.cuda.is_available():
        best, name, reason = "bf16" if torch.cuda.is_bf16_supported() else "fp16", "cuda", "a CUDA device is there"
    else:
        # PyTorch knows of no quota of cores.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // parallel.local())))
        best, name, reason = "fp32", "cpu", f"no CUDA device is there; {torch.get_num_threads()} threads"
    return {"value": name, "precision": best if precision == "auto" else precision, "reason": reason}


def _record(plan: Plan, epochs: list[Epoch], seconds: float, device: dict[str, str]) -> dict[str, object]:
    data, weights, teacher = plan.data, plan.weights, plan.teacher
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
        "teacher": teacher and {"run": teacher.id, "fingerprint": teacher.fingerprint, "accuracy": teacher.accuracy},
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
