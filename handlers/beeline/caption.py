"""The task of writing a caption: an encoder for the pictures, and a decoder that adds a token a step.

The encoder (`ModelSpec.model`) takes uint8 pictures to `cross`, float32 `[N, 2 * layers, heads, S, d]`: the keys and
values of the decoder's attention to them. The decoder takes, of N pictures with K beams each, `ids` int64 `[N, K, T]`,
`positions` int64 `[N, T]`, `mask` float32 `[N, P + T]` (0: no token), `past` float32 `[N, K, 2 * layers, heads, P, d]`
and `cross` to `logits` float32 `[N, K, vocabulary]` and `present`, which is `past` of the T new tokens.
"""
# ruff: noqa: D102 - `Task` documents these methods

from __future__ import annotations

import math
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beeline.answer import JSON, Answer, dump, failure
from beeline.batch import Batch, Ok
from beeline.engines import Engine, Inputs
from beeline.errors import BadEncoding, DeadlineExceeded, ModelError, RequestError, SelfTestError
from beeline.spec import GOLDEN, Caption, check
from beeline.tasks import Task
from beeline.wordpiece import WordPiece

Floats = NDArray[np.float32]
# All rows of a batch are as long as its longest prompt: one of 490 tokens took 22 s and 2.6 GB with 3 beams.
MOST_PROMPT = 64


@dataclass(frozen=True)
class Options:
    """What a request asks for: the tokens that the caption begins with, how many it may add, and its deadline."""

    ids: tuple[int, ...]
    most: int
    end: float | None = None


@dataclass(frozen=True)
class Sentence:
    """A caption: the prompt's tokens, those after it, with the end where it was reached, and its score in 0 to 1.

    The score is the exponential of the new tokens' mean log-probability, the end's included.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    score: float


class Search:
    """The beams of one picture, and which of them go on: as `generate` of transformers 5 chooses, one beam is greedy.

    Attributes:
        ids: the tokens of each beam, without the prompt.
        sentence: the best caption, once the search has ended.
    """

    def __init__(self, spec: Caption, options: Options) -> None:
        self._spec, self._options = spec, options
        # All beams begin alike, so there is one until the first step.
        self.ids: list[tuple[int, ...]] = [()]
        self._scores = np.zeros(1, np.float32)
        # With their mean log-probability, the best first.
        self._finished: list[tuple[float, tuple[int, ...]]] = []
        self.sentence: Sentence | None = None

    def advance(self, logits: Floats) -> list[int]:
        """Take a step's `[beams, vocabulary]`; return for each next beam the number of the one that it continues."""
        if self._options.end is not None and time.time() > self._options.end:
            raise DeadlineExceeded(f"there was no caption in time, after {len(self.ids[0])} tokens; ask for fewer")
        beams, count = self._spec.beams, len(self.ids[0]) + 1
        exact = logits - logits.max(axis=1, keepdims=True)
        totals = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True)) + self._scores[:, None]
        flat = totals.ravel()
        # Twice as many, since half of them may end.
        best = np.argpartition(-flat, 2 * beams - 1)[: 2 * beams]
        best = best[np.argsort(-flat[best], kind="stable")]
        if not np.isfinite(flat[best]).all():
            raise ModelError("the decoder's output for this picture is not a finite number; export and verify it again")
        chosen: list[tuple[int, int, float]] = []
        for place, index in enumerate(best.tolist()):
            beam, token = divmod(index, logits.shape[1])
            if token != self._spec.end and count < self._options.most:
                chosen.append((beam, token, float(flat[index])))
            elif place < beams:
                self._finished.append((float(flat[index]) / count, (*self.ids[beam], token)))
        self._finished = sorted(self._finished, key=lambda one: -one[0])[:beams]
        chosen = chosen[:beams]
        self.ids = [(*self.ids[beam], token) for beam, token, _ in chosen]
        self._scores = np.array([score for _, _, score in chosen], np.float32)
        # A running beam may still beat the worst of the captions; the heuristic of transformers.
        full = len(self._finished) == beams
        if not chosen or (full and (beams == 1 or self._scores[0] / count <= self._finished[-1][0])):
            score, ids = self._finished[0]
            self.sentence = Sentence(self._options.ids[1:], ids, math.exp(score))
        return [beam for beam, _, _ in chosen]


class Captioning(Task):
    """Answers `{"caption": "a red circle", "tokens": 4, "score": 0.97}`."""

    def check(self) -> None:
        """Check `caption` and its files."""
        spec, caption = self.spec, self.spec.caption
        check(caption is not None, "caption", caption, "a decoder and a tokenizer where task is 'caption'")
        assert caption is not None
        check(not spec.labels, "labels", list(spec.labels), "none where task is 'caption'")
        check(spec.engine in ("openvino", "onnxruntime"), "engine", spec.engine, "openvino, onnxruntime for captions")
        decoding = spec.geometry.decoding
        check(decoding != "cuda", "geometry.decoding", decoding, "full, scaled for captions")
        for key, low, high in (("max_tokens", 1, caption.positions - 1), ("beams", 1, 16), ("positions", 2, 4096)):
            check(low <= getattr(caption, key) <= high, f"caption.{key}", getattr(caption, key), f"{low} to {high}")

    def check_tokens(self, prompt: Sequence[int], words: int) -> None:
        """Check the tokens of the archive's own prompt, and that the search may choose from enough `words`."""
        caption = self.spec.caption
        assert caption is not None
        room = min(MOST_PROMPT, caption.positions - caption.max_tokens - 1)
        check(len(prompt) <= room, "caption.prompt", f"{len(prompt)} tokens long", f"at most {room}")
        check(2 * caption.beams <= words, "caption.beams", caption.beams, f"at most half of {words}, the vocabulary")

    def load(self, folder: Path, engine: Engine) -> None:
        assert self.spec.caption is not None
        self.caption, self.engine = self.spec.caption, engine
        self.words = WordPiece(folder / self.caption.tokenizer)
        self.check_tokens(self.words.encode(self.caption.prompt), len(self.words.ids))
        cross = engine.forward(np.zeros((1, *self.spec.geometry.shape, 3), np.uint8))
        layers, heads, _, depth = cross.shape[1:]
        self._empty = layers, heads, 0, depth
        none, past = np.zeros((1, 1, 1), np.int64), np.zeros((1, 1, *self._empty), np.float32)
        first: Inputs = {"ids": none, "positions": none[0], "mask": np.ones((1, 1), np.float32), "past": past}
        self._step = engine.program(folder / self.caption.decoder.file, {**first, "cross": cross})

    def options(self, prompt: str, most: int | None) -> Options:
        """Return what a request asks for; an empty prompt is the archive's own. Raise `BadEncoding`."""
        caption = self.caption
        most = caption.max_tokens if most is None else most
        if not 1 <= most <= caption.max_tokens:
            raise BadEncoding(f"max_tokens is {most}; allowed: 1 to {caption.max_tokens}")
        ids = (caption.start, *self.words.encode(prompt or caption.prompt))
        if len(ids) - 1 > (room := min(MOST_PROMPT, caption.positions - most - 1)):
            raise BadEncoding(f"the prompt has {len(ids) - 1} tokens; allowed: {room}, with {most} tokens after it")
        return Options(ids, most)

    def forward(self, pixels: NDArray[np.uint8]) -> list[Sentence | RequestError]:
        """Write the captions of pictures `[N, crop, crop, 3]` with the archive's own prompt."""
        return self.write(pixels, [self.options("", None)] * len(pixels))

    def run(self, batch: Batch) -> list[Sentence | RequestError]:
        asked = [self._asked(row, batch.end(i)) for i, row in enumerate(batch.rows) if isinstance(row, Ok)]
        return self.write(batch.stack(), asked)

    def _asked(self, row: Ok, end: float | None) -> Options | RequestError:
        try:
            return replace(self.options(row.prompt, row.max_tokens), end=end)
        except RequestError as error:
            return error

    def write(self, pixels: NDArray[np.uint8], asked: Sequence[Options | RequestError]) -> list[Any]:
        """Encode pictures together and decode together; each leaves at its end.

        Return a `Sentence` for each, or its `RequestError`, which harms no other.
        """
        results: list[Any] = list(asked)
        good = [row for row, each in enumerate(asked) if isinstance(each, Options)]
        if good:
            cross = self.engine.forward(pixels if len(good) == len(asked) else pixels[good])
            for row, result in self._decode(cross, [(row, results[row]) for row in good]):
                results[row] = result
        return results

    def _decode(self, cross: Floats, rows: list[tuple[int, Options]]) -> Iterator[tuple[int, Sentence | RequestError]]:
        """Write captions for the pictures of `cross`, which is overwritten; yield each row's result at its end."""
        running = [(row, Search(self.caption, each)) for row, each in rows]
        width = max(len(each.ids) for _, each in rows)
        # Shorter prompts stand at the right, so that all end at the same place.
        prompts = [(self.caption.pad,) * (width - len(each.ids)) + each.ids for _, each in rows]
        mask = np.array([[i >= width - len(each.ids) for i in range(width)] for _, each in rows], np.float32)
        ids, past = np.array(prompts, np.int64)[:, None], np.zeros((len(rows), 1, *self._empty), np.float32)
        while True:
            positions = (mask.cumsum(axis=1)[:, -ids.shape[2] :] - 1).clip(0).astype(np.int64)
            inputs: Inputs = {"ids": ids, "positions": positions, "mask": mask, "past": past}
            logits, present = self._step({**inputs, "cross": cross[: len(running)]})
            parents: dict[int, list[int]] = {}
            for place, (row, search) in enumerate(running):
                try:
                    beams = search.advance(logits[place])
                except RequestError as error:
                    yield row, error
                    continue
                if search.sentence is None:
                    parents[place] = beams
                else:
                    yield row, search.sentence
            if not parents:
                return
            order = _without_gaps(parents, cross, len(running))
            running = [running[place] for place in order]
            kept = np.array(order)[:, None], np.array([parents[place] for place in order])
            past = np.concatenate((past[kept], present[kept]), axis=4)
            mask = np.concatenate((mask[order], np.ones((len(order), 1), np.float32)), axis=1)
            ids = np.array([[beam[-1:] for beam in search.ids] for _, search in running], np.int64)

    def answers(self, results: Sequence[Sentence | RequestError], batch: Batch) -> list[Answer]:
        return [self._answer(each) for each in results]

    def _answer(self, sentence: Sentence | RequestError) -> Answer:
        if isinstance(sentence, RequestError):
            return failure(sentence)
        body = {"caption": self.text(sentence), "tokens": len(sentence.ids), "score": round(sentence.score, 6)}
        return Answer(200, "OK", dump(body), {"content-type": JSON})

    def text(self, sentence: Sentence) -> str:
        """Return a caption as text, the prompt included."""
        return self.words.decode((*sentence.prompt, *sentence.ids))

    def top(self, body: dict[str, Any]) -> list[tuple[str, float]]:
        return [(str(body["caption"]), float(body["score"]))]

    def compare(self, expected: Sequence[Mapping[str, Any]], results: Sequence[Sentence | RequestError]) -> None:
        """Compare the tokens, and the score within `spec.tolerance`."""
        for entry, result in zip(expected, results, strict=True):
            name, ids, value = f"{GOLDEN}/{entry['file']}", tuple(map(int, entry["ids"])), float(entry["top"][0][1])
            if isinstance(result, RequestError):
                raise SelfTestError(f"{name} gets no caption ({result}); export the model again")
            if result.ids != ids:
                raise SelfTestError(
                    f"{name} gets the tokens {list(result.ids)}, expected {list(ids)} ({entry['top'][0][0]!r}); model, "
                    "tokenizer or preprocessing are not those of the export: build the archive again"
                )
            if abs(result.score - value) > self.spec.tolerance:
                raise SelfTestError(
                    f"{name} gets the score {result.score:.3f}, expected {value:.3f} within {self.spec.tolerance}; "
                    "preprocessing or precision is not that of the export: build again"
                )


def _without_gaps(kept: Container[int], cross: Floats, count: int) -> list[int]:
    """Return the places of the rows that go on, of `count`, in their new order, and order `cross` like that.

    The last rows fill the gaps, since the keys and values of one picture may have 40 MB.
    """
    order = list(range(count))
    for place in reversed(range(count)):
        if place not in kept:
            last = order.pop()
            if place < len(order):
                order[place] = last
                cross[place] = cross[len(order)]
    return order
