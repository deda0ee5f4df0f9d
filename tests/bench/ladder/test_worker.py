"""The forward pass alone: with copies where the engine makes them itself, without where it can be told apart."""

from __future__ import annotations

from typing import Any

from beeline.settings import Choice
from bench.ladder.worker import _forward


class Elsewhere:
    """An engine on a CUDA device that copies there and back by itself; a stand-in where there is no device."""

    def __init__(self, device: str) -> None:
        self.choice = {"device": Choice(device, "asked for")}

    def forward(self, pixels: Any) -> Any:
        return pixels


class OnDevice(Elsewhere):
    """One that can be given what is there already."""

    def on_device(self, pixels: Any) -> Any:
        return pixels


def test_an_engine_that_cannot_be_told_apart_from_its_copies_is_measured_with_them() -> None:
    for engine in (Elsewhere("cuda:0"), Elsewhere("cpu"), OnDevice("cpu")):
        forward, brought = _forward(engine)
        assert forward == engine.forward
        assert brought(7) == 7


def test_pytorch_on_a_device_is_measured_without_copies() -> None:
    engine = OnDevice("cuda:0")
    assert _forward(engine)[0] != engine.forward
