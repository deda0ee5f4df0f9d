"""Weights in what a file holds: under the names of their architecture, whatever a training program put around them."""

from __future__ import annotations

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archive.architectures import AUXILIARY, build
from beeline.errors import ArchiveError, short

State = dict[str, Tensor]
# Parts of names of tensors, and what they become.
_RENAMED = (
    # Of modules that wrap a network, or a part of it.
    (re.compile(r"((?<=\.)|^)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."), ""),
    # Older names of torchvision, which its published files still have. Its own loaders rename them too.
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
_AUXILIARY_HEAD = re.compile(r"(^|\.)(aux\d?|AuxLogits)\.")
_MISFIT = re.compile(r"size mismatch for (\S+): .*?Size\((\[.*?\])\).*?Size\((\[.*?\])\)")
# A number of classes that no layer has by chance.
_CLASSES = 1009
# How deep dictionaries and lists lie in each other at most, and how many names a sentence has at most.
_DEEPEST, _NAMED = 4, 3


@dataclass(frozen=True)
class Weights:
    """The weights of an architecture that a file holds.

    `state` has the tensors by name, and `head` the names of those whose shapes depend on the number of classes.
    `classes` is None if the file has no head of this architecture; `why_headless` is then a sentence about it. `notes`
    are sentences about what was left out, or found in another place. `image_size` is the side in pixels of the pictures
    that a ViT of torchvision was trained with; None for other networks.
    """

    path: Path
    architecture: str
    state: State
    head: frozenset[str]
    classes: int | None
    why_headless: str
    notes: tuple[str, ...]
    image_size: int | None

    def network(self, transform_input: bool = False) -> nn.Module:
        """Return the network with these weights, in evaluation mode; see `archive.architectures.build`."""
        if self.classes is None:
            raise ArchiveError(self.why_headless)
        network = build(self.architecture, self.classes, transform_input, self.image_size)
        self._load(network, self.state)
        return network.eval()

    def start(self, network: nn.Module) -> None:
        """Load all weights but those of the head into `network`, which is for other labels."""
        self._load(network, {name: tensor for name, tensor in self.state.items() if name not in self.head})

    def _load(self, network: nn.Module, state: State) -> None:
        loaded = OrderedDict(state)
        # An MNASNet loads nothing without its version. One of version 1 had other first layers, and makes them again.
        loaded._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
        for version in range(network._version, 0, -1):
            loaded._metadata[""]["version"] = version  # type: ignore[attr-defined]
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "A new version of MNASNet", UserWarning)
                    network.load_state_dict(loaded, strict=False)
                return
            except RuntimeError as error:
                why = str(error)
        if (match := _MISFIT.search(why)) is None:
            raise ArchiveError(f"{self.path} does not fit {self.architecture} ({short(why)})")
        shapes = f"has {match[1]!r} of shape {match[2]}, {self.architecture} has {match[3]}"
        fix = "name the right architecture, and the size of picture that it was trained for"
        raise ArchiveError(f"{self.path} {shapes}; {fix}")


def find_weights(path: Path, values: Any, architecture: str) -> Weights:
    """Find weights of `architecture` in what the file `path` holds; raise `ArchiveError` for none, or several sets."""
    form = _Form(architecture)
    parts = [(place, form.renamed(tensors)) for place, tensors in _parts(values)]
    fits = [fit for part in parts for fit in form.fits(*part)]
    if not fits:
        raise ArchiveError(_no_fit(path, architecture, parts, form.body))
    place, state, others = fits[0]
    for _, other, _ in fits[1:]:
        pairs = ((state[name], other[name]) for name in state.keys() & other.keys())
        same = all(one.dtype == another.dtype and torch.equal(one, another) for one, another in pairs)
        if other.keys() != state.keys() or not same:
            sets = f"{len(fits)} sets of weights of {architecture}: {', '.join(fit[0] for fit in fits)}"
            raise ArchiveError(f"{path} holds {sets}; save the one that you want in a file of its own")
    notes = [f"the weights are {place} of {path.name}"] if place else []
    if moved := form.with_single_layer(state):
        layer, state = moved
        notes.append(f"the head is {layer} of {path.name}, where {architecture} has {form.main}")
    odd = [name for name in state if name not in form.shapes and state[name].numel() > 1]
    if elsewhere := [name for name in odd if not form.is_near(name)]:
        raise ArchiveError(f"{path} has {elsewhere[0]!r}, which {architecture} lacks; {_OTHER}")
    classes, why = form.classes(state), ""
    if classes is None:
        own = {**state, **others} if form.main not in state else state
        found = [f"{name} {list(own[name].shape)}" for name in own if name not in form.body and own[name].ndim > 1]
        why = f"{path} lacks {form.main!r}, the head of {architecture}; train one with `beeline train`"
        if found:
            heads = f"a head of its own ({', '.join(found[:_NAMED])}) where {architecture} has {form.main}"
            fix = f"make TorchScript of the model: {to_torchscript()}"
            why = f"{path} has {heads}, and a state dict lacks its code; {fix}"
        state = {name: tensor for name, tensor in state.items() if not form.is_near(name)}
    if left := [*(name for name in state if name not in form.shapes), *others]:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        notes.append(f"left out of {path.name}: {', '.join(left[:_NAMED])}{more}")
    known = {name: tensor for name, tensor in state.items() if name in form.shapes}
    if coded := [name for name in known if name.endswith("weight") and not known[name].is_floating_point()]:
        kind = str(known[coded[0]].dtype).removeprefix("torch.")
        raise ArchiveError(f"{path} has {coded[0]!r} as {kind}, without the code that reads it; save it as float32")
    return Weights(path, architecture, known, form.head, classes, why, tuple(notes), form.image_size(state))


def to_torchscript(file: str | None = None) -> str:
    """Return the two lines that make TorchScript of a whole model, of the pickled one in `file` if there is one."""
    loaded = f"torch.load('{file}', weights_only=False).eval()" if file else "model.eval()"
    return f"`model = {loaded}`, `torch.jit.trace(model, torch.zeros(1, 3, 224, 224)).save('model.pt')`"


_OTHER = f"name the right architecture, or give `archive build` a changed network as TorchScript: {to_torchscript()}"


class _Form:
    """What a state dict of an architecture looks like.

    `shapes` are those for `_CLASSES` classes, in order. The tensors of `head` have a row a class; `main` is the last
    weight of these. `body` are all tensors except those near the head, which may be the user's own, and batch
    counters, which came with torch 0.4.1 and change nothing.
    """

    def __init__(self, architecture: str) -> None:
        try:
            with torch.device("meta"):
                network = build(architecture, _CLASSES)
        except NotImplementedError:
            # A RegNet computes with tensors when it is built.
            with torch.random.fork_rng(devices=()):
                network = build(architecture, _CLASSES)
        self.shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        self.head = frozenset(name for name, shape in self.shapes.items() if shape[:1] == (_CLASSES,))
        if not self.head:
            raise ArchiveError(f"the architecture {architecture} has no head with a row a class; name a classifier")
        self.main = [name for name in self.shapes if name in self.head and name.endswith("weight")][-1]
        self.body = [name for name in self.shapes if not self.is_near(name) and not name.endswith("_batches_tracked")]
        self._renamed = [each for each in _RENAMED if not any(each[0].search(name) for name in self.shapes)]
        self._auxiliary = _AUXILIARY_HEAD if architecture in AUXILIARY else None

    def is_near(self, name: str) -> bool:
        """Whether a tensor is in the same part of the network as the head, as `classifier.0.weight`."""
        return name.partition(".")[0] in {name.partition(".")[0] for name in self.head}

    def renamed(self, tensors: State) -> State:
        """Return the tensors under today's names, without wrappers and without auxiliary heads."""
        renamed: State = {}
        for name, tensor in tensors.items():
            for pattern, newer in self._renamed:
                name = pattern.sub(newer, name)
            if not (self._auxiliary and self._auxiliary.search(name)):
                renamed[name] = tensor
        return renamed

    def fits(self, place: str, tensors: State) -> Iterator[tuple[str, State, State]]:
        """Yield the place and the tensors of each prefix that has the whole body, and all other tensors."""
        first = self.body[0]
        for prefix in sorted({name.removesuffix(first) for name in tensors if f".{name}".endswith(f".{first}")}):
            state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if all(name in state for name in self.body):
                others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
                inside = f"[{prefix}*]" if place else f"{prefix}*"
                yield place + (inside if prefix else ""), state, others

    def classes(self, state: State) -> int | None:
        """Return the number of classes; None if the tensors near the head are not the architecture's."""
        near = {name for name in state if self.is_near(name) and (name in self.shapes or state[name].numel() > 1)}
        if near != {name for name in self.shapes if self.is_near(name)}:
            return None
        first = {name: int(name in self.head) for name in near}
        same = all(state[name].shape[first[name] :] == self.shapes[name][first[name] :] for name in near)
        return int(state[self.main].shape[0]) if same else None

    def image_size(self, state: State) -> int | None:
        """Return the side of the pictures that the positions of torchvision's ViT are for; None for other networks."""
        if "encoder.pos_embedding" not in self.shapes:
            return None
        # One position is the class token's.
        patches = state["encoder.pos_embedding"].shape[1:2].numel() - 1
        return math.isqrt(max(patches, 0)) * int(self.shapes["conv_proj.weight"][-1])

    def with_single_layer(self, state: State) -> tuple[str, State] | None:
        """Return the name of the only layer in the head's place, as `fc.1.weight`, and `state` with the head's name."""
        layers = [name for name in state if name not in self.shapes and self.is_near(name) and state[name].ndim > 1]
        if self.main in state or len(layers) != 1 or not layers[0].endswith("weight"):
            return None
        old, new = layers[0].removesuffix("weight"), self.main.removesuffix("weight")
        moved = {new + name.removeprefix(old) if name.startswith(old) else name: state[name] for name in state}
        return None if self.classes(moved) is None else (layers[0], moved)


def _parts(values: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield each dictionary of named tensors inside what a file holds, with its place."""
    if depth > _DEEPEST or not isinstance(values, (dict, list, tuple)):
        return
    items = list(values.items() if isinstance(values, dict) else enumerate(values))
    if tensors := {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}:
        yield place, tensors
    for name, value in items:
        yield from _parts(value, f"{place}[{name!r}]", depth + 1)


def _no_fit(path: Path, architecture: str, parts: list[tuple[str, State]], body: list[str]) -> str:
    """Return the sentence about weights that fit nowhere: what the most similar part lacks."""
    if not parts:
        return f"{path} holds no tensors by name; save model.state_dict() with torch.save"
    place, tensors = max(parts, key=lambda part: len(part[1].keys() & set(body)))
    lacking = next((name for name in body if name not in tensors), body[0])
    where = f"{path}, in {place}," if place else f"{path}"
    some = short(", ".join(list(tensors)[:_NAMED]))
    return f"{where} lacks {lacking!r}, which {architecture} has (it has {some} ...); {_OTHER}"
