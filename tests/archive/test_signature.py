"""Signatures of archives: minisign's form, checked before an archive is served."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import minisign
import pytest

from archive.store import check_signature, find_archives, sign
from beeline.errors import ArchiveError
from serve.servers.protocol import keep
from tests.cli.test_main import call


@pytest.fixture
def mar(colour_archive: Path, tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return Path(shutil.copy(colour_archive, tmp_path / "store" / "colours.mar"))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A secret key and its public key, as files of minisign."""
    pair = minisign.KeyPair.generate()
    (tmp_path / "secret.key").write_bytes(bytes(pair.secret_key))
    (tmp_path / "public.key").write_bytes(bytes(pair.public_key))
    return tmp_path / "secret.key", tmp_path / "public.key"


def test_only_a_signed_archive_is_served_where_a_key_is_trusted(mar: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(ArchiveError, match=r"not signed .*minisig.*sign it with `beeline archive sign`"):
        find_archives(mar.parent, trusted=str(keys[1]))
    assert sign(mar, keys[0]) == mar.parent / "colours.mar.minisig"
    for trusted in ("", str(keys[1]), keys[1].read_text().splitlines()[1]):
        assert len(find_archives(mar.parent, trusted=trusted)) == 1


def test_a_signature_that_does_not_hold_is_refused(mar: Path, keys: tuple[Path, Path]) -> None:
    text = sign(mar, keys[0]).read_text()
    other = minisign.KeyPair.generate().public_key.to_base64().decode()
    cases = [(text, other), (text, "no key"), (text.replace("file:colours", "file:others"), ""), (text[:99], "")]
    for signature, trusted in cases:
        (mar.parent / "colours.mar.minisig").write_text(signature)
        with pytest.raises(ArchiveError, match="is not signed by the trusted key"):
            check_signature(mar, trusted or str(keys[1]))
    sign(mar, keys[0])
    mar.write_bytes(mar.read_bytes()[:-1] + b"x")
    with pytest.raises(ArchiveError, match="is not signed by the trusted key"):
        check_signature(mar, str(keys[1]))


def test_with_a_trusted_key_the_copy_is_checked_and_served(mar: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign(mar, keys[0])
    bytes_before, kept = mar.read_bytes(), tmp_path / "kept.mar"
    keep(mar, kept, str(keys[1]))
    with mar.open("r+b") as file:
        file.write(b"rewritten in place")
    assert kept.read_bytes() == bytes_before
    with pytest.raises(ArchiveError, match="is not signed by the trusted key"):
        keep(mar, tmp_path / "again.mar", str(keys[1]))


def test_the_commands_sign_and_verify(mar: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    verify = ["archive", "verify", str(mar), "--key", str(keys[1])]
    assert call(verify, monkeypatch) == 1
    assert call(["archive", "sign", str(mar), "--key", str(keys[1])], monkeypatch) == 1
    assert call(["archive", "sign", str(mar), "--key", str(keys[0])], monkeypatch) == 0
    assert call(verify, monkeypatch) == 0


@pytest.mark.server
def test_minisign_itself_agrees(mar: Path, tmp_path: Path) -> None:
    if shutil.which("minisign") is None:
        pytest.skip("no minisign here; install it (Debian: apt-get install minisign)")
    secret, public = tmp_path / "s.key", tmp_path / "p.key"
    for words in (f"-G -W -s {secret} -p {public}", f"-S -m {mar} -s {secret}"):
        subprocess.run(["minisign", *words.split()], check=True, capture_output=True)
    check_signature(mar, str(public))
    sign(mar, secret)
    subprocess.run(["minisign", "-V", "-m", mar, "-p", public], check=True, capture_output=True)
