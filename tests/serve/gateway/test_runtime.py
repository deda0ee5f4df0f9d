"""nginx's configuration as it is written, without nginx."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from serve.gateway import runtime
from serve.gateway.settings import Backend, Tls
from serve.ports import Address
from tests.serve.gateway.conftest import settings_of


def written(folder: Path, name: str, **changes: Any) -> str:
    """Return one file of the configuration for these settings."""
    settings = settings_of(folder, **changes)
    runtime.lay_out(settings)
    return (settings.folder / "settings" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("deadline", [1, 5, 60, 600])
def test_the_times_of_a_prediction_add_up_to_its_deadline(tmp_path: Path, deadline: int) -> None:
    times = re.findall(r"proxy_(\w+)_timeout (\d+)ms;", written(tmp_path, "limits.conf", deadline=deadline))
    assert [name for name, _ in times] == ["next_upstream", "connect", "send", "read"]
    assert sum(int(milliseconds) for _, milliseconds in times) == 1000 * deadline
    assert all(int(milliseconds) > 0 for _, milliseconds in times)
    # Most of it is for the server.
    assert int(times[-1][1]) >= 600 * deadline


@pytest.mark.parametrize(
    ("version", "lines"),
    [
        ("1.25.0", ["listen 127.0.0.1:8443 ssl http2 backlog=1024;"]),
        ("1.25.1", ["listen 127.0.0.1:8443 ssl backlog=1024;", "http2 on;"]),
    ],
)
def test_http2_is_switched_on_in_the_form_of_this_nginx(tmp_path: Path, version: str, lines: list[str]) -> None:
    tls = Tls(Address("127.0.0.1", 8443, "https"), Path("/chain.pem"), Path("/key.pem"))
    text = written(tmp_path, "listen.conf", listen=(), tls=tls, version=version)
    assert text.splitlines()[: len(lines)] == lines


def test_an_address_of_ipv6_has_brackets(tmp_path: Path) -> None:
    listen = (Address("::1", 8080), Address("::", 8000))
    lines = written(tmp_path, "listen.conf", listen=listen).splitlines()
    assert [line.split()[1] for line in lines] == ["[::1]:8080", "[::]:8000"]


def test_a_class_of_size_has_the_places_that_the_heap_holds_and_no_more_than_the_queue(tmp_path: Path) -> None:
    text = written(
        tmp_path, "upstream.conf", places={260_000: 300, 0: 2}, in_flight=7, backends=(Backend("http://a:1", ""),)
    )
    held = dict(re.findall(r"upstream (\w+) .*?max_conns=(\d+)", text, re.DOTALL))
    assert held["predictions_260000"] == held["predictions_1000000"] == "7"
    assert held["predictions_0"] == "2"
