"""Labels from a file: one a line, a JSON list, or TorchServe's index_to_name.json."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from beeline.errors import ArchiveError

_FORMS = 'one label a line, a JSON list, {"0": "ants", "1": "bees"} or {"0": ["n01440764", "tench"], ...}'


def read_labels(path: Path) -> tuple[str, ...]:
    """Read the labels in the order of the model's outputs.

    A name that occurs more than once (ImageNet has two cranes) gets its class id, or its index where the file has no
    ids: `crane (n02012849)`. None is dropped.

    Raises:
        ArchiveError: when the file cannot be read, has a gap or another form.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ArchiveError(f"the labels file {path} cannot be read ({error}); name a UTF-8 file") from error
    pairs = _from_json(path, text) if text.lstrip()[:1] in ("{", "[") else _from_lines(path, text)
    if not pairs:
        raise ArchiveError(f"the labels file {path} is empty; allowed: {_FORMS}")
    counts = Counter(name for _, name in pairs)
    return tuple(name if counts[name] == 1 else f"{name} ({number})" for number, name in pairs)


def _from_lines(path: Path, text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.rstrip().splitlines()]
    for number, line in enumerate(lines, 1):
        if not line:
            raise ArchiveError(f"line {number} of the labels file {path} is blank; name every class in order")
    return [(str(index), line) for index, line in enumerate(lines)]


def _from_json(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ArchiveError(
            f"the labels file {path} begins like JSON but cannot be read as JSON ({error}); allowed: {_FORMS}"
        ) from error
    if isinstance(values, dict):
        values = _in_order(path, values)
    return [_pair(path, index, value) for index, value in enumerate(values)]


def _in_order(path: Path, values: dict[str, object]) -> list[object]:
    """Sort by the numeric keys, which must be 0 to n-1 without a gap."""
    for index in range(len(values)):
        if str(index) not in values:
            stranger = next(key for key in values if not (key.isdigit() and int(key) < len(values)))
            raise ArchiveError(
                f"the labels file {path} has {len(values)} entries but none for class {index} "
                f"(and one for {stranger!r}); number the classes 0 to {len(values) - 1}"
            )
    return [values[str(index)] for index in range(len(values))]


def _pair(path: Path, index: int, value: object) -> tuple[str, str]:
    if isinstance(value, str):
        return str(index), value
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return value[0], value[1]
    raise ArchiveError(f"class {index} of the labels file {path} is {value!r}; allowed: {_FORMS}")
