"""The read-only files of page and catalog, as the development proxy serves them: these paths and no others."""

from __future__ import annotations

import re
from pathlib import Path

import aiohttp.web

# Browsers ask again each time: a new model or page is seen at once.
FRESH = {"Cache-Control": "no-cache"}
# No segment begins with a dot, so none leads upwards.
_SEGMENT = "[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_FILE = re.compile(
    rf"/(index\.html|style\.css|icon\.svg|scripts/[a-z-]+\.js|catalog\.json|catalog/{_SEGMENT}/{_SEGMENT}\.json"
    rf"|samples/{_SEGMENT}/{_SEGMENT}/{_SEGMENT}\.(jpe?g|png|gif|webp|avif|bmp|tiff?))"
)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json; charset=utf-8",
    "svg": "image/svg+xml",
    "jpg": "image/jpeg",
    "tif": "image/tiff",
}


def served(path: str) -> bool:
    """Return whether a request's path is one of a file, there or not."""
    return path == "/" or _FILE.fullmatch(path) is not None


def read(web: Path, path: str) -> aiohttp.web.Response | None:
    """Return a file below the document root; None where it is missing."""
    path = "/index.html" if path == "/" else path
    ending = path.rpartition(".")[2]
    try:
        data = (web / path[1:]).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return aiohttp.web.Response(body=data, headers={"Content-Type": _TYPES.get(ending, f"image/{ending}"), **FRESH})
