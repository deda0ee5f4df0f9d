"""A search tries each set of values once, whoever is killed; reads its space from Hydra's words; and reports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import typer
from optuna.trial import TrialState
from typer.testing import CliRunner

from beeline.errors import ArchiveError, ConfigError
from beeline.spec import ModelSpec
from cli.search import search
from host import silent
from tests.conftest import ROOT
from train.config import compose
from train.data import DataSet, read
from train.runs import open_run
from train.search import Search, open_search, page, pick, read_space, write_folds

WORDS = ["fit.rate=tag(log,interval(1e-5,1e-2))", "fit.batch=choice(6,12)"]


@pytest.fixture
def data(drawn: Path) -> DataSet:
    return read(drawn)


Opened = Callable[..., Search]


@pytest.fixture
def opened(data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Open a study whose trials train nothing: the accuracy is a function of the batch."""

    def train(search: Search, params: dict[str, Any], *words: str, report: Any) -> Any:
        return SimpleNamespace(accuracy=params["fit.batch"] / 24, record={"data": {"val": {"a": 2, "b": 2}}})

    monkeypatch.setattr(Search, "train", train)

    def opened(trials: int = 6, words: list[str] = WORDS, name: str = "one", **options: Any) -> Search:
        space = read_space(words, "accuracy")
        options = {"storage": None, "folds": 1, "measure": None} | options
        return open_search(name, space=space, data=data, trials=trials, runs=tmp_path, say=silent, **options)

    return opened


def states(search: Search) -> Counter[str]:
    return Counter(each.state.name for each in search.study.get_trials())


def test_a_space_is_read_from_hydras_words_and_a_trial_gives_words_for_train() -> None:
    space = read_space(["model.crop=choice(224,160)", "fit.distil=choice(none,teacher)", "precision=int8", "seed=3"],
                       "milliseconds", ["a.pth", "resnet34=b c.pth"])  # fmt: skip
    assert space.fixed == ("seed=3",)
    assert space.default() == {"model.crop": 224, "fit.distil": "none", "precision": "int8"}
    config = compose(space.words({"model.crop": 160, "fit.distil": "none", "precision": "int8"}), environ={})
    assert (config.model.crop, config.model.resize, config.fit.distil, config.seed) == (160, 183, None, 3)
    assert str(config.model.weights).endswith("/a.pth")
    config = compose(space.words({"model.name": "resnet34", "fit.distil": "a run, one"}), environ={})
    assert (config.fit.distil, Path(str(config.model.weights)).name) == ("a run, one", "b c.pth")


@pytest.mark.parametrize("objective", ["accuracy", "milliseconds"])
def test_the_space_of_the_file_begins_with_the_configuration_as_it_is(objective: str) -> None:
    space = read_space(["fit.epochs=2"], objective)
    own = compose(["fit.epochs=2"], environ={})
    first = compose(space.words(space.default()), environ={})
    assert replace(first, model=own.model) == own
    assert first.model.crop == own.model.crop
    rows = space.all()
    assert rows is None or (rows[0] == space.default() and len(rows) == len({str(row) for row in rows}) == 16)
    assert read_space(["fit.batch=4"], "accuracy").sweeps.keys() == space.sweeps.keys() - {"fit.batch"} or rows


def test_a_word_that_is_no_override_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'fit.batch' is no override; write key=choice\(one,other\), or key=value"):
        read_space(["fit.batch", *WORDS], "accuracy")


def test_each_training_picture_judges_once_in_five_folds(data: DataSet, tmp_path: Path) -> None:
    folds = [read(file) for file in write_folds(data.train, tmp_path, 5)]
    judged = Counter(each.path for fold in folds for each in fold.val.pictures)
    assert judged == Counter(each.path.absolute() for each in data.train.pictures)
    assert all(set(fold.val.counts().values()) <= {1, 2} for fold in folds)


def test_so_many_trials_are_done_and_the_same_command_goes_on(opened: Opened) -> None:
    opened(trials=4).work()
    search = opened(trials=6)
    assert states(search) == {"COMPLETE": 4}
    search.work()
    assert states(search) == {"COMPLETE": 6}
    assert not search.running
    assert search.study.trials[0].params == {"fit.rate": 0.0003, "fit.batch": 6}
    with pytest.raises(ConfigError, match="the study one is of other settings or pictures; name another with --study"):
        opened(words=["fit.batch=choice(6,8)"])


def test_a_space_of_choices_is_tried_once_each(opened: Opened) -> None:
    search = opened(trials=50, words=["fit.batch=choice(6,12)", "augment=choice(light,none)"])
    search.work()
    tried = [tuple(each.params.values()) for each in search.done]
    assert sorted(tried) == [(6, "light"), (6, "none"), (12, "light"), (12, "none")]


def test_the_trial_of_a_killed_process_is_tried_again_and_only_once(opened: Opened) -> None:
    search, other = opened(), opened()
    claimed = search._claim()
    assert claimed is not None
    trial, lock = claimed
    assert other._claim() is not None
    assert states(search) == {"RUNNING": 2}
    params = {key: trial.suggest_categorical(key, [6, 12]) for key in ("fit.batch",)}
    os.close(lock)
    # A process that was killed between its two steps has queued the trial already.
    search.study.enqueue_trial({"fit.batch": params["fit.batch"]}, user_attrs={"again": trial.number})
    search.work()
    numbers = [each.user_attrs["again"] for each in search.study.trials if "again" in each.user_attrs]
    assert numbers == [trial.number]
    assert states(search)["FAIL"] == 1
    # The other process still holds its trial, which is neither lost nor tried by two.
    assert (states(search)["RUNNING"], len(search.done), search.running) == (1, 5, 1)


def test_a_trial_that_cannot_be_trained_is_a_failed_one_with_its_reason(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise ArchiveError("the gate refuses it")

    search = opened(trials=2)
    monkeypatch.setattr(Search, "train", train)
    search.work()
    assert states(search) == {"FAIL": 2}
    assert "the gate refuses it" in page(search, search.done, None).html()


def test_the_report_shows_history_importances_and_parallel_coordinates(opened: Opened) -> None:
    search = opened(trials=8)
    search.work()
    html = page(search, search.done, pick(search.done, None, None)).html()
    assert [html.count(name) > 0 for name in ("History", "Parallel coordinates", "Importances")] == [True] * 3
    assert html.count("<svg") == 3
    assert 'class="marked"' in html
    assert "fit.batch=12" in html


def test_the_pick_is_within_the_limits_and_ties_go_to_the_faster() -> None:
    values = [(0.95, 8.0), (0.94, 4.0), (0.94, 3.0), (0.90, 1.0)]
    trials = [optuna.create_trial(state=TrialState.COMPLETE, values=list(each)) for each in values]

    def chosen(*limits: float | None) -> list[float] | None:
        trial = pick(trials, *limits)
        return None if trial is None else trial.values

    assert chosen(None, None) == [0.95, 8.0]
    assert chosen(5.0, None) == [0.94, 3.0]
    assert chosen(None, 0.9) == [0.90, 1.0]
    assert chosen(5.0, 0.94) == [0.94, 3.0]
    assert chosen(0.5, None) is None


def test_a_pruned_trial_leaves_no_run(
    data: DataSet, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: True)
    words = ["model.name=squeezenet1_1", "model.crop=48", "fit.epochs=2", "fit.batch=choice(6,12)"]
    space = read_space(words, "accuracy", [environ["BEELINE_WEIGHTS"]])
    search = open_search("pruned", None, space, data, 1, 1, tmp_path, silent, None)
    search.work()
    assert states(search) == {"PRUNED": 1}
    assert not list(tmp_path.glob("*-squeezenet1_1-*"))


def test_the_front_picks_a_run_within_the_limits_whose_card_says_what_was_given_up(
    environ: dict[str, str], tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(search)
    words = ["model.name=squeezenet1_1", "fit.epochs=1", "model.crop=choice(64,72)", "--json"]
    words += ["--objective", "accuracy,milliseconds", "--runs", str(tmp_path), "--data", environ["BEELINE_DATA"]]
    words += ["--weights", environ["BEELINE_WEIGHTS"]]
    done = CliRunner().invoke(app, [*words, "--max-ms", "10000"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout.splitlines()[-1])
    run = open_run(Path(values["run"]))
    recipe = str(ModelSpec.load(run.export).provenance.recipe)
    assert recipe == values["sentence"] == run.record["search"]
    assert "picked by a search of 2 trials; compared with squeezenet1_1 at its default settings" in recipe
    assert "Front" in Path(values["report"]).read_text()
    assert values["milliseconds"] > 0
    none = CliRunner().invoke(app, [*words, "--min-accuracy", "1.1"])
    assert (none.exit_code, "no trial is within" in none.output) == (1, False)
    assert json.loads(none.stdout.splitlines()[-1])["trials"] == 2


def command(environ: dict[str, str], runs: Path, *words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "cli", "search", "model.name=squeezenet1_1", "model.crop=48", "fit.epochs=2", *WORDS]
    line += ["--runs", str(runs), "--trials", "4", *words]
    own = os.environ | environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_one_of_two(environ: dict[str, str], runs: Path, *words: str) -> tuple[list[str], Path]:
    """Kill one of two processes in a trial, start a third, and return what the two that end say."""
    first, second = (command(environ, runs, *words) for _ in range(2))
    assert second.stdout is not None
    for line in second.stdout:
        if line.startswith("head:"):
            break
    second.send_signal(signal.SIGKILL)
    second.wait()
    time.sleep(0.1)
    third = command(environ, runs, *words)
    said = [each.communicate(timeout=300)[0] for each in (first, third)]
    assert [each.returncode for each in (first, third)] == [0, 0], said
    return said, runs / "studies"


def complete(trials: list[optuna.trial.FrozenTrial]) -> None:
    """Check that four trials are done, and that only the killed one's values were tried again."""
    failed = [each.params for each in trials if each.state is TrialState.FAIL]
    done = [each.params for each in trials if each.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert (len(failed), len(done), len(trials)) == (1, 4, 5)
    assert done.count(failed[0]) == 1
    assert all(each in done for each in failed)


@pytest.fixture
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of Debian's package on a Unix socket, run by an ordinary user; yield its address."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="postgresql-") as name:
        folder, user = Path(name), ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if user:
            shutil.chown(folder, "postgres")

        def run(program: str, *words: str) -> None:
            line = [*user, str(programs[-1] / program), "-D", str(folder / "data"), *words]
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL, timeout=60)

        run("initdb", "-A", "trust", "-U", "beeline")
        options = f"-k {folder} -c listen_addresses=''"
        run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        yield f"postgresql+psycopg://beeline@/postgres?host={folder}"
        run("pg_ctl", "-m", "fast", "stop")


@pytest.mark.server
def test_two_processes_on_postgresql_lose_and_double_no_trial(
    environ: dict[str, str], tmp_path: Path, postgresql: str
) -> None:
    kill_one_of_two(environ, tmp_path, "--storage", postgresql)
    complete(optuna.load_study(study_name="search", storage=postgresql).trials)


def test_a_database_that_is_not_there_is_named(opened: Opened) -> None:
    with pytest.raises(ConfigError, match=r"^the study one cannot be opened \(.*; correct --storage or --study$"):
        opened(storage="postgresql+psycopg://beeline:secret@/postgres?host=/nowhere")
    with pytest.raises(ConfigError, match=r"the study one cannot be opened \(.*nosuch.*; correct --storage or --study"):
        opened(storage="nosuch://localhost/a")


@pytest.mark.server
def test_two_processes_on_one_journal_lose_and_double_no_trial(environ: dict[str, str], tmp_path: Path) -> None:
    said, folder = kill_one_of_two(environ, tmp_path)
    assert any("was killed; it is tried again" in each for each in said)
    storage = optuna.storages.journal.JournalFileBackend(str(folder / "search" / "journal.log"))
    complete(optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(storage)).trials)
    assert any("picked by a search of 4 trials" in each for each in said)
