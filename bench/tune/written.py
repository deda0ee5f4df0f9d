"""`config.properties` with a model's new numbers: comments and layout kept, shown as a diff, replaced at once."""

from __future__ import annotations

import difflib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import javaproperties

from beeline.errors import ConfigError
from bench.tune.settings import Settings
from host.files import write_whole
from serve import properties

_THREADS = "beeline_threads"
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Change:
    """A file's text as it is and as it would be."""

    path: Path
    before: str
    after: str

    @property
    def diff(self) -> str:
        """The unified diff; empty where nothing changes."""
        name = self.path.name
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), f"{name} (now)", f"{name} (tuned)", lineterm=""
        )
        return "\n".join(lines)

    def write(self) -> None:
        """Put the new text in place of the old one, in one step.

        Raises:
            ConfigError: when the file changed meanwhile, or cannot be written.
        """
        path = self.path.resolve()
        try:
            if _read(path) != self.before:
                raise ConfigError(f"{self.path} changed while it was tuned; run it again with --resume and --write")
            write_whole(path, self.after, stat.S_IMODE(path.stat().st_mode))
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written ({error.strerror}); change it as shown") from error


def change(path: Path, model: str, version: str, settings: Settings, threads_by_default: int) -> Change:
    """Return the file with a model's batch size, delay and workers, and the threads of a worker.

    Args:
        path: the file.
        model: its name.
        version: its version; a lone entry of the model for another version is changed instead, as it is read.
        settings: the new numbers.
        threads_by_default: threads that follow from the workers; others are written.

    Raises:
        ConfigError: for a file that cannot be read.
    """
    known = properties.load(path)
    text = _read(path)
    end = "\r\n" if "\r\n" in text else "\n"
    versions = known.models.get(model, {})
    if versions and version not in versions and len(versions) == 1:
        version = next(iter(versions))
    numbers = {
        "minWorkers": settings.workers,
        "maxWorkers": settings.workers,
        "batchSize": settings.batch_size,
        "maxBatchDelay": settings.max_batch_delay,
    }
    after = _with_numbers(text, end, model, version, numbers)
    if settings.threads != known.numbers.get(_THREADS, threads_by_default):
        after = _with_threads(after, end, settings.threads)
    return Change(path, text, after)


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def _with_numbers(text: str, end: str, model: str, version: str, numbers: Mapping[str, int]) -> str:
    """Return the text with the numbers in the model's entry of `models`."""
    place = _value_of(text, "models")
    if place is None:
        break_ = f"\\{end}"
        entry = f",{break_}".join(f'      "{key}": {value}' for key, value in numbers.items())
        made = f'models={{{break_}  "{model}": {{{break_}    "{version}": {{{break_}{entry}{break_}    }}{break_}'
        return f"{text}{'' if text.endswith(end) or not text else end}{end}{made}  }}{break_}}}{end}"
    value = _Value(*place)
    for path in ((model,), (model, version)):
        if value.find(path) is None:
            text = value.insert(text, path[:-1], path[-1], "{}")
            value = _Value(*_found(text))
    for key, number in numbers.items():
        spot = value.find((model, version, key))
        if spot is None:
            text = value.insert(text, (model, version), key, str(number))
        else:
            text = text[: spot[0]] + str(number) + text[spot[1] :]
        value = _Value(*_found(text))
    return text


def _with_threads(text: str, end: str, threads: int) -> str:
    """Return the text with the threads: in their line, else after the line that explains them, else at the end."""
    place = _value_of(text, _THREADS)
    line = f"{_THREADS}={threads}"
    if place is not None:
        positions = place[1]
        start, stop = (positions[0][0], positions[-1][1]) if positions else (place[2], place[2])
        return f"{text[:start]}{threads}{text[stop:]}"
    example = re.search(rf"^[#!][ \t]*{_THREADS}[ \t]*[=:][^\r\n]*", text, re.MULTILINE)
    if example is not None:
        return f"{text[: example.end()]}{end}{line}{text[example.end() :]}"
    return f"{text}{'' if text.endswith(end) or not text else end}{line}{end}"


def _found(text: str) -> tuple[str, list[tuple[int, int]], int]:
    place = _value_of(text, "models")
    assert place is not None
    return place


def _value_of(text: str, key: str) -> tuple[str, list[tuple[int, int]], int] | None:
    """Return a key's value as it is read, each of its characters' place in the text, and where the value begins."""
    at = 0
    for element in javaproperties.parse(text):
        source = element.source
        if isinstance(element, javaproperties.KeyValue) and element.key == key:
            head = re.match(r"[ \t\f]*(?:[^\\=: \t\f]|\\.)+[ \t\f]*[=:]?[ \t\f]*", source, re.DOTALL)
            assert head is not None
            begin = at + head.end()
            pairs = list(_characters(text, begin, at + len(source.rstrip("\r\n"))))
            return "".join(char for char, _, _ in pairs), [(start, stop) for _, start, stop in pairs], begin
        at += len(source)
    return None


def _characters(text: str, at: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Yield a value's characters with where each is written: continued lines joined, escapes undone."""
    while at < stop:
        joined = re.compile(r"\\(?:\r\n|\r|\n)[ \t\f]*").match(text, at)
        if joined is not None:
            at = joined.end()
            continue
        size = 1
        if text[at] == "\\":
            size = 6 if text[at + 1 : at + 2] == "u" else 2
        raw = text[at : at + size]
        yield (str(javaproperties.unescape(raw)) if size > 1 else raw), at, at + size
        at += size


class _Value:
    """The JSON of `models`, with where each part of it is written."""

    def __init__(self, text: str, places: list[tuple[int, int]], begin: int) -> None:
        self.text = text
        self.places = places

    def find(self, path: tuple[str, ...]) -> tuple[int, int] | None:
        """Return where a value is written, from and to; None where it is not there."""
        span = self._span(path)
        return None if span is None else (self.places[span[0]][0], self.places[span[1] - 1][1])

    def insert(self, source: str, path: tuple[str, ...], key: str, value: str) -> str:
        """Return the source with one more member at the end of an object, laid out as the member before it."""
        span = self._span(path)
        assert span is not None
        members = list(self._members(span[0]))
        told = f"{json.dumps(key)}: {value}"
        if not members:
            at = self.places[span[0]][1]
            return f"{source[:at]}{told}{source[at:]}"
        name_at, _, _, last = members[-1]
        # What stands between the member before and this one's name: a space, or a continued line.
        before = members[-2][3] if len(members) > 1 else span[0] + 1
        gap = source[self.places[before - 1][1] : self.places[name_at][0]].replace(",", "", 1)
        at = self.places[last - 1][1]
        return f"{source[:at]},{gap or ' '}{told}{source[at:]}"

    def _span(self, path: tuple[str, ...]) -> tuple[int, int] | None:
        """Return a value's first and one past its last character in the JSON."""
        at = self._skip(0)
        span = (at, _DECODER.raw_decode(self.text, at)[1])
        for name in path:
            for _, key, begin, end in self._members(span[0]):
                if key == name:
                    span = (begin, end)
                    break
            else:
                return None
        return span

    def _members(self, at: int) -> Iterator[tuple[int, Any, int, int]]:
        """Yield an object's members: where the name begins, the name, where the value begins and ends."""
        at = self._skip(at + 1)
        while self.text[at] != "}":
            name_at = at
            key, at = _DECODER.raw_decode(self.text, at)
            begin = self._skip(self._skip(at) + 1)
            _, end = _DECODER.raw_decode(self.text, begin)
            yield name_at, key, begin, end
            at = self._skip(end)
            if self.text[at] == ",":
                at = self._skip(at + 1)

    def _skip(self, at: int) -> int:
        found = _SPACE.match(self.text, at)
        assert found is not None
        return found.end()
