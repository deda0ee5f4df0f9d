"""Pictures by URL: every way around the list of hosts and the check of addresses, on loopback with a fake DNS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.gateway.urls import Fetcher, Refused, is_public
from tests.conftest import RED
from tests.serve.gateway.conftest import certificate, settings_of
from tests.serve.gateway.fake_web import Names, Web


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    started = Web()
    yield started
    started.stop()


def ask(
    web: Web, url: object, address: str = "", public: Any = is_public, hosts: tuple[str, ...] = (), **changes: Any
) -> Any:
    """Fetch with a DNS that says `address`, or the system's; return the bytes, or status and sentence."""
    names = Names(lambda host: [address]) if address else None
    listed = hosts or (f"pictures.test:{web.port}", "pictures.test")
    given = {"url_hosts": listed, "url_http": True, "url_seconds": 1, **changes}

    async def fetch() -> bytes:
        fetcher = Fetcher(settings_of(Path("/nowhere"), **given), names, public)
        try:
            return await fetcher.fetch(url, lambda size: None)
        finally:
            await fetcher.close()

    try:
        return asyncio.run(fetch())
    except Refused as error:
        return error.status, error.values["message"]


def several(web: Web, addresses: Any, count: int) -> list[Any]:
    """Fetch so often with one fetcher; return the bytes, or the status, of each."""

    async def fetch() -> list[Any]:
        given = {"url_hosts": (f"pictures.test:{web.port}",), "url_http": True}
        fetcher = Fetcher(settings_of(Path("/nowhere"), **given), Names(addresses), is_fine)
        out: list[Any] = []
        for _ in range(count):
            try:
                out.append(await fetcher.fetch(web.url("red.png"), lambda size: None))
            except Refused as error:
                out.append(error.status)
        await fetcher.close()
        return out

    return asyncio.run(fetch())


def is_fine(address: str) -> bool:
    return address == "127.0.0.1"


def fetched(web: Web, path: str, **changes: Any) -> Any:
    return ask(web, web.url(path), "127.0.0.1", public=is_fine, **changes)


@pytest.mark.parametrize(
    ("url", "status"),
    [
        # Other hosts, and texts in which readers of URLs disagree on the host.
        ("https://other.test/a.png", 403),
        ("https://pictures.test.other.test/", 403),
        ("https://otherpictures.test/", 403),
        ("https://127.0.0.1#@pictures.test/", 403),
        ("https://127.0.0.1?@pictures.test/", 403),
        ("https://127.0.0.1/pictures.test", 403),
        ("https://pictures.test@127.0.0.1/", 400),
        ("https://pictures.test:x@127.0.0.1/", 400),
        ("https://127.0.0.1\\@pictures.test/", 400),
        ("https://pictures.test\\@127.0.0.1/", 400),
        ("https://pictures.test%00.other.test/", 403),
        ("https://①②⑦.⓪.⓪.①/", 403),
        ("//127.0.0.1/", 403),
        # Other schemes and ports.
        ("file:///etc/passwd", 403),
        ("gopher://pictures.test/_x", 403),
        ("ftp://pictures.test/a.png", 403),
        ("dict://pictures.test:11211/stat", 403),
        ("data:image/png;base64,iVBORw0KGgo=", 403),
        ("https://pictures.test:22/", 403),
        ("https://pictures.test:99999/", 400),
        # No URL.
        ("", 403),
        (7, 400),
        (["https://pictures.test/"], 400),
        ("https://pictures.test/" + "a" * 2048, 400),
        ("https://[::1/", 400),
        ("https://", 403),
    ],
)
def test_only_the_hosts_and_schemes_on_the_list_are_asked(web: Web, url: object, status: int) -> None:
    """The fake DNS would lead all of them to a server that counts."""
    before = web.other.connections
    answer = ask(web, url, "127.0.0.2", public=lambda address: True)
    assert answer[0] == status, answer
    assert web.other.connections == before


def test_http_is_refused_unless_it_is_allowed(web: Web) -> None:
    assert fetched(web, "red.png") == RED
    status, sentence = fetched(web, "red.png", url_http=False)
    assert (status, sentence) == (403, "the URL begins with 'http'; allowed: https")


def test_hosts_match_as_a_whole_or_below_a_star(web: Web) -> None:
    port = web.port
    for name, hosts, status in (
        ("a.test", (f"*.test:{port}",), 200),
        ("A.TEST.", (f"a.test:{port}",), 200),
        ("test", (f"*.test:{port}",), 403),
        ("a.test", ("a.test",), 403),
        ("a.test", (f"b.test:{port}",), 403),
    ):
        answer = ask(web, web.url("red.png", name), "127.0.0.1", public=is_fine, hosts=hosts)
        assert (200 if answer == RED else answer[0]) == status, (name, hosts, answer)


PRIVATE = {
    "this machine": "127.0.0.1 127.8.8.8 0.0.0.0 0.1.2.3 ::1 ::",
    "a private network": "10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 fc00::1 fd12:3456::1 fec0::1",
    "link-local": "169.254.0.1 fe80::1 fe80::1%lo",
    "a cloud's metadata": "169.254.169.254 fd00:ec2::254 100.100.100.200 192.0.0.192 168.63.129.16",
    "an IPv4 address in IPv6": "::ffff:127.0.0.1 ::ffff:7f00:1 ::127.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1 "
    "64:ff9b:1::7f00:1 2001:0:7f00:1:: ::ffff:0:127.0.0.1",
    "many machines or none": "224.0.0.1 255.255.255.255 240.0.0.1 ff02::1 192.0.2.1 198.51.100.1 203.0.113.1 "
    "198.18.0.1 2001:db8::1 3fff::1 100::1 5f00::1",
}
EACH = [(kind, address) for kind, addresses in PRIVATE.items() for address in addresses.split()]


@pytest.mark.parametrize(("kind", "address"), EACH)
def test_a_listed_name_that_leads_to_a_private_address_is_refused(web: Web, kind: str, address: str) -> None:
    status, sentence = ask(web, web.url("red.png"), address)
    assert status == 403, kind
    assert sentence == f"pictures.test:{web.port} is refused, since its address {address} is not public; " + (
        "send the picture itself"
    )


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("host", "listed", "status"),
    [
        # Numbers that C, and so the system's resolver, reads as 127.0.0.1.
        *((host, host, 400) for host in ("2130706433", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0")),
        *((host, host, 403) for host in ("0x7f000001", "0x7f.0.0.1", "0x7f.1", "localhost", "127.0.0.1")),
        ("[::1]", "::1", 403),
        ("[0:0:0:0:0:0:0:1]", "::1", 403),
        ("[::]", "::", 403),
        ("[::ffff:127.0.0.1]", "::ffff:7f00:1", 403),
        ("①②⑦.⓪.⓪.①", "127.0.0.1", 403),
    ],
)
def test_every_form_of_an_address_is_refused_even_if_it_is_listed(
    web: Web, host: str, listed: str, status: int
) -> None:
    """Without a fake DNS."""
    asked = len(web.seen)
    answer = ask(web, web.url("red.png", host), hosts=(f"{listed}:{web.port}",))
    assert answer[0] == status, answer
    assert len(web.seen) == asked


def test_a_name_that_changes_its_address_is_judged_at_each_connection(web: Web) -> None:
    """The check is of the address that is connected to, so nothing happens between the two."""
    before = web.other.connections
    answers = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.1"]]
    assert [*several(web, lambda host: answers.pop(0), 3)] == [RED, 403, RED]
    assert web.other.connections == before


def test_of_several_addresses_only_public_ones_are_connected_to(web: Web) -> None:
    before = web.other.connections
    assert several(web, lambda host: ["127.0.0.2", "127.0.0.1"], 1) == [RED]
    assert web.other.connections == before


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(web: Web, status: int) -> None:
    before = web.other.connections
    answer = fetched(web, f"status/{status}")
    assert answer == (
        424,
        f"pictures.test:{web.port} answers {status}, and redirects are not followed; give the address of a picture",
    )
    assert web.other.connections == before


def test_no_proxy_and_no_password_of_the_environment_is_used(
    web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = web.other.connections
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.2:{web.port}")
    (tmp_path / "netrc").write_text("machine pictures.test login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert fetched(web, "red.png") == RED
    assert web.other.connections == before
    assert not {"Authorization", "Cookie", "Referer"} & web.headers[-1].keys()


@pytest.mark.parametrize("path", ["length/70001", "length/99999999999999", "endless"])
def test_too_many_bytes_are_not_read(web: Web, path: str) -> None:
    web.broken.clear()
    status, sentence = fetched(web, path)
    assert status == 413
    assert "over 70000 bytes" in str(sentence)
    assert path != "endless" or web.broken.wait(10)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("slow", "has not sent it within 1 seconds (beeline_url_seconds); try again, or send the picture"),
        ("drip", "has not sent it within 1 seconds (beeline_url_seconds); try again, or send the picture"),
        ("cut", "breaks off"),
        ("status/404", "answers 404; give the address of a picture"),
        ("status/500", "answers 500; give the address of a picture"),
    ],
)
def test_a_host_that_fails_is_a_424_that_names_it(web: Web, path: str, sentence: str) -> None:
    status, said = fetched(web, path)
    assert status == 424
    assert str(said).startswith(f"pictures.test:{web.port} ")
    assert sentence in str(said)


def test_nothing_is_unpacked(web: Web) -> None:
    assert fetched(web, "packed") == b"\x1f\x8b packed"
    assert web.headers[-1]["Accept-Encoding"] == "identity"


def test_a_name_that_is_not_there_and_a_closed_port_are_424(web: Web) -> None:
    assert ask(web, "https://pictures.test/", "127.0.0.3", public=lambda address: True)[0] == 424
    assert ask(web, "http://no-such-name.invalid/", hosts=("no-such-name.invalid",))[0] == 424


def test_https_needs_a_certificate_that_is_trusted(tmp_path: Path) -> None:
    secure = Web()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate(tmp_path))
    secure.server.socket = context.wrap_socket(secure.server.socket, server_side=True)
    status, sentence = ask(secure, secure.url("red.png").replace("http:", "https:"), "127.0.0.1", public=is_fine)
    secure.stop()
    assert status == 424
    assert "certificate" in sentence
    assert secure.seen == []
