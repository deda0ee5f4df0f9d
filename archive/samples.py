"""Sample pictures of a model for the page: chosen from its data at the build, kept in the store."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from beeline import formats, pixels
from beeline.errors import ArchiveError, RequestError
from beeline.spec import ModelSpec
from host.files import whole_folder, write_json

FOLDER, LIST = "samples", "samples.json"
MOST, MOST_A_LABEL, MAX_BYTES = 12, 2, 2_000_000
# The formats that browsers show. The worker also takes TIFF, which they do not.
_ENDINGS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "AVIF": "avif", "BMP": "bmp"}
_HEAD = 16
# A file and its label, or None without one.
Labelled = tuple[Path, str | None]
# Pictures of a model's data, and its name; without any, why there are none.
Known = tuple[Sequence[Labelled], str]


@dataclass(frozen=True)
class Sample:
    """One picture's bytes, file ending, and label or None."""

    data: bytes
    ending: str
    label: str | None


def named_samples(folder: Path) -> list[Sample]:
    """Return the samples of a folder that the user named; raise `ArchiveError` if there are none."""
    chosen = choose(in_folder(folder))
    if not chosen:
        kind = f"under {MAX_BYTES / 1e6:g} MB that browsers show (JPEG, PNG, GIF, WebP, AVIF, BMP)"
        raise ArchiveError(f"the samples' folder {folder} holds no complete picture {kind}; add some, or leave it out")
    return chosen


def choose(pictures: Iterable[Labelled]) -> list[Sample]:
    """Return up to `MOST` pictures: the first good picture of each label, then the second, up to `MOST_A_LABEL`.

    Of more than `MOST` labels, those at even distances come first. A picture without a label counts as a label of its
    own. The same pictures in the same order give the same samples.
    """
    by_label: dict[object, list[Labelled]] = defaultdict(list)
    for path, label in pictures:
        by_label[path if label is None else (label,)].append((path, label))
    groups = list(by_label.values())
    first = [index * len(groups) // MOST for index in range(MOST)] if len(groups) > MOST else []
    order = dict.fromkeys((*first, *range(len(groups))))
    queues = [iter(groups[index]) for index in order]
    chosen: list[Sample] = []
    for _ in range(MOST_A_LABEL):
        for queue in queues:
            if len(chosen) < MOST and (good := next(filter(None, (_read(*each) for each in queue)), None)):
                chosen.append(good)
    return chosen


def put(
    store: Path,
    spec: ModelSpec,
    reused: bool,
    folder: Path | None,
    chosen: list[Sample] | None,
    known: Callable[[], Known],
) -> tuple[Path | None, str]:
    """Put an archive's samples for the page into the store; return their folder and a clause on them.

    They are the `chosen` ones of `folder`, else some of the `known` pictures. An archive that was there already, which
    is `reused`, keeps its samples.
    """
    old = place(store, spec)
    if chosen is None and reused and (old / LIST).is_file():
        return old, "the samples are the same as before"
    source, why = "" if folder is None else folder.resolve().name, ""
    if chosen is None:
        pictures, source = known()
        chosen = choose(pictures)
        why = "no validation picture is small enough and shown by browsers" if pictures else source
    target = replace(store, spec, chosen, source)
    return target, f"no samples: {why}" if target is None else f"{len(chosen)} samples from {source}"


def in_folder(folder: Path) -> list[Labelled]:
    """Return the files of a folder. The label is the name of the file's folder inside it."""
    if not folder.is_dir():
        raise ArchiveError(f"the samples' folder {folder} is missing; name a folder of pictures, or leave it out")
    files: list[Labelled] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")):
            continue
        if path.is_dir():
            files += [(file, path.name) for file in sorted(path.rglob("*")) if not file.name.startswith(".")]
        else:
            files.append((path, None))
    return files


def place(store: Path, spec: ModelSpec) -> Path:
    """Return the folder of a model's samples in a store."""
    return store / FOLDER / spec.name / spec.version


def replace(store: Path, spec: ModelSpec, samples: Sequence[Sample], source: str) -> Path | None:
    """Replace a model's samples in one step, and return their folder; without new ones, remove the old ones.

    `source` is the name of their data set.
    """
    target = place(store, spec)
    if not samples:
        if target.exists():
            with tempfile.TemporaryDirectory(prefix=".samples-", dir=store) as scratch:
                target.rename(Path(scratch) / "old")
        return None
    with whole_folder(target) as fresh:
        rows = []
        for sample, name in zip(samples, _names(samples), strict=True):
            (fresh / name).write_bytes(sample.data)
            rows.append({"file": name, "label": sample.label, "source": source})
        write_json(fresh / LIST, rows)
        for path in (fresh, *fresh.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
    return target


def _read(path: Path, label: str | None) -> Sample | None:
    """Return a picture that the worker takes and a browser shows; None for any other file."""
    try:
        if not path.is_file() or not 0 < path.stat().st_size < MAX_BYTES:
            return None
        data = path.read_bytes()
        ending = _ENDINGS.get(formats.kind_of(data[:_HEAD]) or "")
        if ending is None:
            return None
        pixels.open_rgb(data)
    except (RequestError, OSError):
        return None
    return Sample(data, ending, label)


def _names(samples: Sequence[Sample]) -> list[str]:
    """Return `<label>-<n>.<ending>` for each: of letters, digits and `_.-`, and different on any file system."""
    counts: dict[str, int] = defaultdict(int)
    names = []
    for sample in samples:
        plain = unicodedata.normalize("NFKD", sample.label or "picture").encode("ascii", "ignore").decode()
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", plain).strip("_.-")[:64] or "label"
        counts[stem.lower()] += 1
        names.append(f"{stem}-{counts[stem.lower()]}.{sample.ending}")
    return names
