"""One request's row to one picture's bytes: raw body, multipart field or base64 in JSON, within limits.

A row is what both servers pass: a dict of parameter names to values. The raw body has the name `body`, a multipart
field its own (TorchServe: `ts/service.py`, MMS: `mms/service.py`). Values are bytes, or parsed JSON or text where the
server decoded them by content type.

Behind the gateway a form is a raw body too: 27 MB of half a million fields kept Multi Model Server's front end busy for
50 s and TorchServe's worker for 34.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from urllib.parse import unquote

from beeline.errors import BadEncoding, EmptyBody, TooManyBytes
from beeline.formats import kind_of
from beeline.settings import Limits

_MOST_JSON_MARKS, _MOST_PARTS, _MOST_HEAD = 1_000, 100, 512
# The first line of a form, perhaps after empty lines; no other accepted body begins with it. Each part is bounded:
# without a limit, 20 MB of empty lines took 2.3 GB and 3 s.
_OPENING = re.compile(rb"(?:\r?\n){0,2}(--[^\r\n]{1,70}?)[ \t]{0,8}(\r?\n)")
# The standard library's header parsers differ between versions of Python. A quoted value may hold semicolons; a value
# whose name ends in a star is its character set and percent-encoded text.
_DISPOSITION = re.compile(rb"^content-disposition[ \t]*:((?:[^\n]|\n[ \t])*)", re.IGNORECASE | re.MULTILINE)
_PARAMETER = re.compile(rb';\s*([\w-]+)(\*?)[\d*]*\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;]*))')
_JSON_HELP = 'allowed: {"data": "<base64>"} or {"instances": [{"b64": "<base64>"}]}'


def extract(row: object, limits: Limits) -> bytes:
    """Return the encoded picture in one request's row.

    Raises:
        EmptyBody: nothing in it. BadEncoding: JSON or base64 that is not one picture. TooManyBytes: more than
            `limits.max_bytes` after base64 is undone.
    """
    if isinstance(row, Mapping):
        row = _choose(row)
    if isinstance(row, memoryview):
        row = bytes(row)
    if isinstance(row, (bytes, bytearray)) and (opening := _OPENING.match(row)):
        row = _choose(_fields(row, opening))
    if isinstance(row, (bytes, bytearray)) and row.lstrip()[:1] in (b"{", b"["):
        row = _parse(row)
    if isinstance(row, (dict, list)):
        row = _from_json(row)
    if isinstance(row, str):
        row = _from_base64(row, limits)
    if row is None or (isinstance(row, (bytes, bytearray)) and not row):
        raise EmptyBody("the request carries no picture; send the picture's bytes as the body, or as a multipart file")
    if not isinstance(row, (bytes, bytearray)):
        raise BadEncoding(f"the request's body is a JSON {type(row).__name__}; {_JSON_HELP}")
    if len(row) > limits.max_bytes:
        raise _too_many(len(row), limits)
    return bytes(row)


def _choose(row: Mapping[object, object]) -> object:
    """Pick the value: what looks like a picture, then `data`, then `body`, else the first that holds something."""
    for value in row.values():
        if isinstance(value, (bytes, bytearray)) and kind_of(bytes(value[:16])) is not None:
            return value
    for name in ("data", "body"):
        if row.get(name):
            return row[name]
    return next((value for value in row.values() if value), None)


def _fields(body: bytes | bytearray, opening: re.Match[bytes]) -> dict[object, object]:
    """Return the parts of a multipart body (RFC 7578), files first, under their names or their places."""
    boundary, newline = opening[1], opening[2]
    delimiter = newline + boundary
    count = body.count(delimiter)
    if count > _MOST_PARTS:
        raise BadEncoding(f"the form has {count} parts; allowed: {_MOST_PARTS}, and one picture among them")
    # A form without any field is its last line alone.
    closed, start = count == 0 and boundary.endswith(b"--"), opening.end()
    parts: list[tuple[bool, str | None, bytes]] = []
    while not closed and start and (end := body.find(delimiter, start - len(newline))) >= 0:
        parts.append(_part(bytes(body[start:end]), newline))
        after = end + len(delimiter)
        closed = body[after : after + 2] == b"--"
        start = body.find(b"\n", after) + 1
    if not closed:
        raise BadEncoding("the form does not end with its boundary; send it with a common client")
    fields: dict[object, object] = {}
    for place, (_, name, data) in enumerate(sorted(parts, key=lambda part: not part[0])):
        fields[place if name is None or name in fields else name] = data
    return fields


def _part(part: bytes, newline: bytes) -> tuple[bool, str | None, bytes]:
    """Return whether a part is a file, its name and its bytes."""
    head, _, data = (b"", b"", part[len(newline) :]) if part.startswith(newline) else part.partition(2 * newline)
    line = _DISPOSITION.search(head[:_MOST_HEAD])
    parameters: dict[bytes, str] = {}
    for name, encoded, quoted, bare in _PARAMETER.findall(line[1]) if line else ():
        text = re.sub(r'\\([\\"])', r"\1", (quoted or bare.strip()).decode("utf-8", "replace"))
        parameters.setdefault(name.lower(), unquote(text.rpartition("'")[2]) if encoded else text)
    return b"filename" in parameters, parameters.get(b"name"), data


def _parse(body: bytes | bytearray) -> object:
    # The accepted forms have a handful of these, and base64 has none; millions of them become gigabytes.
    marks = body.count(b"{") + body.count(b"[") + body.count(b",")
    if marks > _MOST_JSON_MARKS:
        raise BadEncoding(f"the JSON body has {marks} brackets and commas; {_JSON_HELP}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadEncoding(f"the body looks like JSON but is none ({error}); {_JSON_HELP}") from error


def _from_json(value: dict[str, object] | list[object]) -> object:
    """Find the base64 text in a JSON body."""
    if isinstance(value, dict) and "instances" in value:
        instances = value["instances"]
        if not isinstance(instances, list) or len(instances) != 1:
            count = len(instances) if isinstance(instances, list) else f"a {type(instances).__name__}"
            raise BadEncoding(f"'instances' holds {count}; allowed: 1, since the server batches; send one a request")
        value = instances[0] if isinstance(instances[0], dict) else {"b64": instances[0]}
    if not isinstance(value, dict):
        raise BadEncoding(f"the body is a JSON {type(value).__name__}; {_JSON_HELP}")
    for key in ("data", "b64", "body"):
        found = value.get(key)
        if isinstance(found, dict):
            found = found.get("b64")
        if isinstance(found, str):
            return found
    raise BadEncoding(f"no base64 text in the JSON keys {sorted(map(str, value))[:5]}; {_JSON_HELP}")


def _from_base64(text: str, limits: Limits) -> bytes:
    """Undo base64, standard or URL-safe, with or without padding, line breaks and a `data:` prefix."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = "".join(text.split())
    if len(text) * 3 // 4 > limits.max_bytes + 2:
        raise _too_many(len(text) * 3 // 4, limits)
    text = text.translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        what = f"the text starting {text[:16]!r} is no base64 ({error})"
        raise BadEncoding(f"{what}; send base64, or the picture's bytes themselves") from error


def _too_many(size: int, limits: Limits) -> TooManyBytes:
    return TooManyBytes(f"the picture is {size} bytes; the limit is {limits.max_bytes}: scale it down or compress it")
