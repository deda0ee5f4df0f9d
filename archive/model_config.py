"""A user's model-config.yaml, judged key by key, because TorchServe ignores unknown keys in silence."""

from __future__ import annotations

from pathlib import Path

import yaml

from beeline.errors import ConfigError, did_you_mean

# What TorchServe would let this file override; `config/config.properties` is the one place for it.
_OWNED = {
    "batchSize",
    "maxBatchDelay",
    "minWorkers",
    "maxWorkers",
    "jobQueueSize",
    "responseTimeout",
    "startupTimeout",
}
_ALLOWED = {"deviceType": (str,), "deviceIds": (list,), "maxRetryTimeoutInSec": (int,), "useJobTicket": (bool,)}
_REFUSED = {
    "clientTimeoutInMills": "clients whose time is over would wait forever without an answer",
    "asyncCommunication": "batches of two and more hang",
    "useVenv": "the worker would install packages when it starts",
}


def check(path: Path) -> None:
    """Refuse a file that says anything we do not serve with.

    Raises:
        ConfigError: naming the key, its value and the fix.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML ({why}); mend it or leave --model-config out") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; allowed: keys and values, as deviceType: cpu")
    for key, value in values.items():
        if key in _OWNED:
            raise ConfigError(
                f"{path} sets {key} to {value!r}, which would override config/config.properties; "
                "set it there, under models"
            )
        if key in _REFUSED:
            raise ConfigError(f"{path} sets {key} to {value!r}; leave it out: {_REFUSED[key]}")
        if key not in _ALLOWED:
            raise ConfigError(
                f"{path} has the unknown key {key!r}{did_you_mean(str(key), _ALLOWED | dict.fromkeys(_OWNED))}"
            )
        if type(value) not in _ALLOWED[key]:
            wanted = {str: "text", list: "a list", int: "a whole number", bool: "true or false"}[_ALLOWED[key][0]]
            raise ConfigError(f"{path} sets {key} to {value!r}; allowed: {wanted}")
