"""The model that is tuned: its archive, what it is configured with now, its files, pictures to send."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from archive import mar, store
from archive.mar import Archive
from beeline.errors import ConfigError
from bench import pictures
from bench.pictures import Pictures
from bench.tune.settings import Settings
from host import machine
from host.files import sha256
from serve import config, properties
from serve.properties import Properties

# The ladder and the load go through so many pictures of a folder.
_MOST_PICTURES = 200


@dataclass(frozen=True)
class Model:
    """One archive with the configuration that it is served with.

    Attributes:
        archive: the `.mar`.
        sha256: of that file.
        properties: the configuration file, the environment's variables over it.
        configured: how the model would be served now.
        reason: where the threads of that come from.
    """

    archive: Archive
    sha256: str
    properties: Properties
    configured: Settings
    reason: str

    @property
    def name(self) -> str:
        """What the archive calls the model."""
        return self.archive.model


def find(wanted: str, folder: Path, config_file: Path, environ: Mapping[str, str]) -> Model:
    """Return the model of an archive by its path, or by its name in the store.

    Raises:
        BeelineError: when it is not there, is not built by Beeline, or the configuration has a mistake.
    """
    archive = store.find(folder, (str(Path(wanted).resolve()) if Path(wanted).is_file() else wanted,))[0]
    mar.check(archive.path)
    read = properties.load(config_file, environ)
    gpus = 0 if environ.get("BEELINE_DEVICE") == "cpu" else len(machine.gpus())
    resolved = config.resolve(read, (archive,), config.Overrides(), environ, machine.cores(), gpus)
    now = resolved.models[0]
    configured = Settings(
        now.batch_size.value, now.min_workers.value, now.max_batch_delay.value, resolved.threads.value
    )
    return Model(archive, sha256(archive.path), read, configured, resolved.threads.reason)


@contextmanager
def unpacked(model: Model) -> Iterator[Path]:
    """Unpack the archive, which `find` compared with its own record, for the time of the block."""
    with tempfile.TemporaryDirectory(prefix="beeline-tune-") as folder:
        mar.unpack(model.archive.path, Path(folder))
        yield Path(folder)


def sent(model: Model, picture: Path | None, folder: Path | None) -> Pictures:
    """Return the pictures to send: one file, a folder's, else the archive's golden pictures.

    Raises:
        BeelineError: where none is there. ConfigError: when both are given.
    """
    if picture is not None and folder is not None:
        raise ConfigError("--picture and --pictures are both given; give one file, or one folder")
    given = picture or folder
    if given is not None:
        return pictures.read(given, _MOST_PICTURES)
    goldens = sorted(model.archive.goldens, key=lambda golden: golden.file)
    return Pictures(
        f"{model.archive.path.name}'s golden pictures",
        tuple(Path(golden.file).name for golden in goldens),
        tuple(map(model.archive.golden_bytes, goldens)),
    )
