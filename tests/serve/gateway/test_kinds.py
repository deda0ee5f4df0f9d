"""Which gateway is taken and why, and what TLS needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from beeline.errors import ConfigError, Undetermined
from serve.gateway.kinds import Choice, choose, tls_files
from serve.properties import Properties
from serve.values import Address

NGINX = Choice("nginx", "/usr/sbin/nginx", "1.22.1", "")


@pytest.fixture
def fake_nginx(tmp_path: Path) -> Path:
    """A fake nginx that only says its version."""
    path = tmp_path / "nginx"
    path.write_text("#!/bin/sh\necho 'nginx version: nginx/1.22.1' >&2\n")
    path.chmod(0o755)
    return path


def test_nginx_where_it_is_there(fake_nginx: Path) -> None:
    found = choose("auto", {"PATH": str(fake_nginx.parent)})
    assert (found.kind, found.program, found.version) == ("nginx", str(fake_nginx), "1.22.1")


def test_nginx_in_the_sbin_of_a_bin(fake_nginx: Path) -> None:
    sbin = fake_nginx.parent / "usr" / "sbin"
    sbin.mkdir(parents=True)
    program = fake_nginx.rename(sbin / "nginx")
    assert choose("auto", {"PATH": f"/nowhere:{sbin.parent / 'bin'}"}).program == str(program)
    assert choose("auto", {"PATH": f"/nowhere:{sbin.parent / 'links'}"}).kind == "development"


def test_a_development_proxy_where_it_is_not(fake_nginx: Path) -> None:
    found = choose("auto", {"PATH": "/nowhere"})
    assert found.kind == "development"
    assert "there is no nginx on the PATH; install nginx" in found.sentence


def test_an_old_nginx_is_refused(fake_nginx: Path) -> None:
    fake_nginx.write_text("#!/bin/sh\necho 'nginx version: nginx/1.18.0' >&2\n")
    with pytest.raises(Undetermined, match=r"is version 1\.18\.0; install nginx 1\.22 or later"):
        choose("auto", {"PATH": str(fake_nginx.parent)})


def test_what_is_asked_for_and_not_there(fake_nginx: Path) -> None:
    with pytest.raises(Undetermined, match="apt-get install nginx"):
        choose("nginx", {"PATH": "/nowhere"})
    with pytest.raises(ConfigError, match="--gateway is 'ngnix'; did you mean 'nginx'"):
        choose("ngnix")


def test_tls_needs_a_certificate_its_key_and_nginx(tmp_path: Path) -> None:
    certificate, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    texts = {"beeline_tls_certificate": str(certificate), "beeline_tls_key": str(key)}
    file = Path("config.properties")
    assert tls_files(NGINX, Properties(file)) is None
    certificate.touch()
    key.touch()
    with pytest.raises(ConfigError, match="beeline_tls_key is not; TLS needs a certificate and its key"):
        tls_files(NGINX, Properties(file, texts={"beeline_tls_certificate": str(certificate)}))
    with pytest.raises(ConfigError, match="beeline_tls_address is there, beeline_tls_certificate is not"):
        tls_files(NGINX, Properties(file, addresses={"beeline_tls_address": Address("127.0.0.1", 8443, "https")}))
    assert tls_files(NGINX, Properties(file, texts=texts)) == (certificate, key)
    with pytest.raises(ConfigError, match="TLS needs nginx, and the gateway is development"):
        tls_files(Choice("development", None, "", ""), Properties(file, texts=texts))
    key.unlink()
    with pytest.raises(ConfigError, match="which is not there; mount it"):
        tls_files(NGINX, Properties(file, texts=texts))
