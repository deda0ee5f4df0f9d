"""A load's result as plain text for people, under the one sentence that sums it up."""

from __future__ import annotations

from typing import Any

from bench.load.crosscheck import CLOSE, CrossCheck
from bench.load.live import bars, counts, latency
from bench.load.threshold import Verdict


def text(
    sentence: str, found: dict[str, Any], ceiling: float, verdicts: list[Verdict], checked: CrossCheck | None
) -> str:
    """Return the lines.

    Args:
        sentence: the outcome's.
        found: its summary.
        ceiling: answers a second of this client from a server that does nothing.
        verdicts: of the thresholds.
        checked: the other tool's turn.
    """
    lines = [
        f"  answers      {counts(found)}",
        f"  latency      {latency(found)}",
        f"  client       {found['client_cpu']:.0%} of one core; alone it makes {ceiling:.0f} requests/s",
    ]
    spent = {name: value for name, value in found["timing_ms"].items() if value is not None}
    if spent:
        lines.append(f"  server       {', '.join(f'{name} {value:.1f} ms' for name, value in spent.items())} (medians)")
    if found["resent"]:
        lines.append(f"  sent again   {found['resent']} requests, whose connection was closed as they were sent")
    if found["backlog"] is not None:
        waits = found["backlog"]
        lines.append(f"  backlog      {waits['at_end']} at the end, {waits['per_second']:+.1f} a second")
    sizes = bars(found["batch_sizes"])
    lines += [
        f"  {'batch size' if index == 0 else '':<12} {size:>4} {bar} {share}"
        for index, (size, bar, share) in enumerate(sizes)
    ]
    if checked is not None:
        agree = "they agree" if checked.close else f"more than {CLOSE:.0%} apart: read neither as exact"
        lines.append(
            f"  {checked.tool:<12} {checked.per_second:.1f} answers/s; ours are {checked.ratio:.3f} of it: {agree}"
        )
    lines += [f"  {'pass' if each.holds else 'FAIL'}         fail if {each.text}: {_value(each)}" for each in verdicts]
    return "\n".join([sentence, *lines])


def _value(verdict: Verdict) -> str:
    return "not measured" if verdict.value is None else f"it is {verdict.value:g}"
