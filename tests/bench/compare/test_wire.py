"""What each server is sent, and what is read from its answers."""

import base64
import email
import email.policy
import json

import pytest

from bench.compare.wire import base64_json, form, raw, triton
from bench.pictures import Pictures

DATA = b"\xff\xd8\xff picture \r\n--beeline"


def test_raw_is_the_picture() -> None:
    assert raw("/x").encode(DATA) == DATA


def test_base64_is_in_a_json_object() -> None:
    assert base64.b64decode(json.loads(base64_json("/x", "image_data").encode(DATA))["image_data"]) == DATA


def test_a_form_is_read_by_a_parser_of_forms() -> None:
    wire = form("/x", "file")
    head = f"Content-Type: {wire.headers['Content-Type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + wire.encode(DATA), policy=email.policy.HTTP)
    (part,) = message.iter_parts()
    assert part.get_param("name", header="content-disposition") == "file"
    assert part.get_payload(decode=True) == DATA


@pytest.mark.parametrize("size", [1, 1000, 2_000_000])
def test_tritons_header_length_holds_for_every_picture(size: int) -> None:
    wire = triton("classifier")
    body = wire.encode(b"x" * size)
    length = int(wire.headers["Inference-Header-Content-Length"])
    told = json.loads(body[:length])
    tensor = body[length:]
    assert told["inputs"][0]["parameters"]["binary_data_size"] == len(tensor) == size + 4
    assert int.from_bytes(tensor[:4], "little") == size


def test_the_best_label_is_read_whatever_the_order() -> None:
    assert raw("/x").read(b'{"ants": 0.9, "bees": 0.1}') == "ants"
    assert raw("/x").read(b'{"ants": 0.1, "bees": 0.9}') == "bees"
    assert form("/x", "f", in_list=True).read(b'[{"bees": 0.9}]') == "bees"
    assert triton("m").read(b'{"outputs": [{"name": "label", "data": ["ants"]}]}') == "ants"


@pytest.mark.parametrize("body", [b"", b"no", b"{}", b"[]", b"3"])
def test_an_answer_without_a_label_is_a_value_error(body: bytes) -> None:
    for wire in (raw("/x"), form("/x", "f", in_list=True), triton("m")):
        with pytest.raises(ValueError, match=r"label|JSON|Expecting"):
            wire.read(body)


def test_pictures_become_bodies_in_order() -> None:
    sent = base64_json("/x", "k").pictures(Pictures("folder", ("a", "b"), (b"1", b"2")))
    assert sent.names == ("a", "b")
    assert [base64.b64decode(json.loads(body)["k"]) for body in sent.bodies] == [b"1", b"2"]
