"""The kinds of server by name."""

from __future__ import annotations

import pkgutil

from beeline.errors import ConfigError, did_you_mean
from serve.servers.protocol import Server

# Module and class of each; only the one that is used is imported.
_KINDS = {
    "torchserve": "torchserve:TorchServe",
    "mms": "mms:Mms",
    "litserve": "litserve:LitServe",
    "triton": "triton:Triton",
}


def named(name: str) -> Server:
    """Return the server of that name; raise ConfigError for another name."""
    if name not in _KINDS:
        raise ConfigError(f"--server is {name!r}{did_you_mean(name, _KINDS)}")
    kind: type[Server] = pkgutil.resolve_name(f"serve.servers.{_KINDS[name]}")
    return kind()
