"""A property's value: whole numbers within their range, addresses as they are written and reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from beeline.errors import ConfigError
from serve.ports import Address
from serve.properties import load


@pytest.mark.parametrize("text", ["", "0", "101", "1.5", "two", "True"])
def test_a_number_that_is_none_or_out_of_range_says_what_is_allowed(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.properties"
    file.write_text("beeline_log_files=100\n")
    assert load(file).numbers == {"beeline_log_files": 100}
    file.write_text(f"beeline_log_files={text}\n")
    with pytest.raises(ConfigError, match="a whole number of files, 1 to 100"):
        load(file)


@pytest.mark.parametrize(
    "text", ["127.0.0.1:80", "ftp://a:1", "http://a", "http://:80", "http://a:1/path", "http://[::1"]
)
def test_an_address_that_is_none_says_how_one_looks(text: str) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        Address.parse(text)


def test_an_address_is_written_as_it_was_read_and_reached_from_here() -> None:
    assert str(Address.parse("https://[::]:8443/")) == "https://[::]:8443"
    assert str(Address.parse("http://0.0.0.0:80").local) == "http://127.0.0.1:80"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("0.0.0.0", False), ("127.evil.example", False)],
)
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert Address(host, 8080).loopback is loopback
