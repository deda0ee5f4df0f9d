"""What each server is sent, and what is read from its answers."""

import base64
import email
import email.policy
import json

import pytest

from bench.compare.wire import base64_json, form, raw, triton
from bench.pictures import Pictures

DATA = b"\xff\xd8\xff picture \r\n--beeline"


def test_a_picture_is_sent_raw_in_base64_or_as_a_form_that_a_parser_reads() -> None:
    assert raw("/x").encode(DATA) == DATA
    sent = base64_json("/x", "image_data").pictures(Pictures("folder", ("a", "b"), (DATA, b"2")))
    assert sent.names == ("a", "b")
    assert [base64.b64decode(json.loads(body)["image_data"]) for body in sent.bodies] == [DATA, b"2"]
    wire = form("/x", "file")
    head = f"Content-Type: {wire.headers['Content-Type']}\r\n\r\n".encode()
    (part,) = email.message_from_bytes(head + wire.encode(DATA), policy=email.policy.HTTP).iter_parts()
    assert part.get_param("name", header="content-disposition") == "file"
    assert part.get_payload(decode=True) == DATA


@pytest.mark.parametrize("size", [1, 2_000_000])
def test_tritons_header_length_holds_for_every_picture(size: int) -> None:
    wire = triton("classifier")
    body = wire.encode(b"x" * size)
    length = int(wire.headers["Inference-Header-Content-Length"])
    tensor = body[length:]
    assert json.loads(body[:length])["inputs"][0]["parameters"]["binary_data_size"] == len(tensor) == size + 4
    assert int.from_bytes(tensor[:4], "little") == size


def test_the_best_label_is_read_whatever_the_order_and_an_answer_without_one_is_a_value_error() -> None:
    assert raw("/x").read(b'{"ants": 0.9, "bees": 0.1}') == "ants"
    assert raw("/x").read(b'{"ants": 0.1, "bees": 0.9}') == "bees"
    assert form("/x", "f", in_list=True).read(b'[{"bees": 0.9}]') == "bees"
    assert triton("m").read(b'{"outputs": [{"name": "label", "data": ["ants"]}]}') == "ants"
    for wire in (raw("/x"), form("/x", "f", in_list=True), triton("m")):
        for body in (b"", b"no", b"{}", b"[]", b"3"):
            with pytest.raises(ValueError, match=r"label|JSON|Expecting"):
                wire.read(body)
