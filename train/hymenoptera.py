"""The ants and bees of PyTorch's transfer-learning tutorial: download, verify, unpack."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from host import zips
from host.files import sha256 as file_sha256
from host.files import whole_folder
from train.download import fetch
from train.errors import DownloadError, UnsafeArchive
from train.progress import Say

NAME = "hymenoptera_data"
URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
# Of the download; ten times as much unpacked.
MAX_BYTES = 200 << 20
MAX_FILES = 200_000
# Photographs hardly shrink; deflate's own ceiling is 1032.
MAX_RATIO = 200

# No digest of the archive is published, so its content is pinned: the sha256 over the sorted lines `<sha256>  <path>`
# of the 397 photographs in train/ and val/, from an independent copy.
PICTURES = 397
PICTURES_SHA256 = "955d7639c0d6034bccaed03d441288f4e9e4e9362cf0801abfb34f7020de6c21"


def get(cache: Path, say: Say, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the unpacked set's folder under `cache`, downloading it when it is not there.

    `BEELINE_DATA_URL` names another address, `BEELINE_DATA_SHA256` the digest of the archive there;
    without a digest the pictures themselves must be the known ones.

    Raises:
        Unavailable: the address cannot be reached. DownloadError: broken off, or not the expected content.
        UnsafeArchive: the archive must not be unpacked.
    """
    url = environ.get("BEELINE_DATA_URL") or URL
    sha256 = environ.get("BEELINE_DATA_SHA256") or None
    identity = hashlib.sha256(f"{url} {sha256}".encode()).hexdigest()[:8]
    folder = cache / f"{NAME}-{identity}"
    if folder.is_dir():
        return folder
    archive = cache / f"{NAME}-{identity}.zip"
    if not archive.exists():
        say(f"downloading {url}")
        fetch(url, archive, say, sha256, MAX_BYTES)
    with whole_folder(folder) as fresh:
        try:
            unzip(archive, fresh)
        except UnsafeArchive:
            # Such as a login page with status 200: if it were kept, no later run would download the archive.
            archive.unlink()
            raise
        if sha256 is None and (found := digest(fresh)) != PICTURES_SHA256:
            actual = file_sha256(archive)
            archive.unlink()
            raise DownloadError(
                f"the pictures from {url} are not the known {PICTURES} of {NAME} (their digest is {found[:12]}, "
                f"expected {PICTURES_SHA256[:12]}); to use them anyway, set BEELINE_DATA_SHA256={actual}"
            )
    archive.unlink(missing_ok=True)
    return folder


def digest(folder: Path) -> str:
    """Return the digest of all photographs (`.jpg`, `.jpeg`) by path below the folder that holds `train/`."""
    holders = [path.parent for path in sorted(folder.rglob("train")) if path.is_dir()]
    root = holders[0] if holders else folder
    files = [
        path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg") and not path.name.startswith(".")
    ]
    lines = [f"{file_sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in files]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def unzip(archive: Path, folder: Path, max_bytes: int = 10 * MAX_BYTES, max_files: int = MAX_FILES) -> None:
    """Unpack a zip file that was downloaded into an empty folder: nothing leaves it, nothing grows without bound.

    Raises:
        UnsafeArchive: a damaged zip file, a name outside the folder, a link, a file that is encrypted,
            doubled or unlike its declared size, more than `max_files` files or `max_bytes` bytes.
    """
    zips.unpack(
        archive, folder, zips.Rules(UnsafeArchive, "delete it and download it again", max_files, max_bytes, MAX_RATIO)
    )
