"""Where predictions come from: a run, an archive or a URL, behind one call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from archive.store import STORE, locate, read_index
from beeline.errors import BeelineError
from beeline.spec import FILE_NAME, ModelSpec

if TYPE_CHECKING:
    from beeline.answer import Answer
    from serve.client import InferenceClient
    from train.runs import Run

Predict = Callable[[list[bytes]], "list[Answer]"]

# Enough concurrent clients for full batches.
CLIENTS = 16


@dataclass(frozen=True)
class Source:
    """What answers: `labels` are all of its labels where they are known, `run` is the run that it is."""

    predict: Predict
    labels: tuple[str, ...] = ()
    run: Run | None = None


@contextmanager
def open_source(source: str, model: str | None = None, all_labels: bool = False) -> Iterator[Source]:
    """Open `http://host:port`, `http://host:port/predictions/name`, an archive or a run for predictions.

    `model` is the name of the model at a URL that does not name it; a run is a folder, an id or `latest`, and answers
    with all labels if that is asked for. Raise BeelineError if `source` is none of these.
    """
    if source.startswith(("http://", "https://")):
        with _url(source, model) as predict:
            yield Source(predict)
    elif source.endswith(".mar"):
        from archive.mar import check
        from archive.sandbox import Sandbox

        archive = locate(Path(source), STORE)
        with Sandbox(archive) as sandbox:
            yield Source(sandbox.predict, check(archive).spec.labels)
    else:
        from train.runs import RECORD, find_folder, open_run

        if not (folder := find_folder(Path(source))).is_dir():
            raise BeelineError(f"{source} is no URL, no .mar file and no run's folder; name one of these")
        for each in (folder, folder / "export"):
            if (each / FILE_NAME).is_file() and ModelSpec.load(each).caption:
                fix = f"build an archive of it: beeline archive build {source}"
                raise BeelineError(f"{source} is a captioning model, which PyTorch does not serve; {fix}")
        from train.predictor import RunPredictor

        predictor = RunPredictor(folder, all_labels)
        run = open_run(folder) if (folder / RECORD).is_file() else None
        yield Source(predictor.predict, predictor.spec.labels, run)


@contextmanager
def archive_of(source: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the archive at `source`, or of that name in the store.

    A run is built into a temporary archive, so that a measurement uses what would be shipped.
    """
    from train.runs import find_folder

    if not find_folder(source).is_dir():
        yield locate(source)
        return
    from archive.build import build

    with tempfile.TemporaryDirectory(prefix="beeline-sweep-") as scratch:
        say(f"building {source} into an archive, which is removed afterwards ...")
        yield build(exported_folder(source), Path(scratch), check=False).path


def exported_folder(source: Path) -> Path:
    """Return the exported folder at `source`, or in the run that it names; raise BeelineError if there is none."""
    if not source.exists():
        from train.runs import find_folder

        source = find_folder(source)
    for folder in (source / "export", source):
        if (folder / FILE_NAME).is_file():
            return folder
    fix = "train one with `beeline train`, or give --model and --labels"
    raise BeelineError(f"{source} holds no exported model; {fix}")


def default_archive() -> Path:
    """Return the store's only archive; raise BeelineError if there is not exactly one."""
    archives = sorted(STORE.glob("*.mar"))
    if len(archives) != 1:
        names = ", ".join(path.name for path in archives) or "none"
        raise BeelineError(f"model_store holds {names}; name one archive with --mar, or a server with --url")
    return archives[0]


@contextmanager
def _url(url: str, model: str | None) -> Iterator[Predict]:
    from serve.client import InferenceClient

    parts = urlsplit(url)
    base = f"{parts.scheme}://{parts.netloc}"
    in_path = parts.path.rpartition("/predictions/")[2].rstrip("/") if "/predictions/" in parts.path else None
    with ExitStack() as stack:
        clients = [stack.enter_context(InferenceClient(base)) for _ in range(CLIENTS)]
        name = model or in_path or _only_model(clients[0])
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS, thread_name_prefix="client"))

        def share(pictures: list[bytes], of: int) -> list[Answer]:
            return [clients[of].predict(name, data) for data in pictures[of::CLIENTS]]

        def predict(pictures: list[bytes]) -> list[Answer]:
            shares = list(pool.map(share, [pictures] * CLIENTS, range(CLIENTS)))
            return [shares[i % CLIENTS][i // CLIENTS] for i in range(len(pictures))]

        yield predict


def _only_model(client: InferenceClient) -> str:
    """Return the name of the only model at the URL, as its catalog says, else the local index."""
    names, where = client.served(), f"{client.url} serves"
    if names is None:
        names = sorted({entry.name for entry in read_index(STORE).values()})
        where = f"{client.url} has no catalog and model_store lists"
    if len(names) != 1:
        raise BeelineError(f"the URL names no model, and {where} {', '.join(names) or 'none'}; add --model NAME")
    return names[0]
