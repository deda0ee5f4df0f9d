"""How far the ladder goes: until a plateau, out of memory or the last batch size allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.ladder.row import OUT_OF_MEMORY, Row

# Doubling the batch must make an image cheaper by more than this, or it gained nothing.
PLATEAU = 0.03
# The knee is the smallest batch whose image costs at most this much more than the cheapest one.
NEAR = 0.05
_JUDGED = ("forward", "handler")


def climb(
    measure: Callable[[int], Row], least: int, most: int, watch: Callable[[Row], None] | None = None
) -> tuple[tuple[Row, ...], str]:
    """Measure batch sizes 1, 2, 4 ... and return the rows and why they end.

    Args:
        measure: takes a batch size; its row has an error when the batch did not fit into memory.
        least: no plateau ends the ladder before this batch size.
        most: the largest batch size.
        watch: told each row.
    """
    rows: list[Row] = []
    batch = 1
    while batch <= most:
        row = measure(batch)
        rows.append(row)
        if watch is not None:
            watch(row)
        if row.error is not None:
            return tuple(rows), OUT_OF_MEMORY
        if batch >= least and flat(rows):
            return tuple(rows), "plateau"
        batch *= 2
    return tuple(rows), f"largest batch asked for ({most})"


def flat(rows: Sequence[Row]) -> bool:
    """Say whether the last two doublings gained next to nothing, the forward pass alone and the whole handler."""
    if len(rows) < 3:
        return False
    return all(_gain(rows[i - 1], rows[i], stage) <= PLATEAU for i in (-2, -1) for stage in _JUDGED)


def knee(rows: Sequence[Row]) -> int | None:
    """Return the smallest batch that is nearly as cheap an image as the cheapest, for the whole handler."""
    good = [row for row in rows if row.error is None]
    if not good:
        return None
    best = min(row.per_image("handler") for row in good)
    return next(row.batch for row in good if row.per_image("handler") <= best * (1 + NEAR))


def _gain(before: Row, after: Row, stage: str) -> float:
    return 1 - after.per_image(stage) / before.per_image(stage)
