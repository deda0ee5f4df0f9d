"""Labels from a file, in the order of the model's outputs, in any form whose order is clear."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from beeline.errors import ArchiveError, short

_FORMS = 'one label a line, a JSON list, {"0": "ants"}, {"ants": 0}, {"0": ["n01440764", "tench"]}, CSV of two columns'
# Under these keys larger files have labels: Hugging Face's config.json, a data set's YAML, a training program's JSON.
_NESTED = ("id2label", "names", "class_to_idx", "label2id", "labels", "classes", "label_names")
_BETWEEN = r"(?:\s+-\s+|[.)]\s+|\s*[\s:,;=|]\s*)"
_NUMBERED = rf"(?P<number>\d+){_BETWEEN}(?P<name>\S.*)", rf"(?P<name>\S.*?){_BETWEEN}(?P<number>\d+)"


class _Unclear(Exception):
    """Labels that cannot be read; the text completes a sentence about their file."""


def read_labels(path: Path) -> tuple[str, ...]:
    """Read the labels in the order of the model's outputs; raise `ArchiveError` where that is not clear.

    Class numbers may begin at 0 or 1 and have leading zeros. A name that occurs twice (ImageNet has two cranes) gets
    its class id, or its index if the file has no ids: `crane (n02012849)`.
    """
    try:
        pairs = [_pair(index, value) for index, value in enumerate(_values(path.suffix.lower(), _text(path)))]
        if not pairs:
            raise _Unclear(f"is empty; allowed: {_FORMS}")
        counts = Counter(name for _, name in pairs)
        labels = [name if counts[name] == 1 else f"{name} ({number})" for number, name in pairs]
        _once([(label, None) for label in labels])
    except _Unclear as error:
        raise ArchiveError(f"the labels file {path} {error}") from error
    return tuple(labels)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _Unclear(f"cannot be read ({error.strerror}); name another") from error
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    wide = "utf-16" if marked else "utf-16-be" if data[:1] == b"\0" else "utf-16-le" if data[1:2] == b"\0" else ""
    for encoding in [wide] if wide else ["utf-8-sig", "cp1252"]:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            pass
    raise _Unclear("is not UTF-8, UTF-16 or Latin-1; save it as UTF-8")


def _values(ending: str, text: str) -> Sequence[Any]:
    try:
        if text.lstrip()[:1] in ("{", "["):
            return _sequence(_json(text))
        if ending in (".yaml", ".yml"):
            return _sequence(yaml.load(text, _Loader))
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        kind, why = "YAML" if ending in (".yaml", ".yml") else "JSON", short(error)
        raise _Unclear(f"is not {kind} ({why}); allowed: {_FORMS}") from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if ending in (".csv", ".tsv"):
        mark = next((mark for mark in ",\t;" if all(mark in line for line in lines)), ",")
        rows = [row for row in csv.reader(lines, delimiter=mark) if row]
        if {len(row) for row in rows} == {2}:
            return _table(rows)
        if any(len(row) > 1 for row in rows):
            raise _Unclear("is a table of more than two columns, or of uneven lines; keep class number and name")
        lines = [row[0] for row in rows]
    for pattern in _NUMBERED:
        matches = [match for line in lines if (match := re.fullmatch(pattern, line))]
        numbers = sorted(int(match["number"]) for match in matches)
        counted = numbers in (list(range(len(lines))), list(range(1, len(lines) + 1)))
        # Other numbers belong to the names, as in "3 series", "5 series" or "1 cent", "2 cent".
        if len(lines) > 1 and counted and len({match["name"] for match in matches}) == len(lines):
            return _in_order([(match["number"], match["name"]) for match in matches])
    return lines


def _json(text: str) -> Any:
    """Read JSON, or what Python prints of a dictionary or list, which is YAML."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except ValueError:
        with suppress(yaml.YAMLError):
            return yaml.load(text, _Loader)
        raise


def _sequence(values: Any, by_name: bool = False) -> Sequence[Any]:
    """Return what JSON or YAML holds as a list; with `by_name` the keys of a dictionary are names."""
    if isinstance(values, dict):
        if nested := [key for key in _NESTED if isinstance(values.get(key), (dict, list))]:
            return _sequence(values[nested[0]], nested[0] in ("class_to_idx", "label2id"))
        rows = list(values.items())
        by_name = by_name or not all(key.isdecimal() and isinstance(value, str) for key, value in rows)
        if by_name and all(str(value).isdecimal() for value in values.values()):
            rows = [(str(value), key) for key, value in rows]
        return _in_order(rows)
    if not isinstance(values, list):
        raise _Unclear(f"holds a {type(values).__name__}; allowed: {_FORMS}")
    return values


def _table(rows: list[list[str]]) -> Sequence[str]:
    """Read rows of class number and name, in either order; the first row may be a title."""
    for column in (0, 1):
        for body in (rows, rows[1:]):
            if body and all(row[column].strip().isdecimal() for row in body):
                return _in_order([(row[column].strip(), row[1 - column]) for row in body])
    raise _Unclear("is a table of two columns without class numbers; keep class number and name, or names alone")


def _in_order(rows: Sequence[tuple[str, Any]]) -> Sequence[Any]:
    """Return the values in the order of their class numbers, which are 0 to n - 1 or 1 to n."""
    if strange := [key for key, _ in rows if not key.isdecimal()]:
        raise _Unclear(f"has {strange[0]!r}, which is not a class number; allowed: {_FORMS}")
    numbered = _once([(str(int(key)), value) for key, value in rows])
    first = 0 if "0" in numbered else 1
    expected = [str(number) for number in range(first, first + len(rows))]
    if gaps := [number for number in expected if number not in numbered]:
        other = next(number for number in numbered if number not in expected)
        bounds = f"{expected[0]} to {expected[-1]}"
        raise _Unclear(f"has none for class {gaps[0]} and one for class {other}; number the classes {bounds}")
    return [numbered[number] for number in expected]


def _pair(index: int, value: Any) -> tuple[str, str]:
    number, name = value if isinstance(value, list) and len(value) == 2 else (str(index), value)
    if not isinstance(number, str) or not isinstance(name, str):
        raise _Unclear(f"has {value!r} for class {index}; allowed: {_FORMS}")
    if not name.strip():
        raise _Unclear(f"has a blank name for class {index}; name every class in order")
    return number, name.strip()


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Return a dictionary; refuse a key that is there twice."""
    if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise _Unclear(f"has {repeated[0]!r} twice; keep one, or give each class a name of its own")
    return dict(pairs)


class _Loader(yaml.BaseLoader):
    """YAML of texts only, since `no` may be a label, with each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        return _once([(key.value, self.construct_object(value, deep=True)) for key, value in node.value])
