"""Reference captions that people gave: the share of answers that is exactly one of them, and CIDEr."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beeline.answer import Answer
from beeline.errors import BeelineError

FILE = "captions.json"


def read(folder: Path) -> tuple[list[bytes], list[list[str]]]:
    """Return pictures and their captions by `captions.json`, which has by file a text or a list of texts."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        truth = {
            name: [texts] if isinstance(texts, str) else [str(each) for each in texts] for name, texts in values.items()
        }
        if not truth or not all(truth.values()):
            raise ValueError("no caption")
        return [(folder / name).read_bytes() for name in truth], [*truth.values()]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fix = 'it holds {"file": "its caption"}, or a list of captions, of files beside it'
        raise BeelineError(f"{folder / FILE} cannot be used ({error}); {fix}") from error


def measure(source: str, answers: Sequence[Answer], truth: list[list[str]]) -> tuple[dict[str, Any], str]:
    """Return the measures of a source's answers for programs and for people; a failed picture is wrong."""
    bodies = [answer.json() if answer.status == 200 else {} for answer in answers]
    if not any("caption" in body for body in bodies):
        raise BeelineError(f"{source} answered none of {len(bodies)} pictures with a caption; name a captioning model")
    texts = [str(body.get("caption", "")) for body in bodies]
    exact = sum(text in each for text, each in zip(texts, truth, strict=True)) / len(texts)
    cider, note = _cider(texts, truth)
    values = {"source": source, "pictures": len(texts), "exact": exact, "cider": cider, "notes": [note] if note else []}
    about = f", CIDEr {cider:.3f}" if cider is not None else f"; {note}"
    return values, f"{exact:.4f} of {len(texts)} captions are exactly right{about}"


def _cider(texts: list[str], truth: list[list[str]]) -> tuple[float | None, str]:
    """Return CIDEr of captions, words apart by spaces; or None and why there is none."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return None, "no CIDEr, since pycocoevalcap is not installed: `uv pip install --no-deps pycocoevalcap`"
    expected, actual = dict(enumerate(truth)), {index: [text] for index, text in enumerate(texts)}
    return float(Cider().compute_score(expected, actual)[0]), ""
