"""A comparison's rounds: order, rows, errors, verdicts, the same server twice, being asked to end."""

import json
import random
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from beeline.errors import ArchiveError, BeelineError, ConfigError
from bench.compare import torchscript
from bench.compare.comparison import FASTER, SAME, SLOWER, Load, Measurement, Request, compare, judge, prepared, run
from bench.compare.peers import OURS, Numbers, Peer, raw
from bench.compare.server import Bench
from bench.pictures import Pictures
from bench.record import Record
from bench.report import text
from host import ROOT
from host.signals import Interrupted
from tests.conftest import BLUE, GREEN, RED

CONFIG = ROOT / "config" / "config.properties"
LOAD = Load(Pictures("p", ("a.png",), (RED,)), clients=3, seconds=1.5)
ASKED = replace(LOAD, check=[(RED, "red")])


@dataclass(frozen=True)
class Fake(Peer):
    """A peer that is never started; `broken` is why it cannot be prepared."""

    broken: str | None = None

    def prepare(self, say: Callable[[str], None]) -> None:
        if self.broken:
            raise BeelineError(self.broken)


def fake(name: str, broken: str | None = None) -> Fake:
    return Fake(name, f"pattern of {name}", Numbers(8, 2, 5), raw("/"), broken=broken)


BENCH = Bench(Path("m.mar"), "m", "fp32", 3, Path(), CONFIG)


class Turns:
    """Stands for real turns: rates by name, the order in which they were asked for, and an error or a signal."""

    def __init__(self, **rates: float) -> None:
        self.rates = rates
        self.order: list[str] = []
        self.asked: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.end_after: int | None = None

    def __call__(self, peer: Peer, bench: Bench, load: Load) -> Measurement:
        self.order.append(peer.name)
        if load.check:
            self.asked.append(peer.name)
        if self.end_after is not None and len(self.order) > self.end_after:
            raise Interrupted(signal.SIGINT)
        if peer.name in self.fail:
            raise self.fail[peer.name]
        return Measurement(self.rates[peer.name], 20.0, 0, 100.0, 1.0, 1, 1.0 if load.check else None)


def test_servers_take_turns_and_one_of_ours_is_entered_twice() -> None:
    turns = Turns(stock=10, other=20, **{"ours-mine": 100})
    peers = [fake("stock"), fake("other"), fake("ours-mine")]
    found = run(peers, BENCH, ASKED, 5, lambda line: None, turns)
    assert turns.order == ["stock", "other", "ours-mine", "ours-mine"] * 5
    assert turns.asked == ["stock", "other", "ours-mine"]
    stock, other, mine = found["rows"]
    assert (other["ratio"], other["interval"], other["verdict"]) == (2, [2, 2], FASTER)
    assert other["compared_with"] == "stock"
    # Never across classes.
    assert (mine["ratio"], mine["verdict"], mine["compared_with"]) == (1, SAME, "ours-mine")
    assert stock["per_second"] == [10.0] * 5
    assert (found["aa"]["server"], found["aa"]["verdict"], found["aa"]["ratio"]) == ("ours-mine", SAME, 1)
    assert (found["clients"], found["rounds"], found["seconds"], found["interrupted"]) == (3, 5, 1.5, False)
    json.dumps(found, allow_nan=False)
    assert re.search("ours-mine, again .* no difference", text(Record.now("compare", "", found, None)))


def test_a_server_that_cannot_run_is_a_row_with_its_error_and_the_others_go_on() -> None:
    turns = Turns(stock=10, fast=20, **{"ours-mine": 30})
    turns.fail["stock"] = RuntimeError("what nobody foresaw")
    peers = [fake("stock"), fake("gone", "no such wheel"), fake("fast"), fake("ours-mine")]
    found = run(peers, BENCH, LOAD, 2, lambda line: None, turns)
    stock, gone, fast, mine = found["rows"]
    assert stock["error"] == "RuntimeError: what nobody foresaw"
    assert gone["error"] == "no such wheel"
    assert stock["per_second"] == gone["per_second"] == []
    assert (gone["ratio"], gone["verdict"], gone["memory_mb"]) == (None, None, None)
    # The first that ran is what its class is compared with.
    assert fast["compared_with"] == "fast"
    assert mine["error"] is None
    assert turns.order.count("stock") == 1
    assert re.search("(?m)^  gone .* no such wheel$", text(Record.now("compare", "", found, None)))


def test_asked_to_end_the_rounds_so_far_are_the_result() -> None:
    turns = Turns(stock=10, **{"ours-mine": 30})
    turns.end_after = 4
    said: list[str] = []
    found = run([fake("stock"), fake("ours-mine")], BENCH, LOAD, 9, said.append, turns)
    assert found["interrupted"]
    assert [len(row["per_second"]) for row in found["rows"]] == [2, 1]
    assert said[-1] == "stopped (SIGINT); the rounds so far count"


def test_the_archive_is_unpacked_and_removed_and_its_pictures_have_reference_labels(colour_archive: Path) -> None:
    pictures = Pictures("p", ("0.png", "1.png", "2.png"), (RED, GREEN, BLUE))
    with prepared(colour_archive, CONFIG) as bench:
        assert (bench.name, bench.precision, bench.labels) == ("colours", "fp32", 3)
        assert torchscript.labels(bench.model, pictures) == ["red", "green", "blue"]
        folder = bench.model
        assert folder.is_dir()
    assert not folder.exists()
    assert OURS not in (fake("stock").kind, fake("our").kind)


def test_what_is_no_archive_of_ours_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError), prepared(tmp_path / "none.mar", CONFIG):
        pass


def test_our_numbers_are_those_of_serve_up_and_the_command_line(colour_archive: Path) -> None:
    from serve.config import Overrides

    request = Request(colour_archive, colour_archive, overrides=Overrides(16, 1, 7))
    ours = next(peer for peer in request.peers() if peer.name == "ours-ray")
    assert (ours.numbers.batch, ours.numbers.workers, ours.numbers.delay_ms) == (16, 1, 7)
    assert request.peers()[0].name == "torchserve"


def test_what_is_impossible_is_refused_before_anything_starts(colour_archive: Path) -> None:
    with pytest.raises(ConfigError, match="--rounds is 0"):
        compare(Request(colour_archive, colour_archive, rounds=0), print)
    with pytest.raises(BeelineError, match="did you mean 'mosec'"):
        compare(Request(colour_archive, colour_archive, servers=("mosek",)), print)


def rounds(count: int, seed: int) -> list[float]:
    """Rates of a server on a machine whose speed wanders."""
    source = random.Random(seed)
    return [100 * source.lognormvariate(0, 0.1) for _ in range(count)]


def word(rates: list[float], others: list[float]) -> object:
    return judge(rates, others)["verdict"]


def test_a_server_against_itself_is_no_difference() -> None:
    words = [word(rounds(5, 2 * seed), rounds(5, 2 * seed + 1)) for seed in range(400)]
    # All five on one side of 1: two of 32 chances, less what the margin takes.
    assert 1 - words.count(SAME) / 400 < 0.08
    # A difference within the margin is none.
    assert word([101.0] * 9, [100.0] * 9) == SAME


def test_a_server_that_wins_is_faster_also_on_a_machine_that_slows_down_or_has_one_wild_round() -> None:
    slow, fast = rounds(7, 1), [3 * rate for rate in rounds(7, 2)]
    assert (word(fast, slow), word(slow, fast)) == (FASTER, SLOWER)
    drift = [100.0, 80.0, 60.0, 50.0, 40.0]
    assert judge([2 * rate for rate in drift], drift) == {"ratio": 2, "interval": [2, 2], "verdict": FASTER}
    assert word([200.0] * 8 + [1.0], [100.0] * 9) == FASTER


@pytest.mark.parametrize("count", [1, 4])
def test_few_rounds_prove_nothing(count: int) -> None:
    verdict = judge([300.0] * count, [100.0] * count)
    assert (verdict["verdict"], verdict["ratio"]) == (SAME, 3)


def test_rounds_without_both_are_left_out() -> None:
    assert [judge([], [100.0])["ratio"], judge([100.0], [0.0])["verdict"]] == [None, None]
    assert judge([200.0, 200.0], [100.0, 100.0, 1.0])["ratio"] == 2
