"""The kinds of server by name."""

from __future__ import annotations

from collections.abc import Callable

from beeline.errors import ConfigError, did_you_mean
from serve.servers.litserve import LitServe
from serve.servers.mms import Mms
from serve.servers.protocol import Server
from serve.servers.torchserve import TorchServe
from serve.servers.triton import Triton

_KINDS: dict[str, Callable[[], Server]] = {"torchserve": TorchServe, "mms": Mms, "litserve": LitServe, "triton": Triton}


def named(name: str) -> Server:
    """Return the server of that name; raise ConfigError for another name."""
    if name not in _KINDS:
        raise ConfigError(f"--server is {name!r}{did_you_mean(name, _KINDS)}")
    return _KINDS[name]()
