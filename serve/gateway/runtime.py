"""The gateway's runtime folder: settings, page, catalog, error bodies, and nginx's configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Set as AbstractSet
from pathlib import Path

from host import ROOT
from host.files import write_whole
from serve.gateway import errors, nginx
from serve.gateway.settings import Settings

PAGE = ROOT / "frontend"
_FILES = ("index.html", "style.css", "icon.svg", "scripts")


def lay_out(settings: Settings, page: Path = PAGE) -> None:
    """Make everything that the gateway reads; the catalog comes after, with `serve.gateway.catalog`.

    Whatever nginx's workers read must be readable by everybody: started by root, they run as nobody.

    Raises:
        Undetermined: when nginx refuses its configuration.
    """
    settings.folder.mkdir()
    settings.folder.chmod(0o755)
    settings.logs.mkdir(parents=True, exist_ok=True)
    for folder in (settings.web, settings.closed_folder, settings.folder / "errors"):
        folder.mkdir(parents=True)
    for name in _FILES:
        source = page / name
        if source.is_dir():
            shutil.copytree(source, settings.web / name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, settings.web / name)
    for status in errors.STATUSES:
        text = errors.body(status, settings.max_image, settings.deadline)
        (settings.folder / "errors" / f"{status}.json").write_text(text, encoding="utf-8")
    write_state(settings, ready=False, text=json.dumps({"status": "Unhealthy", "reason": "starting", "models": {}}))
    for folder in (settings.web, settings.ready_file.parent, settings.folder / "errors"):
        open_to_all(folder)
    settings.save()
    if settings.program is not None:
        nginx.lay_out(settings)


def write_state(
    settings: Settings, ready: bool, text: str, draining: bool = False, closed: AbstractSet[str] = frozenset()
) -> None:
    """Write what `/ping` answers; the file of the other state goes last or first, so that one is always there.

    Args:
        settings: the gateway's.
        ready: which of the two answers it is.
        text: the answer.
        draining: whether predictions are let through all the same, as long as they were.
        closed: the predictions that are not let through where others are, as in `Seen`.
    """
    if ready:
        # Whoever sees it ready is let through.
        _open(settings, closed)
    target = settings.ready_file if ready else settings.unready_file
    write_whole(target, text + "\n", 0o644)
    if not ready:
        settings.ready_file.unlink(missing_ok=True)
        if closed:
            _open(settings, closed)
        elif not draining:
            settings.open_file.unlink(missing_ok=True)


def _open(settings: Settings, closed: AbstractSet[str]) -> None:
    """Let predictions through, all but those."""
    before = {path.name for path in settings.closed_folder.iterdir()}
    for name in closed - before:
        (settings.closed_folder / name).touch(0o644)
    settings.open_file.touch(0o644)
    for name in before - closed:
        (settings.closed_folder / name).unlink()


def open_to_all(folder: Path) -> None:
    """Let everybody read a folder and what is below it, whatever the umask."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
