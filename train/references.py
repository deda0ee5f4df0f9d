"""Reference captions that people gave: the share of answers that is exactly one of them, and CIDEr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beeline.answer import Answer
from beeline.errors import BeelineError

FILE, _BATCH = "captions.json", 16


def measure(source: str, predict: Callable[[list[bytes]], list[Answer]], data: Path) -> tuple[dict[str, Any], str]:
    """Compare a source's answers with `captions.json`, by file a text or a list of texts; a failed picture is wrong.

    Return the measures for programs and for people. Raise `BeelineError` for a damaged file, or without any caption.
    """
    try:
        read = json.loads((data / FILE).read_text(encoding="utf-8")).items()
        truth = [[texts] if isinstance(texts, str) else [str(each) for each in texts] for _, texts in read]
        bodies = [(data / name).read_bytes() for name, _ in read]
        if not truth or not all(truth):
            raise ValueError("a caption is missing")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fix = 'it holds {"file": "its caption"}, or a list of captions, of files beside it'
        raise BeelineError(f"{data / FILE} cannot be used ({error}); {fix}") from error
    parts = [predict(bodies[start : start + _BATCH]) for start in range(0, len(bodies), _BATCH)]
    answers = [answer.json() if answer.status == 200 else {} for part in parts for answer in part]
    if not any("caption" in answer for answer in answers):
        raise BeelineError(f"{source} answered none of {len(answers)} pictures with a caption; name a captioning model")
    texts = [str(answer.get("caption", "")) for answer in answers]
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
