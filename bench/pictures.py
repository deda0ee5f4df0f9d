"""The pictures that a measurement sends: their bytes in memory, and a digest that tells two sets apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from archive.mar import Archive
from beeline.errors import ConfigError
from host.files import find_pictures


@dataclass(frozen=True)
class Pictures:
    """The file or folder that was given; names and bytes of its encoded pictures, in the order of their paths."""

    source: str
    names: tuple[str, ...]
    bodies: tuple[bytes, ...]

    def to_dict(self) -> dict[str, object]:
        """Return what a record says about them; the same digest means the same pictures in the same order."""
        digest = hashlib.sha256(b"".join(hashlib.sha256(body).digest() for body in self.bodies)).hexdigest()
        size = round(sum(map(len, self.bodies)) / len(self.bodies))
        return {"source": Path(self.source).name, "count": len(self.bodies), "bytes": size, "sha256": digest}


def read(path: Path, most: int | None = None) -> Pictures:
    """Read a file of any kind, or a folder's pictures, `most` of them evenly; raise `BeelineError` if there is none."""
    files = find_pictures([path])
    if most is not None and len(files) > most:
        files = [files[index * len(files) // most] for index in range(most)]
    return Pictures(str(path), tuple(file.name for file in files), tuple(file.read_bytes() for file in files))


def choose(picture: Path | None, folder: Path | None, archive: Archive | None, most: int | None = None) -> Pictures:
    """Read --picture or --pictures, else the archive's golden pictures; raise `ConfigError` for both, or for none."""
    if (picture and folder) or not (picture or folder or archive):
        raise ConfigError("name what to send: one picture with --picture, or a folder with --pictures")
    if path := picture or folder:
        return read(path, most)
    assert archive is not None
    goldens = sorted(archive.goldens, key=lambda golden: golden.file)
    names = tuple(Path(golden.file).name for golden in goldens)
    return Pictures(f"{archive.path.name}'s golden pictures", names, tuple(map(archive.golden_bytes, goldens)))
