"""A search tries each set of values once, whoever is killed; reads its space from Hydra's words; and reports."""

from __future__ import annotations

import json
import os
import platform
import re
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
from train.runs import finished, open_run
from train.search import Search, open_search, page, pick, reason, write_folds
from train.space import read_space

WORDS = ["fit.rate=tag(log,interval(1e-5,1e-2))", "fit.batch=choice(6,12)"]


@pytest.fixture
def data(drawn: Path) -> DataSet:
    return read(drawn)


Opened = Callable[..., Search]


@pytest.fixture
def opened(data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Open a study whose trials train nothing: the accuracy is a function of the batch."""

    def train(search: Search, params: dict[str, Any], *words: str, **options: Any) -> Any:
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
    words = ["model.crop=choice(224,160)", "fit.distil=choice(none,teacher)", "precision=int8", "seed=3"]
    space = read_space(words, "milliseconds")
    assert space.fixed == ("seed=3",)
    default = {"model.crop": 224, "fit.distil": "none", "precision": "int8", "engine": "openvino"}
    assert space.default() == default
    space = read_space([*words, "model.name=choice(resnet18,resnet34)"], "milliseconds", ["a.pth", "resnet34=b c.pth"])
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
    key, value = next(iter(space.default().items()))
    few = read_space([f"{key}={value}"], objective)
    assert (few.sweeps.keys(), few.fixed) == (space.sweeps.keys() - {key}, (f"{key}={value}",))


@pytest.mark.parametrize(
    ("words", "objective", "weights", "says"),
    [
        (["fit.batch", *WORDS], "accuracy", [], r"'fit.batch' is no override; write key=choice\(one,other\), or key="),
        (["fit.batsh=interval(1,2)"], "accuracy", [], "unknown key fit.batsh"),
        (
            ["engine=torch", "precision=choice(fp32,int8)"],
            "milliseconds",
            [],
            "served by torch int8: choose among torch",
        ),
        (["precision=int8", *WORDS], "accuracy", [], "engine and precision need --objective accuracy,milliseconds"),
        (
            WORDS,
            "accuracy",
            ["resnet34=a.pth"],
            "--weights names resnet34, but the networks of this search are resnet18",
        ),
    ],
)
def test_a_space_that_cannot_be_tried_is_refused(
    words: list[str], objective: str, weights: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read_space(words, objective, weights)


def test_choices_may_be_written_with_commas_and_whole_numbers_stay_whole(tmp_path: Path) -> None:
    (file := tmp_path / "a=b.pth").touch()
    space = read_space(["fit.batch=8,16", "schedule.frozen=interval(1,3)"], "accuracy", [str(file)])
    assert space.sweeps.keys() == {"fit.batch", "schedule.frozen"}
    assert space.weights == {"": str(file)}
    params = space.suggest(optuna.create_study().ask())
    assert (type(params["schedule.frozen"]), type(space.default()["schedule.frozen"])) == (int, int)


def test_equal_pictures_judge_in_the_same_fold(data: DataSet, tmp_path: Path) -> None:
    first = data.train.pictures[0]
    twins = (replace(first, path=tmp_path / f"{i}.png") for i in range(4))
    same = replace(data.train, pictures=(*data.train.pictures, *twins))
    rows = [file.read_text().splitlines() for file in write_folds(same, tmp_path, 5)]
    halves = [
        {row.rpartition(",")[2] for row in fold if str(tmp_path) in row or str(first.path) in row} for fold in rows
    ]
    assert sorted(map(sorted, halves)) == [["train"]] * 4 + [["val"]]


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
    with pytest.raises(
        ConfigError, match="the study one is of other settings, pictures or weights; name another with --study"
    ):
        opened(words=["fit.batch=choice(6,8)"])


def test_a_space_of_choices_is_tried_once_each(opened: Opened) -> None:
    words = ["fit.batch=choice(6,12)", "augment=choice(light,none)"]
    opened(trials=2, words=words).work()
    search = opened(trials=50, words=words)
    assert states(search) == {"COMPLETE": 2, "WAITING": 2}
    search.work()
    tried = [tuple(each.params.values()) for each in search.done]
    assert sorted(tried) == [(6, "light"), (6, "none"), (12, "light"), (12, "none")]


def killed(search: Search, host: str = platform.node(), seen: float = 0) -> optuna.Trial:
    """Claim a trial as a process that is killed before it has asked for a value."""
    trial = search._claim()
    assert trial is not None
    # No process has such a number.
    trial.set_user_attr("seen", [host, 2**30, 0.0, time.time() - seen])
    return trial


def test_the_trial_of_a_killed_process_is_tried_again_with_its_values_and_only_once(opened: Opened) -> None:
    search, other = (opened(trials=3, words=["fit.batch=choice(6,12,18)"]) for _ in range(2))
    assert other._claim() is not None
    killed(search)
    search.work()
    again = [each.params for each in search.study.trials if "attempt" in each.user_attrs]
    assert again == [{"fit.batch": 12}]
    # The other process lives, and its trial is neither lost nor tried by two.
    assert states(search) == {"RUNNING": 1, "FAIL": 1, "COMPLETE": 2}
    assert (len(search.done), search.running) == (2, 1)


def test_a_trial_of_another_machine_is_tried_again_after_two_silent_hours(opened: Opened) -> None:
    search = opened(trials=2)
    alive, silent = killed(search, "elsewhere", 7100), killed(search, "elsewhere", 7300)
    search.work()
    found = [(each.state.name, each.user_attrs.get("attempt")) for each in search.study.trials]
    assert (alive.number, silent.number) == (0, 1)
    assert found == [("RUNNING", None), ("FAIL", None), ("COMPLETE", 1)]


def test_a_trial_that_kills_its_process_is_tried_three_times(opened: Opened) -> None:
    search = opened(trials=2)
    for _ in range(3):
        killed(search)
    search.work()
    assert states(search) == {"FAIL": 3, "COMPLETE": 1}
    assert [reason(each) for each in search.done] == ["its process was killed each time", None]


@pytest.mark.parametrize("kind", [ArchiveError, RuntimeError, MemoryError])
def test_a_trial_that_cannot_be_trained_is_a_failed_one_with_its_reason(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise kind("the gate refuses it")

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
    assert not list(tmp_path.rglob("*-squeezenet1_1-*"))


def called(environ: dict[str, str], runs: Path, *words: str) -> tuple[Any, dict[str, Any]]:
    """Call the command with a tiny network; return its result and its values."""
    app = typer.Typer()
    app.command()(search)
    own = ["model.name=squeezenet1_1", "fit.epochs=1", "--json", "--runs", str(runs), "--trials", "2"]
    own += ["--data", environ["BEELINE_DATA"], "--weights", environ["BEELINE_WEIGHTS"]]
    done = CliRunner().invoke(app, [*own, *words])
    return done, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def test_the_pick_of_a_search_for_accuracy_is_the_latest_run(environ: dict[str, str], tmp_path: Path) -> None:
    done, values = called(environ, tmp_path, "model.crop=48", "fit.batch=choice(6,12)", "seed=2")
    assert done.exit_code == 0, done.output
    assert (newest := next(finished(tmp_path))).folder == Path(values["run"])
    assert newest.config().fit.batch == values["settings"]["fit.batch"]
    first = values["settings"] == {"fit.batch": 6}
    assert newest.record["search"].startswith("picked by a search of 2 trials" + (", the first" if first else "; comp"))
    assert len(list(tmp_path.glob("studies/search/runs/*/run.json"))) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-ms", "0"], "max-ms"),
        (["--min-accuracy", "94"], "min-accuracy"),
        (["fit.batch=choice(70000,6)"], "fit.batch is 70000; allowed: 1 to 65536"),
        (["fit.batch=choice(6,12)"], "no trial of 2 succeeded, see .*; the first failed: no memory"),
    ],
)
def test_a_search_without_a_result_says_why(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(Search, "train", train)
    done, _ = called(environ, tmp_path, "model.crop=48", *words)
    assert done.exit_code
    assert re.search(says, f"{done.output}{done.exception}")


def test_the_front_picks_a_run_within_the_limits_whose_card_says_what_was_given_up(
    environ: dict[str, str], tmp_path: Path
) -> None:
    words = ["model.crop=choice(64,72)", "--objective", "accuracy,milliseconds"]
    done, values = called(environ, tmp_path, *words, "--max-ms", "10000")
    assert done.exit_code == 0, done.output
    run = open_run(Path(values["run"]))
    recipe = str(ModelSpec.load(run.export).provenance.recipe)
    assert recipe == values["sentence"] == run.record["search"]
    assert "picked by a search of 2 trials" in recipe
    assert "Front" in Path(values["report"]).read_text()
    assert values["milliseconds"] > 0
    none, values = called(environ, tmp_path, *words, "--max-ms", "0.0001")
    assert (none.exit_code, "no trial is within" in none.output, values["trials"]) == (1, False, 2)


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
    second.stdout.close()
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
    storage = optuna.storages.RDBStorage(postgresql)
    complete(optuna.load_study(study_name="search", storage=storage).trials)
    storage.engine.dispose()


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
