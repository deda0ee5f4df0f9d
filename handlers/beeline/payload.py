"""One request's row to one picture's bytes and its prompt: raw body, form, base64 alone or in JSON, within limits.

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
from dataclasses import dataclass
from urllib.parse import unquote

from beeline.errors import BadEncoding, EmptyBody, TooManyBytes, short
from beeline.formats import HEAD, kind_of
from beeline.settings import Limits

_MOST_JSON_MARKS, _MOST_PARTS, _MOST_HEAD, _MOST_PROMPT = 1_000, 100, 512, 1_000
# The keys of a picture in JSON, and names of form fields that are taken before others. A value may be `{"b64": text}`.
_KEYS = ("data", "b64", "base64", "body", "image", "image_bytes")
_OPTIONS = ("prompt", "max_tokens")
# The first line of a form, perhaps after empty lines; no other accepted body begins with it. Each part is bounded:
# without a limit, 20 MB of empty lines took 2.3 GB and 3 s.
_OPENING = re.compile(rb"(?:\r?\n){0,2}(--[^\r\n]{1,70}?)[ \t]{0,8}(\r?\n)")
# The standard library's header parsers differ between versions of Python. A quoted value may hold semicolons; a value
# whose name ends in a star is its character set and percent-encoded text.
_DISPOSITION = re.compile(rb"^content-disposition[ \t]*:((?:[^\n]|\n[ \t])*)", re.IGNORECASE | re.MULTILINE)
_PARAMETER = re.compile(rb';\s*([\w-]+)(\*?)[\d*]*\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;]*))')
_JSON_HELP = 'allowed: {"data": "<base64>"} or {"instances": [{"b64": "<base64>"}]}'


@dataclass(frozen=True)
class Payload:
    """What one request carries: an encoded picture, and `prompt` and `max_tokens` beside it in JSON or in a form."""

    picture: bytes
    prompt: str = ""
    max_tokens: int | None = None


def extract(row: object, limits: Limits) -> Payload:
    """Return the encoded picture in one request's row, its prompt of at most 1,000 characters and its `max_tokens`.

    Raises:
        EmptyBody: nothing in it. BadEncoding: JSON or base64 that is not one picture. TooManyBytes: more than
            `limits.max_bytes` after base64 is undone.
    """
    more: dict[object, object] = {}
    if isinstance(row, Mapping):
        row, more = _choose(row)
    if isinstance(row, memoryview):
        row = bytes(row)
    if isinstance(row, (bytes, bytearray)) and (opening := _OPENING.match(row)):
        row, more = _choose(_fields(row, opening))
    if isinstance(row, (bytes, bytearray)) and kind_of(bytes(row[:HEAD])) is None:
        row = _decode_text(row)
    if isinstance(row, (dict, list)):
        row, beside = _from_json(row)
        more = {**more, **beside}
    if isinstance(row, str):
        row = _from_base64(row, limits)
    if row is None or (isinstance(row, (bytes, bytearray)) and not row):
        raise EmptyBody("the request carries no picture; send the picture's bytes as the body, or as a multipart file")
    if not isinstance(row, (bytes, bytearray)):
        raise BadEncoding(f"the request's body is a JSON {type(row).__name__}; {_JSON_HELP}")
    if len(row) > limits.max_bytes:
        raise _too_many(len(row), limits)
    return Payload(bytes(row), _prompt(more.get("prompt")), _max_tokens(more.get("max_tokens")))


def _prompt(value: object) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, (bytes, bytearray)) else value or ""
    if not isinstance(text, str) or len(text) > _MOST_PROMPT:
        raise BadEncoding(f"the prompt is {short(text, 40)!r}; send a text of at most {_MOST_PROMPT} characters")
    return text


def _max_tokens(value: object) -> int | None:
    text = value.decode("utf-8", "replace") if isinstance(value, (bytes, bytearray)) else str(value)
    if value is not None and not re.fullmatch("[0-9]{1,8}", text):
        raise BadEncoding(f"max_tokens is {text[:20]!r}; send a whole number")
    return None if value is None else int(text)


def _choose(row: Mapping[object, object]) -> tuple[object, dict[object, object]]:
    """Pick the picture: what looks like one, then by `_KEYS`, else the first that holds something; and `_OPTIONS`."""
    values = {name: value for name, value in row.items() if value}
    pictures = [value for value in values.values() if _is_picture(value)]
    if len(pictures) > 1:
        raise BadEncoding(f"the request has {len(pictures)} pictures; send one a request, since the server batches")
    more: dict[object, object] = {
        name: values.pop(name) for name in _OPTIONS if name in values and values[name] not in pictures
    }
    ordered = (values[name] for name in _KEYS if name in values)
    return next(iter((*pictures, *ordered, *values.values())), None), more


def _is_picture(value: object) -> bool:
    """Whether a value begins like a picture, as bytes or in base64."""
    head = value[:HEAD].encode("utf-8", "replace") if isinstance(value, str) else value
    return isinstance(head, (bytes, bytearray)) and (_has_header(bytes(head[:HEAD])) or _is_base64(bytes(head[:HEAD])))


def _has_header(head: bytes) -> bool:
    # Text may begin with the two letters of BMP, and has no zero byte, which every picture's header has.
    return kind_of(head) is not None and b"\0" in head


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
    if (files := sum(is_file and bool(data) for is_file, _, data in parts)) > 1:
        raise BadEncoding(f"the form has {files} files; send one picture a request, since the server batches")
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


def _is_base64(head: bytes) -> bool:
    """Whether text begins like a picture in base64, or like a data URI; letters alone could be any text."""
    text = b"".join(head.removeprefix(b"\xef\xbb\xbf").lstrip(b"'\"").split())
    if text.startswith(b"data:") and b";base64," in text:
        return True
    text = text[: len(text) // 4 * 4].translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return _has_header(base64.b64decode(text, validate=True))
    except binascii.Error:
        return False


def _decode_text(body: bytes | bytearray) -> object:
    """Return parsed JSON, or base64 as text; any other body unchanged."""
    # UTF-16 has its byte-order mark, or a zero beside the bracket.
    has_mark = body.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = body.decode("utf-16", "replace").encode() if has_mark else body
    head = bytes(text.lstrip()[:HEAD]).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] in (b"{", b"[", b'"') or head[:2] in (b"\0{", b"\0["):
        return _parse(text)
    return text.decode("utf-8-sig", "replace") if _is_base64(head) else body


def _parse(body: bytes | bytearray) -> object:
    # The accepted forms have a handful of these, and base64 has none; millions of them become gigabytes.
    marks = body.count(b"{") + body.count(b"[") + body.count(b",")
    if marks > _MOST_JSON_MARKS:
        raise BadEncoding(f"the JSON body has {marks} brackets and commas; {_JSON_HELP}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadEncoding(f"the body looks like JSON but is none ({error}); {_JSON_HELP}") from error


def _from_json(value: dict[str, object] | list[object]) -> tuple[object, dict[object, object]]:
    """Find the base64 text in a JSON body, and `_OPTIONS` beside it."""
    more: dict[object, object] = {}
    if isinstance(value, dict) and "instances" in value:
        more, instances = {key: value[key] for key in _OPTIONS if key in value}, value["instances"]
        if not isinstance(instances, list) or len(instances) != 1:
            count = len(instances) if isinstance(instances, list) else f"a {type(instances).__name__}"
            raise BadEncoding(f"'instances' holds {count}; allowed: 1, since the server batches; send one a request")
        value = instances[0] if isinstance(instances[0], dict) else {"b64": instances[0]}
    if not isinstance(value, dict):
        raise BadEncoding(f"the body is a JSON {type(value).__name__}; {_JSON_HELP}")
    found = {key: each.get("b64") if isinstance(each := value.get(key), dict) else each for key in _KEYS}
    texts: dict[object, object] = {key: each for key, each in found.items() if isinstance(each, str)}
    if not texts:
        raise BadEncoding(f"no base64 text in the JSON keys {sorted(map(str, value))[:5]}; {_JSON_HELP}")
    return _choose(texts)[0], {**more, **{key: value[key] for key in _OPTIONS if key in value}}


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
