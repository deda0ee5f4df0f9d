"""BERT's tokenizer from the `tokenizer.json` of `tokenizers`: a prompt to token ids, and ids to text.

A table and two loops: the package has 10 MB, and brings the hub's client with it.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from beeline.errors import ArchiveError

_LONGEST = 100
# As the normalizer of `tokenizers` lists them, which begins the last but one at 2B920.
_CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f"
    "\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)
_JOINED = frozenset(".?!,")


class WordPiece:
    """The vocabulary of a `tokenizer.json`; see "Google's Neural Machine Translation System" (2016), section 4.1."""

    def __init__(self, path: Path) -> None:
        """Read the file; raise `ArchiveError` for another kind of tokenizer, or a damaged file."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            model, normalizer, added = values["model"], values["normalizer"], values.get("added_tokens") or []
            if (model["type"], normalizer["type"]) != ("WordPiece", "BertNormalizer"):
                raise ValueError(f"{model['type']} after {normalizer['type']}, not BERT's WordPiece")
            self.ids: dict[str, int] = {**model["vocab"], **{each["content"]: each["id"] for each in added}}
            self._special = {each["id"] for each in added if each["special"]}
            self._unknown, self._prefix = self.ids[model["unk_token"]], str(model["continuing_subword_prefix"])
            self._lower = bool(normalizer["lowercase"])
            accents = normalizer["strip_accents"]
            self._strips = self._lower if accents is None else bool(accents)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ArchiveError(f"{path.name} is no tokenizer that this worker reads ({error}); build again") from error
        self._texts = {number: text for text, number in self.ids.items()}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without a start or an end."""
        return [number for word in self._words(text) for number in self._pieces(word)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text without special tokens; a full stop or comma follows its word without a space."""
        text = ""
        for token in (self._texts.get(number, "") for number in ids if number not in self._special):
            is_part = token.startswith(self._prefix) and text
            text += token.removeprefix(self._prefix) if is_part else token if token in _JOINED else f" {token}"
        return text.strip()

    def _words(self, text: str) -> list[str]:
        text = text.lower() if self._lower else text
        if self._strips:
            text = "".join(each for each in unicodedata.normalize("NFD", text) if unicodedata.category(each) != "Mn")
        return "".join(map(_apart, text)).split()

    def _pieces(self, word: str) -> list[int]:
        """Take the longest known piece again and again; a word with a rest is unknown as a whole."""
        pieces: list[int] = []
        while word != self._prefix and len(word) <= _LONGEST:
            end = next((end for end in range(len(word), 0, -1) if word[:end] in self.ids), 0)
            if end <= (len(self._prefix) if pieces else 0):
                break
            pieces.append(self.ids[word[:end]])
            word = self._prefix + word[end:]
        return pieces if pieces and word == self._prefix else [self._unknown]


def _apart(sign: str) -> str:
    """Return a character as it is, between spaces where it stands alone, or as nothing or a space."""
    kind = unicodedata.category(sign)
    if sign in "\t\n\r" or kind.startswith("Z"):
        return " "
    if sign == "\ufffd" or kind in ("Cc", "Cf", "Cs", "Co"):
        return ""
    return f" {sign} " if kind.startswith("P") or sign in string.punctuation or _CHINESE.match(sign) else sign
