"""Every way a picture may come in, and every way it may not."""

from __future__ import annotations

import base64
import json
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beeline.errors import BadEncoding, EmptyBody, RequestError, TooManyBytes
from beeline.payload import Payload, extract
from beeline.settings import Limits

DATA = b"\xff\xd8\xff" + bytes(range(256))
B64 = base64.b64encode(DATA).decode()
B64_JSON = json.dumps({"data": B64}).encode()
LIMITS = Limits(max_bytes=1000)


def form(*parts: tuple[str, bytes], boundary: str = "----x", end: bytes = b"--\r\n") -> bytes:
    """Return a multipart body of parts, each a disposition and its bytes."""
    line = f"--{boundary}".encode()
    body = b"".join(
        line + f"\r\nContent-Disposition: form-data; {each}\r\n\r\n".encode() + data + b"\r\n" for each, data in parts
    )
    return body + line + end


FILE = 'name="upload"; filename="a.jpg"\r\nContent-Type: image/jpeg'


@pytest.mark.parametrize(
    "row",
    [
        {"body": DATA},
        {"data": DATA},
        {"caption": "", "upload": DATA},
        {"note": b"hello", "picture": DATA},
        {"data": B64},
        {"body": {"instances": [{"data": {"b64": B64}}]}},
        {"body": {"instances": [B64]}},
        {"body": json.dumps({"data": B64}).encode()},
        {"body": bytearray(b" \n" * 50 + json.dumps({"instances": [{"b64": B64}]}).encode())},
        {"body": {"data": B64.rstrip("=")}},
        {"body": {"data": base64.urlsafe_b64encode(DATA).decode()}},
        {"body": {"data": base64.encodebytes(DATA).decode()}},
        {"body": {"data": f"data:image/jpeg;base64,{B64}"}},
        DATA,
        # The gateway passes a form on as it is.
        {"body": form((FILE, DATA))},
        {"body": bytearray(form(('name="note"', b"hello"), (FILE, DATA)))},
        {"body": form(('name="note"', b"hello"), ('filename="name=note"; name=data', DATA))},
        {"body": form(('name="data"', B64_JSON), boundary="b")},
        {"body": form((FILE, DATA), end=b"--\r\nan epilogue\r\n")},
        {"body": form((FILE, DATA), boundary="x--")},
        {"body": b"\r\n" + form((FILE, DATA))},
        {"body": form((FILE, DATA)).replace(b"\r\n", b"\n")},
        {"body": form((FILE, DATA)).replace(b"------x\r\n", b"------x \t\r\n")},
        {"body": form(('name="brand"', b"BMW"), (FILE, DATA))},
        {"body": form(("", DATA), ("", b"{}"))},
        {"body": form(('name="shot;1"', DATA), ('name="shot;2"', b"x"), ('name="shot;1"', b"y"))},
        {"body": form(("name*=utf-8''picture; filename*=utf-8''%E4.jpg", DATA))},
        # The name chooses the field, however it is written.
        {"body": form(('name="note"', b"hello"), ("name*=utf-8''d%61ta", B64_JSON))},
        {"body": form(('name="note"', b"hello"), ("NAME = data ", B64_JSON))},
        {"body": form(('name="note"', b"hello"), ('size=3;\r\n name="data"', B64_JSON))},
        {"body": form(('title="\\"; name=data"; name="note"', b"hello"), ("name=data", B64_JSON))},
        {"body": form(('a*0="b"; a*="c"', DATA))},
        {"body": form(*[(f'name="{number}"', b"x") for number in range(99)], (FILE, DATA))},
        {"body": B64.encode()},
        {"body": bytearray(b"\n" + base64.encodebytes(DATA))},
        {"body": b"data:image/jpeg;base64," + B64.encode()},
        {"body": json.dumps(B64).encode()},
        {"body": form(('name="model"', b"resnet18"), ('name="picture"', B64.encode()))},
        {"body": form(('name="note"', b"hello"), ('name="image"', b"data:;base64," + B64.encode()))},
        {"model": b"resnet18", "picture": B64.encode()},
        # Byte-order marks and UTF-16, as .NET and PowerShell write JSON.
        {"body": b"\xef\xbb\xbf" + B64_JSON},
        *({"body": B64_JSON.decode().encode(encoding)} for encoding in ("utf-16", "utf-16-le", "utf-16-be")),
        {"body": B64.encode("utf-16")},
        *({"body": {key: B64}} for key in ("image", "base64")),
        *({"body": {key: {"b64": B64}, "key": "1"}} for key in ("image", "image_bytes")),
        {"body": {"signature_name": "serving_default", "instances": [{"image_bytes": {"b64": B64}}]}},
        {"body": {"image": "cat.jpg", "b64": B64}},
        {"body": form(('name="prompt"; filename="a.jpg"', DATA))},
    ],
    ids=lambda row: str(row)[:60],
)
def test_the_same_bytes_come_out(row: object) -> None:
    assert extract(row, LIMITS).picture == DATA


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ({}, EmptyBody, "no picture"),
        ({"body": b""}, EmptyBody, "no picture"),
        ({"body": None}, EmptyBody, "no picture"),
        (None, EmptyBody, "no picture"),
        ({"body": form(('name="upload"', b""))}, EmptyBody, "no picture"),
        ({"body": form(*[('name="a"', b"x")] * 101)}, BadEncoding, "101 parts"),
        ({"body": form((FILE, DATA), end=b"")}, BadEncoding, "does not end"),
        ({"body": form((FILE, DATA)).partition(b"\r\n------x--")[0]}, BadEncoding, "does not end"),
        ({"body": b"--b--\r\n"}, EmptyBody, "no picture"),
        ({"body": {"data": ""}}, EmptyBody, "no picture"),
        ({"body": {"dat": B64}}, BadEncoding, "dat"),
        ({"body": [B64]}, BadEncoding, "list"),
        ({"body": {"instances": []}}, BadEncoding, "holds 0"),
        ({"body": {"instances": [{"b64": B64}] * 2}}, BadEncoding, "holds 2"),
        ({"body": {"data": "no base64!"}}, BadEncoding, "no base64"),
        ({"body": b'{"data": '}, BadEncoding, "JSON"),
        ({"body": b"[" * 100_000}, BadEncoding, "100000 brackets"),
        ({"body": b"[" * 999}, BadEncoding, "JSON"),
        ({"body": 3.5}, BadEncoding, "float"),
        ({"body": form((FILE, DATA), ('name="b"; filename="b"', b"x"))}, BadEncoding, "the form has 2 files"),
        ({"body": form(('name="a"', DATA), ('name="b"', B64.encode()))}, BadEncoding, "has 2 pictures"),
        ({"body": {"data": B64, "image": B64}}, BadEncoding, "has 2 pictures"),
        ({"body": b'"' + B64.encode()}, BadEncoding, "looks like JSON"),
        ({"body": "\ufeff{".encode("utf-16-le")}, BadEncoding, "looks like JSON"),
        ({"body": {"data": B64, "prompt": 7}}, BadEncoding, "prompt is '7'; send a text"),
        ({"body": form((FILE, DATA), ('name="prompt"', b"x" * 1001))}, BadEncoding, "at most 1000 characters"),
        ({"body": b"[" + b"{}," * 1000 + b"{}]"}, BadEncoding, "brackets and commas"),
        ({"body": b"x" * 1001}, TooManyBytes, "1001 bytes; the limit is 1000"),
        ({"body": {"data": base64.b64encode(b"x" * 1001).decode()}}, TooManyBytes, "the limit is 1000"),
    ],
)
def test_a_refusal_says_why(row: object, error: type[RequestError], words: str) -> None:
    with pytest.raises(error, match=words):
        extract(row, LIMITS)


@pytest.mark.parametrize(
    "row",
    [
        {"body": json.dumps({"image": B64, "prompt": "a photo \u00e9"}).encode()},
        {"body": json.dumps({"instances": [{"b64": B64, "prompt": "a photo \u00e9"}]}).encode()},
        {"body": json.dumps({"instances": [B64], "prompt": "a photo \u00e9"}).encode()},
        {"body": form(('name="prompt"', "a photo \u00e9".encode()), (FILE, DATA))},
        {"body": form(('name="prompt"', "a photo \u00e9".encode()), ('name="x"', B64_JSON))},
        {"prompt": "a photo \u00e9".encode(), "upload": DATA},
    ],
    ids=lambda row: str(row)[:60],
)
def test_a_prompt_stands_beside_the_picture(row: object) -> None:
    assert extract(row, LIMITS) == Payload(DATA, "a photo \u00e9")


@pytest.mark.parametrize("text", [b"no picture", b"<html>", b"word/word", b"3.5", b"%PDF-1.7", b"BM" + b"x" * 90])
def test_what_fits_no_form_is_judged_as_a_picture(text: bytes) -> None:
    assert extract({"body": text}, LIMITS) == Payload(text)


def test_a_picture_of_exactly_the_limit_passes_in_every_encoding() -> None:
    for size in range(997, 1001):
        data = b"\xff" * size
        assert extract({"body": data}, LIMITS).picture == data
        assert extract({"body": {"data": base64.b64encode(data).decode()}}, LIMITS).picture == data


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.binary(), st.lists, max_leaves=5))
def test_any_row_gives_bytes_or_a_request_error(value: object) -> None:
    for row in (value, {"body": value}, {"any": value}, {"body": {"instances": value}}, {"body": {"data": value}}):
        try:
            assert isinstance(extract(row, LIMITS).picture, bytes)
        except RequestError as error:
            assert 400 <= error.status < 500


@pytest.mark.parametrize(
    "body",
    [b"\n" * 20_000_000, b"\r\n" * 10_000_000, b"--x" + b" " * 20_000_000, b"--" + b"\t " * 10_000_000],
    ids=["lines", "empty lines", "padding", "blanks"],
)
def test_a_body_that_only_begins_like_a_form_costs_no_memory(body: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooManyBytes):
        extract({"body": body}, LIMITS)
    # Kilobytes: the body and a copy, not the gigabytes of a pattern that tries every line again.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
