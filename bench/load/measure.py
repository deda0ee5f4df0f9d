"""`beeline bench load`: address, load, live view, thresholds, and whether the client was the limit; one record."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from beeline.errors import BeelineError, ConfigError, Undetermined, did_you_mean
from bench import record
from bench.load import Outcome, Plan, Watch, content_type, run
from bench.load.crosscheck import CLOSE, CrossCheck, check_possible, cross_check
from bench.record import Record, without_user
from host import signals
from serve.client import InferenceClient

# Answers that no other picture would change.
_WRONG_ADDRESS = (401, 403, 404, 405)
_BAR = 40
# Seconds between two plain lines.
_LINES = 2.0
# From these shares on the client is the limit: of one core; its own lateness of the latency's p99.
_BUSY, _LATE = 0.8, 0.3

_TIME, _RATE, _COUNT, _SHARE = ("ms", "s"), ("", "/s"), ("",), ("", "%")
# Each quantity's key in a summary, and the units that it may be given in.
QUANTITIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "p50": ("p50_ms", _TIME),
    "p95": ("p95_ms", _TIME),
    "p99": ("p99_ms", _TIME),
    "max": ("max_ms", _TIME),
    "rps": ("per_second", _RATE),
    "good": ("good_per_second", _RATE),
    "errors": ("failed", _SHARE),
    "backlog": ("backlog", _COUNT),
}
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_FORM = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|%|/s|)\s*")


@dataclass(frozen=True)
class Verdict:
    """A threshold's text, the value found in its unit (None where there is none), and whether it holds."""

    text: str
    value: float | None
    holds: bool


@dataclass(frozen=True)
class Threshold:
    """A load has failed if `quantity` compares like this with `limit`, in `unit`."""

    text: str
    quantity: str
    comparison: str
    limit: float
    unit: str

    def judge(self, summary: Mapping[str, Any]) -> Verdict:
        """Return whether a load's summary keeps it; what was not measured is not kept."""
        value = summary[QUANTITIES[self.quantity][0]]
        if self.quantity == "backlog" and value is not None:
            value = value["at_end"]
        if value is not None and self.unit == "%":
            value = round(100 * value / summary["requests"], 3) if summary["requests"] else None
        elif value is not None:
            value = float(value) / (1000 if self.unit == "s" else 1)
        return Verdict(self.text, value, value is not None and not _COMPARISONS[self.comparison](value, self.limit))


def parse(text: str) -> Threshold:
    """Read `p95>500ms`, `errors>0`, `errors>1%`, `rps<300`, `p99>=1s`.

    Raises:
        ConfigError: naming what is not understood.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"--fail-if is {text!r}; give a quantity, one of < <= > >=, and a number, as in 'p95>500ms'")
    quantity, comparison, limit, unit = match.groups()
    if quantity not in QUANTITIES:
        raise ConfigError(f"--fail-if {text!r} has the quantity {quantity!r}{did_you_mean(quantity, QUANTITIES)}")
    units = QUANTITIES[quantity][1]
    if unit not in units:
        forms = " or ".join(f"'{quantity}{comparison}{limit}{each}'" for each in units)
        raise ConfigError(f"--fail-if {text!r} has the unit {unit!r}; write {forms}")
    return Threshold(text.strip(), quantity, comparison, float(limit), unit)


def resolve(url: str, model: str | None = None) -> str:
    """Return the full address of predictions.

    Args:
        url: that address already, or a server's root.
        model: the name at a root; its only model by default, as its catalog lists it.

    Raises:
        BeelineError: when a root serves several models and none is named. Undetermined: when nothing answers.
    """
    path, root = urlsplit(url).path.rstrip("/"), url.rstrip("/")
    if path:
        if model is not None and path.rpartition("/predictions/")[2].partition("/")[0] != model:
            raise BeelineError(f"the URL is {url} and --model is {model!r}; give the server's root with --model")
        return url
    if model is None:
        with InferenceClient(root, timeout=30) as client:
            served = client.served()
        if served is None or len(served) != 1:
            lists = "has no catalog of its models" if served is None else f"serves {', '.join(served) or 'nothing'}"
            raise BeelineError(f"{root} {lists}; add --model NAME")
        model = served[0]
    return f"{root}/predictions/{quote(model)}"


def check_address(plan: Plan) -> None:
    """Send a plan's first picture.

    Raises:
        BeelineError: when the address is wrong. Undetermined: when nothing answers.
    """
    parts, headers = plan.parts, {"Content-Type": content_type(plan.pictures.names[0]), **plan.headers}
    path = parts._replace(scheme="", netloc="").geturl() or "/"
    with InferenceClient(f"{parts.scheme}://{parts.netloc}", timeout=plan.deadline, patience=0) as client:
        answer = client.request("POST", path, data=plan.pictures.bodies[0], headers=headers)
    if answer.status_code in _WRONG_ADDRESS:
        text = " ".join(answer.text.split())[:200]
        raise BeelineError(f"{plan.url} answers {answer.status_code} ({text}); give another address, or --model")


def limits(outcome: Outcome) -> str | None:
    """Return why the client, and not the server, is what was measured; None where it is not."""
    figures = outcome.summary()
    if figures["client_cpu"] >= _BUSY:
        return (
            f"the client is the limit: it used {figures['client_cpu']:.0%} of one core, which is enough for "
            f"{ceiling(outcome):.0f} requests/s, and has no second"
        )
    late, latency = figures["late_ms"], figures["p99_ms"]
    if late is not None and latency is not None and late > max(2.0, _LATE * latency):
        return (
            f"the client is the limit: {late:.1f} ms of the p99 of {latency:.1f} ms are its own lateness, so that it "
            "needs a processor of its own"
        )
    return None


def ceiling(outcome: Outcome) -> float:
    """Return how many requests/s the client's one thread could make at least, by the CPU time that each took it.

    Far below it, more than there: what the client does while it waits counts too.
    """
    return round(outcome.summary()["requests"] / outcome.cpu, 2) if outcome.cpu else 0.0


@dataclass(frozen=True)
class Measured:
    """The record, its text for people, and the command's exit code."""

    record: Record
    text: str
    exit_code: int


def measure(
    plan: Plan, console: Console, thresholds: Sequence[Threshold] = (), other: bool = False, command: str = ""
) -> Measured:
    """Measure, and show it on the console meanwhile; Ctrl-C ends it with what was measured until then.

    Args:
        plan: the load.
        console: takes progress.
        thresholds: what must not be.
        other: whether ab is to do the same.
        command: the command line that measures it again.

    Raises:
        BeelineError: when the address is wrong. Undetermined: when nothing answers, ab is not there,
            or it was interrupted before anything was measured.
    """
    if other:
        check_possible(plan)
    started, outcome, code = record.utc(), Outcome(plan), 0
    checked: CrossCheck | None = None
    with signals.as_exceptions():
        try:
            check_address(plan)
            load = f"{plan.clients} clients" if plan.rate is None else f"{plan.rate:g} arrivals/s"
            console.print(
                f"{load} for {plan.seconds:g} s after {plan.warm_up:g} s of warm-up; {len(plan.pictures.bodies)} "
                f"pictures of {plan.pictures.mean_size} bytes on average",
                markup=False,
            )
            with watching(console) as watch:
                run(plan, watch, outcome)
            if other:
                checked = _cross_check(outcome, console)
        except signals.Interrupted as ended:
            code = ended.exit_code
    if not outcome.seconds:
        raise Undetermined("interrupted before anything was measured; let it run longer")
    figures, limit = outcome.summary(), limits(outcome)
    verdicts = [threshold.judge(figures) for threshold in thresholds]
    values = {
        **figures,
        "url": without_user(plan.url),
        "thresholds": [asdict(verdict) for verdict in verdicts],
        "ceiling_per_second": ceiling(outcome),
        "client_limited": limit is not None,
        "crosscheck": None if checked is None else asdict(checked),
        "sentence": outcome.sentence(limit),
    }
    made = Record.now("load", command, values, plan.pictures, started=started)
    if not code:
        # A slow client crosses any threshold as well as a slow server does, except that of errors.
        pairs = zip(thresholds, verdicts, strict=True)
        crossed = [threshold.quantity for threshold, verdict in pairs if not verdict.holds]
        failed = not figures["statuses"].get("200") or (crossed and limit is None) or "errors" in crossed
        code = 1 if failed else 2 if crossed or (other and checked is None) else 0
    return Measured(made, text(values, checked), code)


def _cross_check(outcome: Outcome, console: Console) -> CrossCheck | None:
    """Let the other tool do the same; None, and the reason on the console, where it cannot."""
    plan, latency = outcome.plan, outcome.summary()["p50_ms"]
    console.print("ab and this client take turns", markup=False)
    try:
        if latency is None:
            raise Undetermined("there was no good answer, and so nothing to cross-check")
        return cross_check(plan, latency / 1000)
    except Undetermined as error:
        console.print(f"no cross-check: {error}", markup=False)
        return None


# For people.


def text(result: Mapping[str, Any], checked: CrossCheck | None) -> str:
    """Return a record's result as lines, under the one sentence that sums it up."""
    rows = {
        "answers": counts(result),
        "latency": latency(result),
        "client": f"{result['client_cpu']:.0%} of one core, which is enough for at least "
        f"{result['ceiling_per_second']:.0f} requests/s",
    }
    if interval := (result["intervals_ms"] or {}).get("p95_ms"):
        rows["latency"] += f" (p95 in {interval[0]:.1f} to {interval[1]:.1f} with 95 % confidence)"
    stages = ", ".join(f"{name} {value:.1f} ms" for name, value in result["timing_ms"].items() if value is not None)
    if stages:
        rows["server"] = f"{stages} (medians)"
    if waits := result["backlog"]:
        rows["backlog"] = f"{waits['at_end']} at the end, {waits['per_second']:+.1f} a second"
    for index, (size, bar, share) in enumerate(bars(result["batch_sizes"])):
        rows["batch size" if index == 0 else " " * index] = f"{size:>4} {bar} {share}"
    if checked is not None:
        agree = "they agree" if checked.close else f"more than {CLOSE:.0%} apart: read neither as exact"
        rows[checked.tool] = f"{checked.per_second:.1f} answers/s; ours are {checked.ratio:.3f} of it: {agree}"
    lines = [f"  {name:<12} {row}" for name, row in rows.items()]
    for verdict in result["thresholds"]:
        value = "not measured" if verdict["value"] is None else f"it is {verdict['value']:g}"
        lines.append(f"  {'pass' if verdict['holds'] else 'FAIL':<12} fail if {verdict['text']}: {value}")
    return "\n".join([result["sentence"], *lines])


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Yield what a load is watched with: a view that redraws itself and is gone at the end, elsewhere plain lines."""
    time = answers = 0.0
    live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def show(outcome: Outcome) -> None:
        nonlocal time, answers
        passed = outcome.seconds - time
        if live is None and passed < _LINES:
            return
        rate = (outcome.answers - answers) / passed if passed > 0 else 0.0
        time, answers = outcome.seconds, outcome.answers
        if live is not None:
            # It draws when it is asked to: a thread of its own would take the processor from the load at any moment.
            live.update(view(outcome, rate), refresh=True)
        else:
            figures = outcome.summary()
            line = f"{phase(outcome)}: {rate:.0f} answers/s, {latency(figures)}, {counts(figures)}"
            console.print(line, markup=False)

    if live is None:
        yield show
    else:
        with live:
            yield show


def phase(outcome: Outcome) -> str:
    """Return where the load is."""
    if outcome.now < outcome.begin:
        return "warming up"
    if outcome.now >= outcome.end:
        return "waiting for the last answers"
    return f"{outcome.seconds:.0f} of {outcome.plan.seconds:g} s"


def latency(figures: Mapping[str, Any]) -> str:
    """Return a summary's percentiles."""
    if figures["p95_ms"] is None:
        return "no answer of 200"
    return ", ".join(f"{name} {figures[f'{name}_ms']:.1f} ms" for name in ("p50", "p95", "p99"))


def counts(figures: Mapping[str, Any]) -> str:
    """Return a summary's answers by status, and its errors by name."""
    pairs = {**figures["statuses"], **figures["errors"]}.items()
    return ", ".join(f"{count} times {name}" for name, count in pairs) or "no answer yet"


def bars(sizes: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Return a line for each batch size: the size, its bar, its share of the answers."""
    most, total = max(sizes.values(), default=1), sum(sizes.values())
    return [
        (size, "█" * max(1, round(_BAR * count / most)), f"{count / total:.1%}")
        for size, count in sorted(sizes.items(), key=lambda item: int(item[0]))
    ]


def view(outcome: Outcome, rate: float) -> Group:
    """Return the view of this moment."""
    figures = outcome.summary()
    rows = {
        "load": outcome.plan.url,
        "time": phase(outcome),
        "requests": f"{rate:.0f} answers/s now, {figures['per_second']:.1f} on average",
        "latency": latency(figures),
        "answers": counts(figures),
    }
    if outcome.waiting:
        rows["waiting"] = f"{outcome.waiting[-1][1]} requests"
    grid, histogram = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    histogram.add_column(justify="right")
    for name, row in rows.items():
        grid.add_row(name, Text(row, style="red" if name == "answers" and figures["failed"] else ""))
    for size, bar, share in bars(figures["batch_sizes"]):
        histogram.add_row(size, Text(bar, style="cyan"), share)
    title = "batch sizes" if figures["batch_sizes"] else "no batch sizes: no answer had X-Batch-Size"
    return Group(grid, Text(title, style="dim"), histogram)
