"""The whole measurement: the client's own ceiling, the load, another tool's turn, thresholds, one record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from beeline.errors import Undetermined
from bench import record
from bench.load import ceiling
from bench.load.crosscheck import CrossCheck, cross_check, tool_for
from bench.load.live import watching
from bench.load.outcome import Outcome
from bench.load.plan import Plan
from bench.load.run import run
from bench.load.target import answer_bytes
from bench.load.text import text
from bench.load.threshold import Threshold, Verdict
from bench.record import Record, without_user
from host import signals


@dataclass(frozen=True)
class Asked:
    """What to measure: the load, what must not be, and whether another tool is to do the same."""

    plan: Plan
    thresholds: tuple[Threshold, ...] = ()
    cross_check: bool = False


@dataclass(frozen=True)
class Measured:
    """The record, its text for people, and the command's exit code."""

    record: Record
    text: str
    exit_code: int


def measure(asked: Asked, console: Console) -> Measured:
    """Measure, and show it on the console meanwhile; Ctrl-C ends it with what was measured until then.

    Raises:
        BeelineError: when the address is wrong. Undetermined: when nothing answers, the other tool is not there,
            or it was interrupted before anything was measured.
    """
    plan = asked.plan
    if asked.cross_check:
        tool_for(plan)
    started, outcome = record.utc(), Outcome(plan)
    own: ceiling.Ceiling | None = None
    checked: CrossCheck | None = None
    code = 0
    with signals.as_exceptions():
        try:
            size = answer_bytes(plan)
            own = ceiling.measure(plan, size)
            console.print(_announce(plan, own), markup=False)
            with watching(console) as watch:
                run(plan, watch, outcome)
            if asked.cross_check:
                checked = _cross_check(outcome, console)
        except signals.Interrupted as ended:
            code = ended.exit_code
    if own is None or not outcome.seconds:
        raise Undetermined("interrupted before anything was measured; let it run longer")
    found, limit = outcome.summary(), ceiling.limits(outcome, own)
    verdicts = [threshold.judge(found) for threshold in asked.thresholds]
    values = {
        **found,
        "url": without_user(plan.url),
        "thresholds": [asdict(verdict) for verdict in verdicts],
        "ceiling_per_second": own.per_second,
        "client_limited": limit is not None,
        "crosscheck": None if checked is None else asdict(checked),
        "sentence": outcome.sentence(limit),
    }
    said = text(values["sentence"], found, own.per_second, verdicts, checked)
    made = Record.now("load", _command(asked), values, plan.pictures, started=started)
    code = code or _exit_code(asked.thresholds, verdicts, found, limit)
    return Measured(made, said, code or (2 if asked.cross_check and checked is None else 0))


def _cross_check(outcome: Outcome, console: Console) -> CrossCheck | None:
    """Let the other tool do the same; None, and the reason on the console, where it cannot."""
    plan, latency = outcome.plan, outcome.summary()["p50_ms"]
    console.print(f"{tool_for(plan)} and this client take turns", markup=False)
    try:
        if latency is None:
            raise Undetermined("there was no good answer, and so nothing to cross-check")
        return cross_check(plan, latency / 1000)
    except Undetermined as error:
        console.print(f"no cross-check: {error}", markup=False)
        return None


def _announce(plan: Plan, own: ceiling.Ceiling) -> str:
    how = f"{plan.clients} clients" if plan.rate is None else f"{plan.rate:g} arrivals/s"
    sent = plan.pictures
    return (
        f"{how} for {plan.seconds:g} s after {plan.warm_up:g} s of warm-up; {len(sent.bodies)} pictures of "
        f"{sent.mean_size} bytes on average; this client alone makes {own.per_second:.0f} requests/s"
    )


def _exit_code(
    thresholds: tuple[Threshold, ...], verdicts: list[Verdict], found: dict[str, Any], limit: str | None
) -> int:
    """Return 1 for what does not hold; 2 where it is only the client that crossed a threshold."""
    crossed = [each for each, verdict in zip(thresholds, verdicts, strict=True) if not verdict.holds]
    if not found["statuses"].get("200") or any(limit is None or not each.of_client for each in crossed):
        return 1
    return 2 if crossed else 0


def _command(asked: Asked) -> str:
    """Return the command line that measures it again; of paths only the last part."""
    plan = asked.plan
    one = len(plan.pictures.bodies) == 1 and Path(plan.pictures.source).suffix
    words = [without_user(plan.url), "--picture" if one else "--pictures", Path(plan.pictures.source).name]
    words += ["--clients", str(plan.clients)] if plan.rate is None else ["--rate", f"{plan.rate:g}"]
    words += ["--seconds", f"{plan.seconds:g}", "--warm-up", f"{plan.warm_up:g}", "--seed", str(plan.seed)]
    words += [] if plan.rate is None or plan.poisson else ["--evenly"]
    words += [word for each in asked.thresholds for word in ("--fail-if", f"'{each.text}'")]
    return " ".join(("beeline bench load", *words, *(["--cross-check"] if asked.cross_check else [])))
