"""A search for the best settings of a training with Optuna: the trials of all processes, and the report."""

from __future__ import annotations

import csv
import io
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from beeline.errors import BeelineError, ConfigError, short
from host import Say, silent
from host.files import locked, write_whole
from host.report import Chart, Figures, Page, Section, Table
from train.config import quoted
from train.data import DataSet, LabelledPictures, read
from train.evaluate import Report
from train.plan import Plan, find_weights, plan
from train.runs import Epoch, Run, find_run, find_unfinished, open_run
from train.space import ACCURACY, NOBODY, TEACHER, Space

MILLISECONDS = "milliseconds"
# Each trial is judged by one fifth of the training pictures, or by several in turn.
FIFTHS = 5
# A trial on another machine that reports no epoch for so long is tried again, as one of a dead process here is at once.
_STALE_SECONDS, _RETRIES = 7200, 2
_DONE = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
Told = Callable[[Plan, Sequence[Epoch]], None]
# Judges a run by validation pictures, served with an engine and a precision; returns milliseconds a picture, too.
Measure = Callable[[Run, DataSet, Mapping[str, Any]], tuple[Report, float]]


@dataclass(frozen=True)
class Search:
    """One process's view of a study: `folder` holds its files, `files` are the tables of pictures by fold.

    `measure` judges and times a run as it would be served; None: the accuracy of the fit is the only objective.
    """

    study: optuna.Study
    folder: Path
    space: Space
    files: tuple[Path, ...]
    trials: int
    runs: Path
    say: Say
    measure: Measure | None = None

    def work(self) -> None:
        """Try until so many trials are done or under way; trials of processes that were killed are tried again."""
        while trial := self._claim():
            self._finish(trial)

    @property
    def done(self) -> list[FrozenTrial]:
        """The finished trials, without those of killed processes."""
        return [each for each in self.study.get_trials() if each.state in _DONE and not _is_lost(each)]

    @property
    def running(self) -> int:
        """The number of trials that others still try, or that wait."""
        return sum(not each.state.is_finished() for each in self.study.get_trials())

    def train(self, params: Mapping[str, Any], *words: str, runs: Path, report: Told = lambda *_: None) -> Run:
        """Return the run of these parameters in `runs`: a finished one, else it is trained, or an interrupted goes on.

        `report` gets no rows while a teacher is trained.
        """
        if params.get("fit.distil") == TEACHER:
            # The teacher sees the same pictures as its student, so it is one for each fold.
            own = {**self.space.default(), "fit.distil": NOBODY}
            teacher = self.train(own, *words, runs=runs, report=lambda planned, _: report(planned, ()))
            params = {**params, "fit.distil": str(teacher.folder)}
        planned = plan([*self.space.words(params), *words], self.say)
        from train.fit import fit

        # Another process may train the same, as a teacher.
        with locked(self.folder / f"{planned.fingerprint[:16]}.lock"):
            if old := find_run(planned.fingerprint, runs):
                return open_run(old)
            begun = find_unfinished(planned.fingerprint, runs)
            try:
                return fit(planned, self.say, runs, begun, lambda rows: report(planned, rows))
            except optuna.TrialPruned:
                if begun := find_unfinished(planned.fingerprint, runs):
                    shutil.rmtree(begun)
                raise

    def _claim(self) -> Trial | None:
        """Return a trial to try; None where enough are done or under way."""
        with locked(self.folder / "study.lock"):
            for each in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if _is_dead(each):
                    self._retry(each)
            trials = self.study.get_trials(deepcopy=False)
            waiting = any(each.state is TrialState.WAITING for each in trials)
            if not waiting and sum(not _is_lost(each) for each in trials) >= self.trials:
                return None
            trial = self.study.ask()
            _mark(trial)
            return trial

    def _retry(self, dead: FrozenTrial) -> None:
        """Fail the trial of a dead process, and queue its values again where that was not done too often."""
        try:
            # First: of two machines only one can do it. A kill before the next step costs a trial of other values.
            self.study.tell(dead.number, state=TrialState.FAIL)
        except (ValueError, UpdateFinishedTrialError):
            return
        if again := _is_lost(self.study.trials[dead.number]):
            params = {**dead.system_attrs.get("fixed_params", {}), **dead.params}
            self.study.enqueue_trial(params, user_attrs={"attempt": dead.user_attrs.get("attempt", 0) + 1})
        self.say(f"trial {dead.number} was killed; it {'is tried again' if again else 'was tried often enough'}")

    def _finish(self, trial: Trial) -> None:
        """Run a trial and tell the study its values; what cannot be trained or served is a failed trial."""
        try:
            values = self._values(trial, self.space.suggest(trial))
        except optuna.TrialPruned:
            self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            return self.say(f"trial {trial.number}: pruned, {_named(trial.params)}")
        except (BeelineError, RuntimeError, MemoryError) as error:
            # Another machine may have failed a trial that was silent for too long.
            with suppress(UpdateFinishedTrialError):
                if isinstance(error.__cause__, SystemExit):
                    # An interrupt counts as no kill.
                    trial.set_user_attr("attempt", trial.user_attrs.get("attempt", 0) - 1)
                    raise
                trial.set_user_attr("error", short(error, 500))
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            return self.say(f"trial {trial.number}: failed, {short(error, 500)}")
        self.study.tell(trial, values, skip_if_finished=True)
        told = ", ".join(f"{value:.4g}" for value in values)
        self.say(f"trial {trial.number}: {told}, {_named(trial.params)}")

    def _values(self, trial: Trial, params: Mapping[str, Any]) -> list[float]:
        shares, times, counts = list[float](), list[float](), list[int]()

        def report(planned: Plan, rows: Sequence[Epoch]) -> None:
            _mark(trial)
            if rows and self.measure is None:
                before = len(shares)
                mean = (sum(shares) + rows[-1].val_accuracy) / (before + 1)
                trial.report(mean, before * planned.config.fit.epochs + len(rows))
                if trial.should_prune():
                    raise optuna.TrialPruned

        for file in self.files:
            run = self.train(params, f"data.folder={quoted(str(file))}", runs=self.folder / "runs", report=report)
            shares.append(run.accuracy)
            counts.append(sum(run.record["data"]["val"].values()))
            if self.measure:
                answers, milliseconds = self.measure(run, read(file), params)
                shares[-1] = answers.top1
                times.append(milliseconds)
        accuracy = sum(share * count for share, count in zip(shares, counts, strict=True)) / sum(counts)
        return [accuracy, min(times)] if times else [accuracy]


def write_folds(pictures: LabelledPictures, folder: Path, count: int) -> tuple[Path, ...]:
    """Write a table for each of so many of five folds, in which a fifth of each class is `val`; return their paths.

    Pictures of the same bytes are in the same half.
    """
    order, files = sorted(pictures.pictures, key=lambda each: (each.truth, each.sha256)), []
    places = {digest: i for i, digest in enumerate(dict.fromkeys(each.sha256 for each in order))}
    for fold in range(count):
        lines = io.StringIO()
        writer = csv.writer(lines)
        writer.writerow(["path", "label", "split"])
        for each in order:
            half = "val" if places[each.sha256] % FIFTHS == fold else "train"
            writer.writerow([each.path.absolute(), pictures.labels[each.truth], half])
        files.append(folder / f"fold-{fold}.csv")
        write_whole(files[-1], lines.getvalue())
    return tuple(files)


def open_search(
    name: str, storage: str | None, space: Space, data: DataSet, folds: int, trials: int, runs: Path, say: Say,
    measure: Measure | None,
) -> Search:  # fmt: skip
    """Open a study, or begin it, in the folder `studies/<name>` of `runs`: in a journal there, or in a database.

    `storage` is SQLAlchemy's address of a database. `folds` of five are the pictures that judge. Raise `ConfigError`
    for a study of other settings, pictures or weights, or a database that cannot be reached.
    """
    folder = runs / "studies" / name
    folder.mkdir(parents=True, exist_ok=True)
    files, whole = write_folds(data.train, folder, folds), space.all()
    goals, directions = [ACCURACY, MILLISECONDS], [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    goals, directions = (goals, directions) if measure else (goals[:1], directions[:1])
    words = [*space.fixed, *map(str, space.sweeps.items()), *goals]
    digests = {name: find_weights(name, Path(file), silent).sha256 for name, file in space.weights.items()}
    about = {"words": words, "folds": folds, "pictures": data.digest, "weights": digests}
    with locked(folder / "study.lock"):
        try:
            study = optuna.create_study(
                storage=_storage(storage, folder),
                study_name=name,
                directions=directions,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
                load_if_exists=True,
            )
        except (SQLAlchemyError, ImportError, ValueError) as error:
            why = short(error)
            raise ConfigError(f"the study {name} cannot be opened ({why}); correct --storage or --study") from error
        study.set_metric_names(goals)
        if study.user_attrs.setdefault("about", about) != about:
            raise ConfigError(f"the study {name} is of other settings, pictures or weights; name another with --study")
        study.set_user_attr("about", about)
        begun = [each for each in study.get_trials(deepcopy=False) if not _is_lost(each)]
        tried = [{**each.system_attrs.get("fixed_params", {}), **each.params} for each in begun]
        for params in whole[:trials] if whole else [] if tried else [space.default()]:
            if params not in tried:
                study.enqueue_trial(params)
    return Search(study, folder, space, files, min(trials, len(whole)) if whole else trials, runs, say, measure)


def _storage(address: str | None, folder: Path) -> Any:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    if address is None:
        return optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return optuna.storages.RDBStorage(address)


def pick(trials: Sequence[FrozenTrial], max_ms: float | None, min_accuracy: float | None) -> FrozenTrial | None:
    """Return the most accurate trial within the limits, or the fastest with only `min_accuracy`; None if none is."""
    within = [
        each
        for each in trials
        if each.state is TrialState.COMPLETE
        and (max_ms is None or each.values[1] <= max_ms)
        and (min_accuracy is None or each.values[0] >= min_accuracy)
    ]
    if min_accuracy is not None and max_ms is None:
        return min(within, key=lambda each: (each.values[1], -each.values[0]), default=None)
    return max(within, key=lambda each: (each.values[0], *(-ms for ms in each.values[1:])), default=None)


def page(search: Search, done: Sequence[FrozenTrial], chosen: FrozenTrial | None) -> Page:
    """Return the report: history or front, importances, parallel coordinates as Optuna draws them, and every trial."""
    states = [each.state for each in done]
    complete, count = states.count(TrialState.COMPLETE), len(search.space.sweeps)
    figures = Figures(tuple((str(states.count(each)), each.name.lower()) for each in _DONE))
    first = (lambda each: each.values[0]) if search.measure else None
    about: Any = {"target": first, "target_name": ACCURACY}
    front: tuple[str, str, Any] = ("Front", "plot_pareto_front", {})
    history: tuple[str, str, Any] = ("History", "plot_optimization_history", about)
    charts = [front if search.measure else history]
    charts += [("Parallel coordinates", "plot_parallel_coordinate", about)] if count > 1 else []
    # Of few trials nothing is known.
    own = {"evaluator": optuna.importance.PedAnovaImportanceEvaluator()}
    charts += [("Importances", "plot_param_importances", about | own)] if count > 1 and complete > 3 else []
    blocks = [_drawn(search.study, *each) for each in charts] if complete else []
    rows = []
    for each in done:
        values = [f"{value:.4g}" for value in each.values or ()] or [""] * (2 if search.measure else 1)
        rows.append((str(each.number), each.state.name.lower(), *values, reason(each) or _named(each.params)))
    heads = ("trial", "state", ACCURACY, *([MILLISECONDS] if search.measure else ()), "settings")
    marked = frozenset(i for i, each in enumerate(done) if chosen and each.number == chosen.number)
    table = Table("All trials", heads, tuple(rows), marked)
    facts = f"{len(done)} trials, each judged by {len(search.files)} of {FIFTHS} parts of the training pictures"
    sections = Section("Result", (figures, *blocks)), Section("Trials", (table,))
    return Page(f"Search {search.study.study_name}", facts, sections)


def _drawn(study: optuna.Study, title: str, name: str, options: Mapping[str, Any]) -> Chart:
    """Return one of Optuna's figures as SVG, on white in both themes."""
    import matplotlib

    matplotlib.use("agg")
    file = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "beeline"}):
        warnings.simplefilter("ignore")
        from matplotlib import pyplot
        from optuna.visualization import matplotlib as figures

        axes = getattr(figures, name)(study, **options)
        figure = (axes if hasattr(axes, "figure") else axes[0]).figure
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)
    svg = file.getvalue()
    return Chart(lambda: svg[svg.index("<svg") :], title, f"{title}: see the table of trials")


def reason(trial: FrozenTrial) -> str | None:
    """Return why a trial failed; None for another."""
    failed = trial.state is TrialState.FAIL
    return trial.user_attrs.get("error", "its process was killed each time") if failed else None


def _is_lost(trial: FrozenTrial) -> bool:
    """Return whether the trial's process was killed and its values are tried again."""
    attrs = trial.user_attrs
    return trial.state is TrialState.FAIL and "error" not in attrs and attrs.get("attempt", 0) < _RETRIES


def _mark(trial: Trial) -> None:
    """Note in the study that this process lives and tries the trial."""
    trial.set_user_attr("seen", [platform.node(), os.getpid(), psutil.Process().create_time(), time.time()])


def _is_dead(trial: FrozenTrial) -> bool:
    """Return whether the process that tries the trial has ended: here, or for all that is known of another machine."""
    assert trial.datetime_start is not None
    host, pid, began, seen = trial.user_attrs.get("seen", ("", 0, 0, trial.datetime_start.timestamp()))
    if host != platform.node():
        return bool(time.time() - seen > _STALE_SECONDS)
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - began) > 1 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _named(params: Mapping[str, Any]) -> str:
    values = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in params.items()}
    return ", ".join(f"{key}={value}" for key, value in values.items())
