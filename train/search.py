"""A search for the best settings of a training with Optuna: the space, the trials of all processes, the report."""

from __future__ import annotations

import csv
import io
import itertools
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from beeline.errors import BeelineError, ConfigError, short
from host import Say
from host.files import is_locked, locked, try_lock, write_whole
from host.report import Chart, Figures, Page, Section, Table
from train.config import FOLDER, compose, quoted
from train.data import DataSet, LabelledPictures, read
from train.evaluate import Report
from train.plan import Plan, plan
from train.runs import Epoch, Run, find_run, find_unfinished, open_run

DEFAULTS = FOLDER.parent / "search.yaml"
ACCURACY, MILLISECONDS = "accuracy", "milliseconds"
# Keys of a space that say how a network is served, and the values of fit.distil: the default's run, and none, since
# Hydra's choices have no null.
SERVING, TEACHER, NOBODY = ("engine", "precision"), "teacher", "none"
# Each trial is judged by one fifth of the training pictures, or by several in turn.
FIFTHS = 5
# A trial on another machine that reports no epoch for twice as long is tried again.
_HEARTBEAT_SECONDS = 3600
_DONE = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
Told = Callable[[Plan, Sequence[Epoch]], None]
# Judges a run by validation pictures, served with an engine and a precision; returns milliseconds a picture, too.
Measure = Callable[[Run, DataSet, Mapping[str, Any]], tuple[Report, float]]


@dataclass(frozen=True)
class Space:
    """Overrides of `beeline train`: `fixed` words of every trial, and what is searched, by key.

    `weights` are files of starting weights by architecture; that of "" is for any other.
    """

    fixed: tuple[str, ...]
    sweeps: Mapping[str, Any]
    weights: Mapping[str, str]

    def words(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a trial. The resize follows the crop where nothing sets it."""
        given = [(key, value) for key, value in params.items() if key not in SERVING]
        given = [(key, None if (key, value) == ("fit.distil", NOBODY) else value) for key, value in given]
        words = [*self.fixed, *(f"{key}={quoted(value)}" for key, value in given)]
        keys = {word.partition("=")[0] for word in words}
        model = compose([*words, *([] if "model.resize" in keys else ["model.resize=8192"])], environ={}).model
        if "model.crop" in keys and "model.resize" not in keys:
            words.append(f"model.resize={round(model.crop * 8 / 7)}")
        file = self.weights.get(model.name, self.weights.get(""))
        return [*words, *([f"model.weights={quoted(file)}"] if file else [])]

    def default(self) -> dict[str, Any]:
        """Return the parameters of the first trial: the configuration's own values, else the first choices."""
        own, params = asdict(compose(self.fixed, environ={})), dict[str, Any]()
        for key, sweep in self.sweeps.items():
            value = OmegaConf.select(OmegaConf.create(own), key)
            if isinstance(sweep, ChoiceSweep):
                params[key] = value if value in _choices(sweep) else _choices(sweep)[0]
            elif isinstance(value, int | float):
                params[key] = min(max(value, sweep.start), sweep.end)
        return params

    def all(self) -> list[dict[str, Any]] | None:
        """Return every combination where all keys have choices, the default first; None for a space of numbers."""
        if not all(isinstance(sweep, ChoiceSweep) for sweep in self.sweeps.values()):
            return None
        rows = itertools.product(*map(_choices, self.sweeps.values()))
        return sorted((dict(zip(self.sweeps, row, strict=True)) for row in rows), key=lambda row: row != self.default())


def read_space(words: Sequence[str], objective: str, weights: Sequence[str] = ()) -> Space:
    """Return the space of `key=choice(...)` and other words; where none searches, that of `config/search.yaml`.

    `weights` are files, or NAME=FILE. Raise `ConfigError` for a word that is no override, or an unknown key.
    """
    fixed, sweeps = dict[str, str](), dict[str, Any]()
    defaults: Any = OmegaConf.load(DEFAULTS)
    own = any("choice(" in each or "interval(" in each for each in words)
    for word in [*words, *([] if own else defaults[objective])]:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise ConfigError(f"{word!r} is no override; write key=choice(one,other), or key=value") from error
        key: str = override.key_or_group
        value: Any = override.value()
        if isinstance(value, ChoiceSweep | IntervalSweep) or key in SERVING:
            sweep = value if override.is_sweep_override() else ChoiceSweep(list=[value])
            sweeps |= {} if key in fixed else {key: sweeps.get(key, sweep)}
        else:
            fixed[key] = word
    files = [(name, str(Path(file).absolute())) for name, _, file in (each.rpartition("=") for each in weights)]
    return Space(tuple(fixed.values()), sweeps, dict(files))


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
        while claimed := self._claim():
            trial, lock = claimed
            try:
                self._finish(trial)
            finally:
                os.close(lock)

    @property
    def done(self) -> list[FrozenTrial]:
        """The finished trials, without those of killed processes."""
        trials = self.study.get_trials()
        again = _again(trials)
        return [each for each in trials if each.state in _DONE and each.number not in again]

    @property
    def running(self) -> int:
        """The number of trials that others still try, or that wait."""
        return sum(not each.state.is_finished() for each in self.study.get_trials())

    def train(self, params: Mapping[str, Any], *words: str, report: Told = lambda *_: None) -> Run:
        """Return the run of these parameters: the finished one, else it is trained, from where it was interrupted."""
        if params.get("fit.distil") == TEACHER:
            # The teacher sees the same pictures as its student, so it is one for each fold.
            teacher = self.train({**self.space.default(), "fit.distil": NOBODY}, *words)
            params = {**params, "fit.distil": str(teacher.folder)}
        planned = plan([*self.space.words(params), *words], self.say)
        from train.fit import fit

        # Another process may train the same, as a teacher.
        with locked(self.folder / f"{planned.fingerprint[:16]}.lock"):
            if old := find_run(planned.fingerprint, self.runs):
                return open_run(old)
            begun = find_unfinished(planned.fingerprint, self.runs)
            try:
                return fit(planned, self.say, self.runs, begun, lambda rows: report(planned, rows))
            except optuna.TrialPruned:
                if begun := find_unfinished(planned.fingerprint, self.runs):
                    shutil.rmtree(begun)
                raise

    def _claim(self) -> tuple[Trial, int] | None:
        """Return a trial and the lock that shows that this process lives; None where enough are done or under way."""
        with locked(self.folder / "study.lock"):
            self._retry_killed()
            trials = self.study.get_trials(deepcopy=False)
            waiting = any(each.state is TrialState.WAITING for each in trials)
            if not waiting and len(trials) - len(_again(trials)) >= self.trials:
                return None
            trial = self.study.ask()
            lock = try_lock(self._lock(trial.number))
            assert lock is not None
            trial.set_user_attr("host", platform.node())
            return trial, lock

    def _retry_killed(self) -> None:
        """Queue again the trials whose process here holds no lock any more, and those of a database that are silent."""
        trials = self.study.get_trials(deepcopy=False)
        queued = _again(trials)
        for each in trials:
            is_here = each.user_attrs.get("host", platform.node()) == platform.node()
            if each.state is TrialState.RUNNING and is_here and not is_locked(self._lock(each.number)):
                # Queued first: a kill between the two loses nothing, and the next process doubles nothing.
                if each.number not in queued:
                    self.study.enqueue_trial(each.params, user_attrs={"again": each.number})
                self.study.tell(each.number, state=TrialState.FAIL)
                self.say(f"trial {each.number} was killed; it is tried again")
        optuna.storages.fail_stale_trials(self.study)

    def _lock(self, number: int) -> Path:
        return self.folder / f"trial-{number}.lock"

    def _finish(self, trial: Trial) -> None:
        """Run a trial and tell the study its values; what cannot be trained or served is a failed trial."""
        try:
            values = self._values(trial, {key: _suggest(trial, key, sweep) for key, sweep in self.space.sweeps.items()})
        except optuna.TrialPruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            return self.say(f"trial {trial.number}: pruned, {_named(trial.params)}")
        except ConfigError:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        except BeelineError as error:
            if isinstance(error.__cause__, SystemExit):
                raise
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            return self.say(f"trial {trial.number}: failed, {error}")
        self.study.tell(trial, values)
        told = ", ".join(f"{value:.4g}" for value in values)
        self.say(f"trial {trial.number}: {told}, {_named(trial.params)}")

    def _values(self, trial: Trial, params: Mapping[str, Any]) -> list[float]:
        shares, times, right, counts = list[float](), list[float](), "", list[int]()

        def report(planned: Plan, rows: Sequence[Epoch]) -> None:
            if isinstance(self.study._storage, optuna.storages.RDBStorage):
                self.study._storage.record_heartbeat(trial._trial_id)
            if self.measure is None:
                before = len(shares)
                mean = (sum(shares) + rows[-1].val_accuracy) / (before + 1)
                trial.report(mean, before * planned.config.fit.epochs + len(rows))
                if trial.should_prune():
                    raise optuna.TrialPruned

        for file in self.files:
            run = self.train(params, f"data.folder={quoted(str(file))}", report=report)
            shares.append(run.accuracy)
            counts.append(sum(run.record["data"]["val"].values()))
            if self.measure:
                answers, milliseconds = self.measure(run, read(file), params)
                shares[-1] = answers.top1
                times.append(milliseconds)
                right += "".join("01"[one.within(1)] for one in answers.judged)
        # By picture, for a paired test.
        trial.set_user_attr("right", right)
        accuracy = sum(share * count for share, count in zip(shares, counts, strict=True)) / sum(counts)
        return [accuracy, min(times)] if times else [accuracy]


def write_folds(pictures: LabelledPictures, folder: Path, count: int) -> tuple[Path, ...]:
    """Write a table for each of so many of five folds, in which a fifth of each class is `val`; return their paths."""
    order, files = sorted(pictures.pictures, key=lambda each: (each.truth, each.sha256)), []
    for fold in range(count):
        lines = io.StringIO()
        writer = csv.writer(lines)
        writer.writerow(["path", "label", "split"])
        for i, each in enumerate(order):
            half = "val" if i % FIFTHS == fold else "train"
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
    for a study of other settings or pictures, or a database that cannot be reached.
    """
    folder = runs / "studies" / name
    folder.mkdir(parents=True, exist_ok=True)
    files, whole = write_folds(data.train, folder, folds), space.all()
    goals, directions = [ACCURACY, MILLISECONDS], [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    goals, directions = (goals, directions) if measure else (goals[:1], directions[:1])
    words = [*space.fixed, *map(str, space.sweeps.items()), *goals]
    about = {"words": words, "folds": folds, "pictures": data.digest}
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
            why = short(error).split("\n")[0]
            raise ConfigError(f"the study {name} cannot be opened ({why}); correct --storage or --study") from error
        study.set_metric_names(goals)
        if study.user_attrs.setdefault("about", about) != about:
            raise ConfigError(f"the study {name} is of other settings or pictures; name another with --study")
        if not study.get_trials(deepcopy=False):
            study.set_user_attr("about", about)
            for params in (whole or [space.default()])[:trials]:
                study.enqueue_trial(params)
    return Search(study, folder, space, files, min(trials, len(whole)) if whole else trials, runs, say, measure)


def _storage(address: str | None, folder: Path) -> Any:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    if address is None:
        return optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
    return optuna.storages.RDBStorage(
        address, heartbeat_interval=_HEARTBEAT_SECONDS, heartbeat_stale_trial_callback=retry
    )


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
        error = each.user_attrs.get("error")
        rows.append((str(each.number), each.state.name.lower(), *values, error or _named(each.params)))
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


def _again(trials: Sequence[FrozenTrial]) -> set[int]:
    """Return the numbers of the trials that were queued again: by `_retry_killed`, or without a heartbeat."""
    numbers = [each.user_attrs.get("again", each.system_attrs.get("failed_trial")) for each in trials]
    return {number for number in numbers if number is not None}


def _suggest(trial: Trial, key: str, sweep: Any) -> Any:
    if isinstance(sweep, ChoiceSweep):
        return trial.suggest_categorical(key, _choices(sweep))
    if isinstance(sweep.start, int) and isinstance(sweep.end, int):
        return trial.suggest_int(key, sweep.start, sweep.end, log="log" in sweep.tags)
    return trial.suggest_float(key, sweep.start, sweep.end, log="log" in sweep.tags)


def _choices(sweep: ChoiceSweep) -> list[Any]:
    return [each.text if isinstance(each, QuotedString) else each for each in sweep.list]


def _named(params: Mapping[str, Any]) -> str:
    values = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in params.items()}
    return ", ".join(f"{key}={value}" for key, value in values.items())
