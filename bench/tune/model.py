"""The model that is tuned: its archive, what it is configured with now, its files, pictures to send."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import ArchiveError, ConfigError
from beeline.spec import ModelSpec
from bench import pictures
from bench.pictures import Pictures
from bench.tune.settings import Settings
from host import machine
from serve import config, properties, store
from serve.properties import Properties
from serve.store import Archive

_SPEC = "model_spec.json"
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
    with zipfile.ZipFile(archive.path) as opened:
        if _SPEC not in opened.namelist():
            raise ArchiveError(f"{archive.path} has no {_SPEC}; build it with `beeline archive build`")
    read = properties.load(config_file, environ)
    gpus = 0 if environ.get("BEELINE_DEVICE") == "cpu" else len(machine.gpus())
    resolved = config.resolve(read, (archive,), config.Overrides(), environ, machine.cores(), gpus)
    now = resolved.models[0]
    configured = Settings(
        now.batch_size.value, now.min_workers.value, now.max_batch_delay.value, resolved.threads.value
    )
    digest = hashlib.sha256(archive.path.read_bytes()).hexdigest()
    return Model(archive, digest, read, configured, resolved.threads.reason)


@contextmanager
def unpacked(model: Model) -> Iterator[Path]:
    """Unpack the archive, which `find` compared with its own record, for the time of the block."""
    with tempfile.TemporaryDirectory(prefix="beeline-tune-") as folder:
        with zipfile.ZipFile(model.archive.path) as archive:
            archive.extractall(folder)
        ModelSpec.load(Path(folder))
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
    with zipfile.ZipFile(model.archive.path) as archive:
        names = sorted(
            name for name in archive.namelist() if name.startswith("golden/") and not name.endswith((".json", "/"))
        )
        if not names:
            raise ArchiveError(f"{model.archive.path} brings no picture to send; give --picture or --pictures")
        bodies = tuple(archive.read(name) for name in names)
    return Pictures(f"{model.archive.path.name}'s golden pictures", tuple(Path(name).name for name in names), bodies)
