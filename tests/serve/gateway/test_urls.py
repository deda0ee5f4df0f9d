"""Pictures by URL: every way around the list of hosts and the check of addresses, on loopback with a fake DNS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.gateway.urls import Fetcher, Refused, is_public
from tests.conftest import RED
from tests.serve.gateway.conftest import certificate, settings_of
from tests.serve.gateway.fake_web import Names, Web


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    """The pictures, and on 127.0.0.2 what must not be reached."""
    started = Web()
    yield started
    started.stop()
    assert not started.other.connections


def is_fine(address: str) -> bool:
    return address == "127.0.0.1"


def ask(
    web: Web,
    *urls: object,
    dns: Callable[[str], list[str]] | None = lambda host: ["127.0.0.1"],
    public: Callable[[str], bool] = is_fine,
    hosts: tuple[str, ...] = (),
    **changes: Any,
) -> list[Any]:
    """Fetch with one fetcher; return the bytes, or status and sentence, of each."""
    listed = hosts or (f"pictures.test:{web.port}", "pictures.test")
    given = {"url_hosts": listed, "url_http": True, "url_seconds": 1, **changes}

    async def fetch() -> list[Any]:
        fetcher = Fetcher(settings_of(Path("/nowhere"), **given), dns and Names(dns), public)
        out: list[Any] = []
        for url in urls:
            try:
                out.append(await fetcher.fetch(url, lambda size: None))
            except Refused as error:
                out.append((error.values["code"], error.values["message"]))
        await fetcher.close()
        return out

    return asyncio.run(fetch())


REFUSED = {
    # Other hosts, and texts in which readers of URLs disagree on the host.
    403: "https://other.test/a.png https://pictures.test.other.test/ https://otherpictures.test/ //127.0.0.1/ "
    "https://127.0.0.1#@pictures.test/ https://127.0.0.1?@pictures.test/ https://127.0.0.1/pictures.test "
    "https://pictures.test%00.other.test/ https://①②⑦.⓪.⓪.①/ https:// "
    # Other schemes and ports.
    "file:///etc/passwd gopher://pictures.test/_x ftp://pictures.test/a.png dict://pictures.test:11211/stat "
    "data:image/png;base64,iVBORw0KGgo= https://pictures.test:22/",
    # No URL, or one with a user.
    400: "https://pictures.test@127.0.0.1/ https://pictures.test:x@127.0.0.1/ https://127.0.0.1\\@pictures.test/ "
    "https://pictures.test\\@127.0.0.1/ https://pictures.test:99999/ https://[::1/ https://pictures.test/" + "a" * 2048,
}


@pytest.mark.parametrize(("status", "url"), [(status, url) for status, urls in REFUSED.items() for url in urls.split()])
def test_only_the_hosts_and_schemes_on_the_list_are_asked(web: Web, status: int, url: str) -> None:
    """The fake DNS would lead all of them to what must not be reached."""
    (answer,) = ask(web, url, dns=lambda host: ["127.0.0.2"], public=lambda address: True)
    assert answer[0] == status, answer


def test_what_is_no_text_is_no_url(web: Web) -> None:
    assert [status for status, _ in ask(web, 7, None, ["https://pictures.test/"], {})] == [400] * 4


def test_http_is_refused_unless_it_is_allowed(web: Web) -> None:
    assert ask(web, web.url("red.png")) == [RED]
    refused = ask(web, web.url("red.png"), url_http=False)
    assert refused == [(403, "the URL begins with 'http'; allowed: https")]


@pytest.mark.parametrize(
    ("name", "host", "is_allowed"),
    [
        *(("a.test", "*.test:PORT", True), ("A.TEST.", "a.test:PORT", True), ("test", "*.test:PORT", False)),
        *(("a.test", "a.test", False), ("a.test", "b.test:PORT", False)),
    ],
)
def test_hosts_match_as_a_whole_or_below_a_star(web: Web, name: str, host: str, is_allowed: bool) -> None:
    answer = ask(web, web.url("red.png", name), hosts=(host.replace("PORT", str(web.port)),))[0]
    assert answer == RED if is_allowed else answer[0] == 403


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


@pytest.mark.parametrize("address", [address for addresses in PRIVATE.values() for address in addresses.split()])
def test_a_listed_name_that_leads_to_a_private_address_is_refused(web: Web, address: str) -> None:
    said = f"pictures.test:{web.port} is refused, since its address {address} is not public; send the picture itself"
    assert ask(web, web.url("red.png"), dns=lambda host: [address], public=is_public) == [(403, said)]


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("host", "listed", "status"),
    [
        # Numbers that C, and so the system's resolver, reads as 127.0.0.1.
        *((host, host, 400) for host in ("2130706433", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0")),
        *((host, host, 403) for host in ("0x7f000001", "0x7f.0.0.1", "0x7f.1", "localhost", "127.0.0.1")),
        *((host, "::1", 403) for host in ("[::1]", "[0:0:0:0:0:0:0:1]")),
        *(("[::]", "::", 403), ("[::ffff:127.0.0.1]", "::ffff:7f00:1", 403), ("①②⑦.⓪.⓪.①", "127.0.0.1", 403)),
    ],
)
def test_every_form_of_an_address_is_refused_even_if_it_is_listed(
    web: Web, host: str, listed: str, status: int
) -> None:
    """Without a fake DNS."""
    asked = len(web.seen)
    (answer,) = ask(web, web.url("red.png", host), dns=None, public=is_public, hosts=(f"{listed}:{web.port}",))
    assert answer[0] == status, answer
    assert len(web.seen) == asked


def test_a_name_that_changes_its_address_is_judged_at_each_connection(web: Web) -> None:
    """The check is of the address that is connected to, so nothing happens between the two."""
    answers = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.1"]]
    first, second, third = ask(web, *[web.url("red.png")] * 3, dns=lambda host: answers.pop(0))
    assert (first, second[0], third) == (RED, 403, RED)


def test_of_several_addresses_only_public_ones_are_connected_to(web: Web) -> None:
    assert ask(web, web.url("red.png"), dns=lambda host: ["127.0.0.2", "127.0.0.1"]) == [RED]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(web: Web, status: int) -> None:
    said = f"pictures.test:{web.port} answers {status}, and redirects are not followed; give the address of a picture"
    assert ask(web, web.url(f"status/{status}")) == [(424, said)]


def test_no_proxy_and_no_password_of_the_environment_is_used(
    web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.2:{web.port}")
    (tmp_path / "netrc").write_text("machine pictures.test login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert ask(web, *[web.url("red.png")] * 2) == [RED, RED]
    assert not {"Authorization", "Cookie", "Referer"} & web.headers[-1].keys()


@pytest.mark.parametrize("path", ["length/70001", "length/99999999999999", "endless"])
def test_too_many_bytes_are_not_read(web: Web, path: str) -> None:
    web.broken.clear()
    ((status, sentence),) = ask(web, web.url(path))
    assert (status, "over 70000 bytes" in sentence) == (413, True)
    assert path != "endless" or web.broken.wait(10)


LATE = "has not sent it within 1 seconds (beeline_url_seconds); try again, or send the picture itself"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("slow", LATE), ("drip", LATE), ("cut", "cannot be asked (")]
    + [(f"status/{status}", f"answers {status}; give the address of a picture") for status in (404, 500)],
)
def test_a_host_that_fails_is_a_424_that_names_it(web: Web, path: str, sentence: str) -> None:
    ((status, said),) = ask(web, web.url(path))
    assert (status, said.startswith(f"pictures.test:{web.port} {sentence}")) == (424, True), said


def test_nothing_is_unpacked(web: Web) -> None:
    assert ask(web, web.url("packed")) == [b"\x1f\x8b packed"]
    assert web.headers[-1]["Accept-Encoding"] == "identity"


def test_a_name_that_is_not_there_and_a_closed_port_are_424(web: Web) -> None:
    closed = ask(web, "https://pictures.test/", dns=lambda host: ["127.0.0.3"], public=lambda address: True)
    missing = ask(web, "http://no-such-name.invalid/", dns=None, hosts=("no-such-name.invalid",))
    assert [status for status, _ in closed + missing] == [424, 424]


@pytest.mark.server
def test_https_needs_a_certificate_that_is_trusted(tmp_path: Path) -> None:
    secure = Web()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate(tmp_path))
    secure.server.socket = context.wrap_socket(secure.server.socket, server_side=True)
    ((status, sentence),) = ask(secure, secure.url("red.png").replace("http:", "https:"))
    secure.stop()
    assert (status, "certificate" in sentence, secure.seen) == (424, True, [])
