"""`beeline bench load`: address, load, live view, thresholds, whether the client was the limit, and a check by `ab`."""

from __future__ import annotations

import operator
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlsplit

from rich.console import Console
from rich.live import Live
from rich.text import Text

from beeline.errors import BeelineError, ConfigError, Undetermined, did_you_mean
from bench import record
from bench.load import PERCENTILES, Outcome, Plan, Watch, run
from bench.record import Record, interval, without_user
from host import signals
from serve.client import InferenceClient

# Another picture would not change these answers.
_WRONG_ADDRESS = (401, 403, 404, 405)
# The longest bar of batch sizes, in characters; seconds between two plain lines.
_BAR, _LINES = 40, 2.0
# From these shares on the client is the limit: of one core; its own lateness of the latency's p99.
_BUSY, _LATE = 0.8, 0.3
# Seconds, and times an answer, that a turn of ab takes at least, because it counts from its first connection on.
_SHORTEST, _TIMES = 3.0, 10
# ab and this client agree if their ratio is within this much of 1.
_CLOSE = 0.05

# Each quantity's key in a summary, and the units that it may be given in.
QUANTITIES = {
    **{name: (f"{name}_ms", ("ms", "s")) for name in ("p50", "p95", "p99", "max")},
    "rps": ("per_second", ("", "/s")),
    "good": ("good_per_second", ("", "/s")),
    "errors": ("failed", ("", "%")),
    "backlog": ("backlog", ("",)),
}
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_FORM = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|%|/s|)\s*")
Summary = Mapping[str, Any]
Judge = Callable[[Summary], dict[str, Any]]


def parse(text: str) -> Judge:
    """Return what judges a summary by `p95>500ms`, `errors>0`, `errors>1%`, `rps<300` or `p99>=1s`.

    A verdict has the threshold's `text`, the `value` in its unit, and whether it `holds`; None does not hold. Raise
    `ConfigError` for a text of another form.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"--fail-if is {text!r}; give a quantity, one of < <= > >=, and a number, as in 'p95>500ms'")
    quantity, comparison, limit, unit = match.groups()
    if quantity not in QUANTITIES:
        raise ConfigError(f"--fail-if {text!r} has the quantity {quantity!r}{did_you_mean(quantity, QUANTITIES)}")
    key, units = QUANTITIES[quantity]
    if unit not in units:
        forms = " or ".join(f"'{quantity}{comparison}{limit}{each}'" for each in units)
        raise ConfigError(f"--fail-if {text!r} has the unit {unit!r}; write {forms}")

    def judge(summary: Summary) -> dict[str, Any]:
        value = summary[key]["at_end"] if isinstance(summary[key], Mapping) else summary[key]
        scale = {"s": 1000, "%": summary["requests"] / 100}.get(unit, 1)
        value = None if value is None or not scale else round(value / scale, 6)
        holds = value is not None and not _COMPARISONS[comparison](value, float(limit))
        return {"text": text.strip(), "value": value, "holds": holds}

    return judge


def table(results: Sequence[Summary]) -> str:
    """Return the results of a sweep as lines for people, in the columns of Triton's perf_analyzer."""
    columns = ("p50", "p90", "p95", "p99")
    lines = ["concurrency  inferences/s" + "".join(f"{f'{each} ms':>10}" for each in columns)]
    for one in results:
        times = "".join(f"{'-' if (ms := one[f'{each}_ms']) is None else f'{ms:.1f}':>10}" for each in columns)
        lines.append(f"{one['clients']:>11}{one['good_per_second']:>14.1f}{times}")
    return "\n".join(lines)


def resolve(url: str, model: str | None = None) -> str:
    """Return the address of predictions, given it or a server's root; raise `BeelineError` if the model is unclear."""
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
    """Send the load's first request; raise `BeelineError` for a wrong address, `Undetermined` when nothing answers."""
    parts, (headers, body) = urlsplit(plan.url), plan.requests()[0]
    path = parts._replace(scheme="", netloc="").geturl() or "/"
    with InferenceClient(f"{parts.scheme}://{parts.netloc}", timeout=plan.deadline, patience=0) as client:
        answer = client.request("POST", path, data=body, headers=headers)
    if answer.status_code in _WRONG_ADDRESS:
        text = " ".join(answer.text.split())[:200]
        raise BeelineError(f"{plan.url} answers {answer.status_code} ({text}); give another address, or --model")


def limits(figures: Summary) -> str | None:
    """Return why a summary measures the client and not the server; None where it measures the server."""
    cpu, late, latency = figures["client_cpu"], figures["late_ms"], figures["p99_ms"]
    if cpu >= _BUSY:
        words = f"it used {cpu:.0%} of the one core that it can use"
        return f"the client is the limit: {words}, enough for {figures['ceiling_per_second']:.0f} requests/s"
    if late is not None and latency is not None and late > max(2.0, _LATE * latency):
        words = f"{late:.1f} ms of the p99 of {latency:.1f} ms are its own lateness"
        return f"the client is the limit: {words}, so it needs a processor of its own"
    return None


def measure(plan: Plan, console: Console, thresholds: Sequence[Judge], other: bool, command: str) -> tuple[Record, int]:
    """Measure and show progress; return the record and the exit code. Ctrl-C keeps what was measured until then.

    With `other`, ab then makes the same load. `command` is the command line that measures it again. Raise
    `BeelineError` for a wrong address, `Undetermined` when nothing answers, there is no ab, or nothing was measured.
    """
    if other:
        check_possible(plan)
    started, outcome, code = record.utc(), Outcome(plan), 0
    checked: dict[str, Any] | None = None
    with signals.as_exceptions():
        try:
            check_address(plan)
            sent = "{count} pictures of {bytes} bytes on average".format_map(plan.pictures.to_dict())
            console.print(f"{plan} for {plan.seconds:g} s after {plan.warm_up:g} s of warm-up; {sent}", markup=False)
            with watching(console) as watch:
                run(plan, watch, outcome)
            if other:
                console.print("ab and this client take turns", markup=False)
                try:
                    checked = cross_check(plan, outcome.summary()["p50_ms"])
                except Undetermined as error:
                    console.print(f"no cross-check: {error}", markup=False)
        except signals.Interrupted as ended:
            code = ended.exit_code
    if not outcome.seconds:
        raise Undetermined("interrupted before anything was measured; let it run longer")
    figures, times = outcome.summary(), [round(each, 3) for each in outcome.latencies]
    limit, verdicts = limits(figures), [judge(figures) for judge in thresholds]
    values = {
        **figures,
        "intervals_ms": {f"p{each}_ms": interval(times, each / 100) for each in PERCENTILES},
        "url": without_user(plan.url),
        "thresholds": verdicts,
        "client_limited": limit is not None,
        "crosscheck": checked,
        "sentence": outcome.sentence(limit),
    }
    if not code:
        # A slow client can cross every threshold but that of errors, and then the server is not at fault.
        crossed = [verdict["text"] for verdict in verdicts if not verdict["holds"]]
        is_fault = limit is None or any(each.startswith("errors") for each in crossed)
        failed = not figures["statuses"].get("200") or (crossed and is_fault)
        code = 1 if failed else 2 if crossed or (other and checked is None) else 0
    return Record.now("load", command, values, plan.pictures, started), code


def check_possible(plan: Plan) -> None:
    """Raise `Undetermined` if `ab` cannot make this load, or is not installed."""
    if plan.clients is None or len(plan.pictures.bodies) > 1:
        raise Undetermined("--cross-check is for --clients and one --picture, which is all that ab can do")
    if shutil.which("ab") is None:
        raise Undetermined("--cross-check needs ab (Debian: apt-get install apache2-utils)")


def cross_check(plan: Plan, latency_ms: float | None, rounds: int = 3) -> dict[str, Any]:
    """Let this client and ab take turns; `latency_ms` is one answer's.

    Return the `tool`, the median of its answers `per_second`, the median `ratio` of ours to them, and whether the two
    `agree`. Raise `Undetermined` when there was no answer, or ab fails.
    """
    if latency_ms is None:
        raise Undetermined("there was no good answer, and so nothing to cross-check")
    latency = latency_ms / 1000
    seconds = max(_SHORTEST, plan.seconds / rounds, _TIMES * latency)
    rates, ratios = [], []
    for _ in range(rounds):
        ours = run(replace(plan, seconds=seconds, warm_up=0.5 + latency)).summary()["per_second"]
        rates.append(ab(plan, round(ours * seconds)))
        ratios.append(ours / rates[-1] if rates[-1] else 0.0)
    ratio = round(statistics.median(ratios), 3)
    agree = round(abs(ratio - 1), 3) <= _CLOSE
    return {"tool": "ab", "per_second": round(statistics.median(rates), 2), "ratio": ratio, "agree": agree}


def ab(plan: Plan, requests: int) -> float:
    """Let ab send `requests` of a plan, or one a client; return answers a second. Raise `Undetermined` if it fails."""
    headers, body = plan.requests()[0]
    count, clients = max(plan.clients or 1, requests), plan.clients or 1
    with tempfile.NamedTemporaryFile() as picture:
        picture.write(body)
        picture.flush()
        options = ["-q", "-k", "-l", f"-n{count}", f"-c{clients}", "-T", headers["Content-Type"], "-p", picture.name]
        # It gives up by itself after 30 seconds without an answer.
        done = subprocess.run(["ab", *options, plan.url], capture_output=True, text=True, check=False)
    rate = re.search(r"(?m)^Requests per second: +([\d.]+)", done.stdout)
    if rate is None:
        raise Undetermined(f"ab at {plan.url} printed no rate: {' '.join((done.stdout + done.stderr).split())}")
    return float(rate[1])


def text(result: Summary) -> str:
    """Return a record's result as lines, under the one sentence that sums it up."""
    lines = rows(result)
    if ends := result["intervals_ms"]["p95_ms"]:
        lines.insert(2, ("", f"p95 in {ends[0]:.1f} to {ends[1]:.1f} ms with 95 % confidence"))
    cpu = f"{result['client_cpu']:.0%} of one core, enough for at least {result['ceiling_per_second']:.0f} requests/s"
    lines.append(("client", cpu))
    if checked := result["crosscheck"]:
        agree = "they agree" if checked["agree"] else "they disagree, so neither is exact"
        rates = f"{checked['per_second']:.1f} answers/s; ours are {checked['ratio']:.3f} of it: {agree}"
        lines.append((checked["tool"], rates))
    for verdict in result["thresholds"]:
        value = "not measured" if verdict["value"] is None else f"it is {verdict['value']:g}"
        lines.append(("pass" if verdict["holds"] else "FAIL", f"fail if {verdict['text']}: {value}"))
    return f"{result['sentence']}\n{aligned(lines)}"


def rows(figures: Summary) -> list[tuple[str, str]]:
    """Return names and values of a summary for people, with a bar for each batch size."""
    counts = [f"{count} times {name}" for name, count in {**figures["statuses"], **figures["errors"]}.items()]
    times = [f"p{each} {figures[f'p{each}_ms']:.1f} ms" for each in PERCENTILES if figures["p50_ms"] is not None]
    lines = [("answers", ", ".join(counts) or "none yet"), ("latency", ", ".join(times) or "no answer of 200")]
    stages = [f"{name} {value:.1f} ms" for name, value in figures["timing_ms"].items() if value is not None]
    lines += [("server", f"{', '.join(stages)} (medians)")] if stages else []
    if backlog := figures["backlog"]:
        lines.append(("backlog", f"{backlog['at_end']} requests, {backlog['per_second']:+.1f} a second"))
    sizes = figures["batch_sizes"]
    for size in sorted(sizes, key=int):
        bar = "█" * max(1, round(_BAR * sizes[size] / max(sizes.values())))
        lines.append(("batches of", f"{size:>4} {bar} {sizes[size] / sum(sizes.values()):.1%}"))
    return lines if sizes else [*lines, ("batch sizes", "no answer had X-Batch-Size")]


def aligned(lines: Sequence[tuple[str, str]]) -> str:
    """Return names and values in two columns."""
    return "\n".join(f"  {name:<12} {value}" for name, value in lines)


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Yield what a load calls: on a terminal a view that redraws itself and disappears, elsewhere plain lines."""
    time = answers = 0.0
    # Without a thread, which would take the processor from the load at any moment.
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(outcome: Outcome) -> None:
            nonlocal time, answers
            passed = outcome.seconds - time
            if not console.is_terminal and passed < _LINES:
                return
            rate = f"{(outcome.answers - answers) / passed if passed > 0 else 0.0:.0f} answers/s"
            time, answers = outcome.seconds, outcome.answers
            figures = outcome.summary()
            if console.is_terminal:
                now = [("load", outcome.plan.url), ("time", phase(outcome))]
                now.append(("requests", f"{rate} now, {figures['per_second']:.1f} on average"))
                live.update(Text(aligned([*now, *rows(figures)])), refresh=True)
            else:
                (_, statuses), (_, times), *_ = rows(figures)
                console.print(f"{phase(outcome)}: {rate}, {times}, {statuses}", markup=False)

        yield show


def phase(outcome: Outcome) -> str:
    """Return where the load is."""
    if outcome.now < outcome.begin:
        return "warming up"
    if outcome.now >= outcome.end:
        return "waiting for the last answers"
    return f"{outcome.seconds:.0f} of {outcome.plan.seconds:g} s"
