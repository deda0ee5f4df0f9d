"""A comparison: order of turns, rows, errors, verdicts, A/A, and how it goes on after an interruption."""

import json
import random
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from beeline.errors import ArchiveError, BeelineError
from bench.compare import comparison
from bench.compare.comparison import Request, compare, prepared, run
from bench.compare.peers import Peer, raw
from bench.compare.server import Setup
from bench.pictures import Pictures
from bench.record import FASTER, SAME, SLOWER, Journal, Record, judge
from bench.report import text
from bench.tune.grid import Settings
from host.signals import Interrupted
from serve.config import Overrides
from tests.conftest import BLUE, GREEN, RED

PICTURES = Pictures("p", ("a.png",), (RED,))
SETUP = Setup(Path("m.mar"), Path(), Path(), "fp32", PICTURES, 3, 1.5, agreement=PICTURES, labels=["red"])
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")


@dataclass(frozen=True)
class Fake(Peer):
    """A peer that is never started; `broken` is why it cannot be prepared."""

    broken: str | None = None

    def prepare(self, say: Callable[[str], None]) -> None:
        if self.broken:
            raise BeelineError(self.broken)


def fake(name: str, broken: str | None = None) -> Fake:
    return Fake(name, Settings(8, 2, 5, 0), raw("/"), pattern=f"pattern of {name}", broken=broken)


class Turns:
    """Stands for real turns: rates by name, the order in which they were taken, and an error or a signal."""

    def __init__(self, **rates: float) -> None:
        self.rates = rates
        self.order: list[str] = []
        self.asked: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.end_after: int | None = None

    def __call__(self, peer: Peer, setup: Setup) -> dict[str, Any]:
        if self.end_after is not None and len(self.order) >= self.end_after:
            raise Interrupted(signal.SIGINT)
        self.order.append(peer.name)
        if setup.agreement:
            self.asked.append(peer.name)
        if peer.name in self.fail:
            raise self.fail[peer.name]
        figures = {"memory_mb": 100.0, "ready_s": 1.0, "threads": 1, "agreement": 1.0 if setup.agreement else None}
        return {"per_second": self.rates[peer.name], "p95_ms": 20.0, "failed": 0, "restarts": 0, **figures}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.job(tmp_path / "compare.journal", {})


def test_servers_take_turns_and_the_first_of_ours_is_entered_twice(journal: Journal) -> None:
    turns = Turns(stock=10, other=20, **{"ours-mine": 100})
    peers = [fake("stock"), fake("other"), fake("ours-mine")]
    result = run(peers, SETUP, 5, journal, lambda line: None, turns)
    assert turns.order == ["stock", "other", "ours-mine", "ours-mine"] * 5
    assert turns.asked == ["stock", "other", "ours-mine"]
    stock, other, mine = result["rows"]
    assert (other["ratio"], other["interval"], other["verdict"]) == (2, [2, 2], FASTER)
    assert other["compared_with"] == "stock"
    # Never across classes.
    assert (mine["ratio"], mine["verdict"], mine["compared_with"]) == (1, SAME, "ours-mine")
    assert (stock["per_second"], stock["agreement"], stock["memory_mb"]) == ([10.0] * 5, 1.0, 100.0)
    again = result["aa"]
    assert (again["server"], again["verdict"], again["ratio"], again["agreement"]) == ("ours-mine", SAME, 1, None)
    assert (result["clients"], result["rounds"], result["seconds"], result["interrupted"]) == (3, 5, 1.5, False)
    json.dumps(result, allow_nan=False)
    assert re.search("ours-mine, again .* no difference", text(Record.now("compare", "", result, None)))


def test_a_server_that_cannot_run_is_a_row_with_its_error_and_the_others_go_on(journal: Journal) -> None:
    turns = Turns(stock=10, fast=20, **{"ours-mine": 30})
    turns.fail["stock"] = RuntimeError("unforeseen")
    peers = [fake("stock"), fake("gone", "no such wheel"), fake("fast"), fake("ours-mine")]
    result = run(peers, SETUP, 2, journal, lambda line: None, turns)
    stock, gone, fast, mine = result["rows"]
    assert (stock["error"], gone["error"], mine["error"]) == ("RuntimeError: unforeseen", "no such wheel", None)
    assert stock["per_second"] == gone["per_second"] == []
    assert (gone["ratio"], gone["verdict"], gone["memory_mb"]) == (None, None, None)
    # The first that ran is what its class is compared with.
    assert fast["compared_with"] == "fast"
    assert turns.order.count("stock") == 1
    assert re.search("(?m)^  gone .* no such wheel$", text(Record.now("compare", "", result, None)))


def test_an_interrupted_comparison_has_its_turns_so_far_and_goes_on_from_there(journal: Journal) -> None:
    turns = Turns(stock=10, **{"ours-mine": 30})
    turns.end_after, turns.fail["stock"] = 4, RuntimeError("unforeseen")
    peers, said = [fake("stock"), fake("ours-mine")], list[str]()
    first = run(peers, SETUP, 3, journal, said.append, turns)
    assert first["interrupted"]
    assert [len(row["per_second"]) for row in (*first["rows"], first["aa"])] == [0, 2, 1]
    assert said[-1] == "interrupted (SIGINT); the turns so far count, and the same command goes on from there"
    turns.end_after = None
    second = run(peers, SETUP, 3, Journal.job(journal.path, {}), said.append, turns)
    assert not second["interrupted"]
    assert [len(row["per_second"]) for row in (*second["rows"], second["aa"])] == [0, 3, 3]
    # A server that failed is not tried again: its rounds would be far from those of the others.
    assert turns.order == ["stock", *["ours-mine"] * 6]
    assert second["rows"][0]["error"] == "RuntimeError: unforeseen"


@pytest.fixture
def request_(colour_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A comparison of the archive of colours, with a state folder of its own."""
    monkeypatch.setenv("BEELINE_STATE", str(tmp_path / "state"))
    for name, body in (("0.png", RED), ("1.png", GREEN), ("2.png", BLUE)):
        (tmp_path / name).write_bytes(body)
    return Request(colour_archive, tmp_path / "0.png", agreement=tmp_path, servers=("ours-mms",))


def test_the_archive_is_unpacked_and_removed_and_its_pictures_have_reference_labels(request_: Request) -> None:
    with prepared(request_) as setup:
        assert (setup.precision, setup.labels) == ("fp32", ["red", "green", "blue"])
        assert setup.pictures.names == ("0.png",)
        assert setup.model.is_dir()
    assert not setup.model.exists()


def test_the_same_comparison_goes_on_with_its_journal_and_another_one_begins_its_own(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def run(peers: object, setup: object, rounds: int, journal: Journal, say: object) -> dict[str, Any]:
        kept.append(len(journal.rows))
        journal.add("ours-mms 1", {})
        return {"interrupted": True}

    monkeypatch.setattr(comparison, "run", run)
    for request in (request_, replace(request_, rounds=7), replace(request_, clients=9)):
        record, path = compare(request, lambda line: None)
    assert kept == [0, 1, 0]
    assert path.name == f"compare-{request_.archive.stem}.journal"
    assert record.kind == "compare"


def test_our_settings_are_those_of_serve_up_and_the_command_line(request_: Request) -> None:
    peers = replace(request_, overrides=Overrides(16, 1, 7)).peers()
    ours = next(peer for peer in peers if peer.name == "ours-ray")
    assert (ours.settings.batch_size, ours.settings.workers, ours.settings.max_batch_delay) == (16, 1, 7)


def test_an_unknown_server_is_refused_before_anything_starts(request_: Request) -> None:
    with pytest.raises(BeelineError, match="did you mean 'mosec'"):
        compare(replace(request_, servers=("mosek",)), print)


def test_a_file_that_is_no_archive_is_refused(request_: Request, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError), prepared(replace(request_, archive=tmp_path / "none.mar")):
        pass


def test_a_server_against_itself_is_no_difference_on_a_machine_whose_speed_wanders() -> None:
    source = random.Random(0)
    rounds = [[100 * source.lognormvariate(0, 0.1) for _ in range(5)] for _ in range(800)]
    verdicts = [judge(one, other)["verdict"] for one, other in zip(rounds[::2], rounds[1::2], strict=True)]
    # All five on one side of 1: two of 32 chances, less what the margin takes.
    assert 1 - verdicts.count(SAME) / 400 < 0.08


SLOWING = [100.0, 80.0, 60.0, 50.0, 40.0]
DOUBLE = [2 * rate for rate in SLOWING]


@pytest.mark.parametrize(
    ("rates", "others", "ratio", "verdict"),
    [
        pytest.param(DOUBLE, SLOWING, 2, FASTER, id="on a machine that slows down"),
        pytest.param(SLOWING, DOUBLE, 0.5, SLOWER, id="slower"),
        pytest.param([200.0] * 8 + [1.0], [100.0] * 9, 2, FASTER, id="one wild round"),
        pytest.param([101.0] * 9, [100.0] * 9, 1.01, SAME, id="within the margin"),
        pytest.param([300.0] * 4, [100.0] * 4, 3, SAME, id="too few rounds"),
        pytest.param([200.0] * 2, [100.0, 100.0, 1.0], 2, SAME, id="a round without both"),
        pytest.param([], [100.0], None, None, id="no round"),
        pytest.param([100.0], [0.0], None, None, id="nothing answered"),
    ],
)
def test_a_verdict_is_of_the_rounds_ratios(
    rates: list[float], others: list[float], ratio: float | None, verdict: str | None
) -> None:
    judged = judge(rates, others)
    assert (judged["ratio"], judged["verdict"]) == (ratio, verdict)
    assert (judged["interval"] is None) == (ratio is None)
