"""A property's value: whole numbers within their range, addresses as they are written and reached."""

from __future__ import annotations

import pytest

from serve.ports import Address
from serve.properties import Whole


@pytest.mark.parametrize("text", ["", "0", "9", "1.5", "two", "True"])
def test_a_number_that_is_none_or_out_of_range_says_what_is_allowed(text: str) -> None:
    assert Whole(1, 8, "requests").parse("8") == 8
    with pytest.raises(ValueError, match="a whole number of requests, 1 to 8"):
        Whole(1, 8, "requests").parse(text)


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
