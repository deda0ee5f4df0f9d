"""Sources of answers: a run, an archive or a URL, each behind the same call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from beeline.errors import BeelineError

if TYPE_CHECKING:
    from beeline.answer import Answer
    from serve.client import InferenceClient

Predict = Callable[[list[bytes]], "list[Answer]"]

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / "model_store"
# Enough concurrent clients for full batches.
CLIENTS = 16


@contextmanager
def open_source(source: str, model: str | None = None) -> Iterator[Predict]:
    """Open a URL, a `.mar` or a run's folder for predictions, and close what was started for it.

    Args:
        source: `http://host:port`, `http://host:port/predictions/name`, an archive or a run.
        model: the model's name, for a URL that does not end in it.

    Raises:
        BeelineError: when it is none of these.
    """
    if source.startswith(("http://", "https://")):
        with _url(source, model) as predict:
            yield predict
    elif source.endswith(".mar"):
        from archive.sandbox import Sandbox
        from archive.store import locate

        with Sandbox(locate(Path(source), STORE)) as sandbox:
            yield sandbox.predict
    elif Path(source).is_dir() or (ROOT / "runs" / source).is_dir():
        from train.predictor import RunPredictor

        yield RunPredictor(Path(source)).predict
    else:
        raise BeelineError(f"{source} is no URL, no .mar file and no run's folder; name one of these")


@contextmanager
def archive_of(source: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the archive at `source`, or of that name in the store. A run is built into a temporary archive.

    So a measurement always uses what would be shipped.

    Raises:
        BeelineError: when there is neither.
    """
    if not source.is_dir():
        from archive.store import locate

        yield locate(source)
        return
    from archive.build import build
    from cli.archive import exported_folder

    with tempfile.TemporaryDirectory(prefix="beeline-sweep-") as scratch:
        say(f"building {source} into an archive, which is removed afterwards ...")
        yield build(exported_folder(source), Path(scratch), check=False).path


def default_archive() -> Path:
    """Return the store's only archive.

    Raises:
        BeelineError: when there is none, or more than one.
    """
    archives = sorted(STORE.glob("*.mar"))
    if len(archives) != 1:
        found = ", ".join(path.name for path in archives) or "none"
        raise BeelineError(f"model_store holds {found}; name one archive with --mar, or a server with --url")
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
    """Return the name of the one model at the URL, by its own catalog or else by the local index."""
    served = client.served()
    if served is None:
        from archive.store import read_index

        names = sorted({entry.name for entry in read_index(STORE).values()})
        where = f"{client.url} has no catalog and model_store lists"
    else:
        names, where = served, f"{client.url} serves"
    if len(names) != 1:
        raise BeelineError(f"the URL names no model, and {where} {', '.join(names) or 'none'}; add --model NAME")
    return names[0]
