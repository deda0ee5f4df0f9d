"""Where the load goes: addresses as they are, roots with one model or several, wrong ones."""

from __future__ import annotations

import json

import pytest

from beeline.errors import BeelineError, Undetermined
from bench.load.plan import Plan
from bench.load.target import answer_bytes, resolve
from tests.bench.load.conftest import PICTURES, Arrival, Respond, Serve, answer


def catalog(*names: str) -> Respond:
    async def respond(arrival: Arrival) -> bytes:
        assert arrival.head.startswith("GET /catalog.json ")
        return answer(json.dumps({"models": [{"name": name} for name in names]}).encode())

    return respond


def test_a_full_address_is_kept() -> None:
    for url in ("http://127.0.0.1:1/predict", "http://127.0.0.1:1/predictions/x", "http://127.0.0.1:1/a/b?c=d"):
        assert resolve(url) == url
    assert resolve("http://127.0.0.1:1/predictions/x/2.0", "x") == "http://127.0.0.1:1/predictions/x/2.0"


def test_a_root_goes_with_the_model_that_is_named() -> None:
    assert resolve("http://127.0.0.1:1", "resnet18") == "http://127.0.0.1:1/predictions/resnet18"
    assert resolve("http://127.0.0.1:1/", "a b") == "http://127.0.0.1:1/predictions/a%20b"


def test_a_root_goes_with_its_only_model(serve: Serve) -> None:
    server = serve(catalog("ants"))
    assert resolve(server.url) == f"{server.url}/predictions/ants"


def test_what_cannot_be_decided_is_said(serve: Serve) -> None:
    async def nothing(arrival: Arrival) -> bytes:
        return answer(b"", "404 Not Found")

    with pytest.raises(BeelineError, match="serves ants, bees; add --model NAME"):
        resolve(serve(catalog("ants", "bees")).url)
    with pytest.raises(BeelineError, match="has no catalog"):
        resolve(serve(nothing).url)
    with pytest.raises(BeelineError, match="--model is 'y'"):
        resolve("http://127.0.0.1:1/predictions/x", "y")
    with pytest.raises(Undetermined, match="nothing answers"):
        resolve("http://127.0.0.1:1")


def test_one_request_tells_the_size_of_the_answer(serve: Serve) -> None:
    async def respond(arrival: Arrival) -> bytes:
        return answer(b"x" * 1000, "200 OK", "X-Some: header")

    server = serve(respond)
    assert 1000 < answer_bytes(Plan(f"{server.url}/predictions/x?y=z", PICTURES, clients=1)) < 1200
    assert server.arrivals[0].head.startswith("POST /predictions/x?y=z ")
    assert server.arrivals[0].body == PICTURES.bodies[0]


def test_a_wrong_address_is_said_before_any_load(serve: Serve) -> None:
    async def respond(arrival: Arrival) -> bytes:
        return answer(b'{"message": "Model not found: x"}', "404 Not Found")

    with pytest.raises(BeelineError, match=r"answers 404 .*Model not found: x"):
        answer_bytes(Plan(f"{serve(respond).url}/predictions/x", PICTURES, clients=1))
