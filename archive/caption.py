"""From a BLIP checkpoint of transformers to an exported folder: encoder, decoder with a key-value cache, tokenizer."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import random
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from archive import goldens
from archive.export import ExportRequest
from archive.goldens import mistakes, scenes
from archive.graph import Preprocessing, Uint8Input
from archive.onnx_graph import remove_origin
from archive.variants.caption import task_of
from beeline import golden, pixels
from beeline.caption import Captioning
from beeline.engines.onnxruntime import INPUT
from beeline.errors import ArchiveError, short
from beeline.spec import EXPECTED, FILE_NAME, GOLDEN, Artifact, Caption, Geometry, ModelSpec, Provenance
from host.files import sha256, whole_folder, write_json

ENCODER, DECODER, TOKENIZER = "encoder.onnx", "decoder.onnx", "tokenizer.json"
CROSS = "cross"
INPUTS, OUTPUTS = ("ids", "positions", "mask", "past", CROSS), ("logits", "present")
# Of masked positions: its exponential is exactly 0 beside any real score, and it stays finite where all are masked.
_NEVER = -1e9
# Golden pictures that are drawn, to choose from; and the mistakes that they must notice.
_CANDIDATES, NOTICED = 24, ("channels", "normalisation", "exif")
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@dataclass(frozen=True)
class Checkpoint:
    """A captioning model of transformers in evaluation mode, its tokenizer, and how it prepares pictures."""

    model: Any
    tokenizer: Any
    preprocessing: Preprocessing

    def planes(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Return uint8 `[N, H, W, 3]` as the model takes it, `[N, 3, H, W]`."""
        prepared = self.preprocessing
        rows = torch.from_numpy(pixels).float() / 255
        rows = (rows - torch.tensor(prepared.mean)) / torch.tensor(prepared.std)
        return rows.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Normalised pictures `[N, 3, H, W]` to the cross-attention's keys and values, `[N, 2 * layers, heads, S, d]`."""

    def __init__(self, blip: Any) -> None:
        super().__init__()
        self.vision: Any = blip.vision_model
        self.layers: Any = nn.ModuleList(layer.crossattention.self for layer in blip.text_decoder.bert.encoder.layer)

    def forward(self, planes: Tensor) -> Tensor:
        """Compute them once a picture; every step and beam of the decoder uses them."""
        hidden = self.vision(pixel_values=planes).last_hidden_state
        each = [part(hidden) for layer in self.layers for part in (layer.key, layer.value)]
        return torch.stack([_heads(values, self.layers[0]) for values in each], 1)


class Decoder(nn.Module):
    """One step of the text decoder for K beams a picture; P tokens are in the cache and T are new.

    Shapes are those of `beeline.caption`: `logits` are of the last token, and `present` is to be appended to `past`.
    """

    def __init__(self, blip: Any) -> None:
        super().__init__()
        self.embeddings: Any
        self.embeddings, self.layers = blip.text_decoder.bert.embeddings, blip.text_decoder.bert.encoder.layer
        self.head = blip.text_decoder.cls.predictions

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, past: Tensor, cross: Tensor) -> tuple[Any, ...]:
        """Run all layers as `BlipTextLMHeadModel` of transformers does."""
        new, old = ids.shape[2], past.shape[4]
        words = self.embeddings.word_embeddings(ids)
        hidden = self.embeddings.LayerNorm(words + self.embeddings.position_embeddings(positions)[:, None])
        # A token sees the real ones up to itself.
        seen = torch.arange(old + new)[None] <= old + torch.arange(new)[:, None]
        bias = ((1 - mask[:, None] * seen) * _NEVER)[:, None, None]
        present = []
        for number, layer in enumerate(self.layers):
            own = layer.attention.self
            query, key, value = (_heads(part(hidden), own) for part in (own.query, own.key, own.value))
            present += [key, value]
            keys = torch.cat([past[:, :, 2 * number], key], 3)
            values = torch.cat([past[:, :, 2 * number + 1], value], 3)
            hidden = layer.attention.output(_attend(query, keys, values, bias), hidden)
            # All beams of a picture are queries of the same keys.
            query = _heads(layer.crossattention.self.query(hidden).flatten(1, 2), own)
            context = _attend(query, cross[:, 2 * number], cross[:, 2 * number + 1])
            hidden = layer.crossattention.output(context.view(hidden.shape), hidden)
            hidden = layer.output(layer.intermediate(hidden), hidden)
        return self.head(hidden[:, :, -1]), torch.stack(present, 2)


def _heads(values: Tensor, attention: Any) -> Tensor:
    """Split `[..., S, heads * d]` into `[..., heads, S, d]`."""
    split: Tensor = values.view(*values.shape[:-1], attention.num_attention_heads, attention.attention_head_size)
    return split.transpose(-2, -3)


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `[..., T, heads * d]` of heads `[..., heads, T or S, d]`."""
    scores = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    shares = (scores if bias is None else scores + bias).softmax(-1)
    context: Tensor = (shares @ values).transpose(-2, -3).flatten(-2)
    return context


def transformers_for(user: str) -> Any:
    """Import transformers; raise `ArchiveError` that says what needs it where it is not installed."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        needs = f"{user} needs {error.name}, which is not installed"
        raise ArchiveError(f"{needs}; install requirements/extras.txt, as `make setup` does") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load(checkpoint: str) -> Checkpoint:
    """Read a folder of transformers with a `BlipForConditionalGeneration`, or a name on its hub.

    Raise `ArchiveError` for another architecture, a part that is missing, or weights that are damaged or incomplete.
    """
    transformers = transformers_for(checkpoint)

    def read(kind: Any, what: str, fix: str, **options: Any) -> Any:
        try:
            return kind.from_pretrained(checkpoint, **options)
        except Exception as error:
            raise ArchiveError(f"{checkpoint} has no {what} that can be read ({short(error)}); {fix}") from error

    config = read(transformers.AutoConfig, "config.json", "name a folder with a BLIP checkpoint of transformers")
    named = (config.architectures or ["BlipForConditionalGeneration"])[0]
    if config.model_type != "blip" or named != "BlipForConditionalGeneration":
        kind = f"{checkpoint} is a {named if config.architectures else config.model_type}"
        raise ArchiveError(f"{kind}, and captions are written by a BlipForConditionalGeneration; name one of those")
    images = read(transformers.BlipImageProcessor, "image processor", "copy its preprocessor_config.json beside it")
    tokenizer = read(transformers.AutoTokenizer, "tokenizer", "copy its tokenizer.json or vocab.txt into the folder")
    if not getattr(tokenizer, "is_fast", False) or len(tokenizer) < 0.9 * config.text_config.vocab_size:
        words = config.text_config.vocab_size
        few = f"has no tokenizer of its own: one of {len(tokenizer)} tokens, its network of {words}"
        raise ArchiveError(f"{checkpoint} {few}; copy its tokenizer.json or vocab.txt into the folder")
    blip, options = transformers.BlipForConditionalGeneration, {"dtype": torch.float32, "output_loading_info": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, about = read(blip, "weights", "download or copy model.safetensors again", **options)
    if lacking := sorted(about["missing_keys"]):
        raise ArchiveError(f"{checkpoint} lacks {len(lacking)} weights, as {lacking[0]}; download or copy it again")
    return Checkpoint(model.eval(), tokenizer, _preprocessing(checkpoint, images, config.vision_config.image_size))


def licence(folder: Path) -> str:
    """Return the licence that the model card of a folder names, else `unknown`."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, IndexError):
        front = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
        return str(yaml.safe_load(front).get("license", "unknown"))
    return "unknown"


def _preprocessing(checkpoint: str, images: Any, side: int) -> Preprocessing:
    """Return the image processor's as ours: both sides at once to the network's size, then mean and deviation."""
    size = dict(images.size)
    whole = images.do_resize and images.do_rescale and images.do_normalize and not images.do_center_crop
    if not whole or abs(images.rescale_factor * 255 - 1) > 1e-6 or int(images.resample) not in _FILTERS:
        what = "does not resize, scale by 1/255 and normalise, or it crops"
        raise ArchiveError(f"the image processor of {checkpoint} {what}; name a checkpoint with BLIP's own")
    if (size.get("height"), size.get("width")) != (side, side):
        what = f"resizes to {size}, its network takes {side} x {side}"
        raise ArchiveError(f"the image processor of {checkpoint} {what}; correct its preprocessor_config.json")
    geometry = Geometry(side, side, _FILTERS[int(images.resample)], fit="squash")
    return Preprocessing(geometry, tuple(images.image_mean), tuple(images.image_std))


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `encoder.onnx`, `decoder.onnx` and `tokenizer.json` into `folder`."""
    text, shape = checkpoint.model.config.text_config, checkpoint.preprocessing.geometry.shape
    prepared = checkpoint.preprocessing
    encoder = Uint8Input(Encoder(checkpoint.model), prepared.mean, prepared.std, shape).eval()
    # Sizes of 0 and 1 would be taken for constants.
    pictures = torch.zeros(2, *shape, 3, dtype=torch.uint8)
    _export(encoder, (pictures,), (INPUT,), (CROSS,), {INPUT: {0}}, folder / ENCODER)
    with torch.no_grad():
        cross = encoder(pictures)
    heads, depth, beams, old, new = text.num_attention_heads, cross.shape[-1], 3, 5, 4
    example = (
        torch.zeros(2, beams, new, dtype=torch.int64),
        torch.zeros(2, new, dtype=torch.int64),
        torch.ones(2, old + new),
        torch.zeros(2, beams, cross.shape[1], heads, old, depth),
        cross,
    )
    changing = {"ids": {0, 1, 2}, "positions": {0, 1}, "mask": {0, 1}, "past": {0, 1, 4}, CROSS: {0}}
    _export(Decoder(checkpoint.model).eval(), example, INPUTS, OUTPUTS, changing, folder / DECODER)
    checkpoint.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))


def _export(
    module: nn.Module, example: Any, inputs: Any, outputs: Any, changing: dict[str, set[int]], path: Path
) -> None:
    """Write a module as ONNX; `changing` are by input the dimensions that are of any size."""
    shapes = tuple(dict.fromkeys(changing[name], Dim.DYNAMIC) for name in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        # PyTorch warns about its own code.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, example, dynamo=True, verbose=False, input_names=inputs, output_names=outputs, dynamic_shapes=shapes
        )
    assert program is not None
    model = program.model_proto
    remove_origin(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


@dataclass(frozen=True)
class Written:
    """A caption by transformers: the new tokens, the text with the prompt, and the score of `beeline.caption`.

    `margin` is how far the best token's probability was before the next one's, at the least sure step.
    """

    ids: list[int]
    text: str
    score: float
    margin: float


def reference(checkpoint: Checkpoint, crops: NDArray[np.uint8], caption: Caption) -> list[Written]:
    """Write captions for uint8 `[N, H, W, 3]` by `generate` of transformers, in fp32."""
    words, model, planes = checkpoint.tokenizer, checkpoint.model, checkpoint.planes(crops)
    first = [caption.start, *words(caption.prompt, add_special_tokens=False).input_ids]
    options = {"max_new_tokens": caption.max_tokens, "num_beams": caption.beams, "do_sample": False}
    with torch.no_grad():
        # Of a prompt, `generate` drops the last token, since a tokenizer ends it with the end.
        rows = model.generate(planes, torch.tensor([[*first, caption.end]] * len(crops)), **options)
        shares = model(planes, rows).logits.log_softmax(-1)[:, len(first) - 1 :]
    written = []
    for row, share in zip(rows.tolist(), shares, strict=True):
        ids = row[len(first) :]
        ids = ids[: ids.index(caption.end) + 1] if caption.end in ids else ids
        of_ids = share[range(len(ids)), ids]
        best = share[: len(ids)].exp().topk(2).values
        margin = float((best[:, 0] - best[:, 1]).min())
        # As a worker writes it, which does not join a word and an apostrophe.
        text = words.decode([*first[1:], *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        written.append(Written(ids, text, math.exp(float(of_ids.mean())), margin))
    return written


def export(checkpoint: Checkpoint, request: ExportRequest, out: Path, **writing: Any) -> ModelSpec:
    """Write graphs, tokenizer, `model_spec.json` and `golden/` into `out`, for ONNX Runtime; return the spec.

    `writing` are `max_tokens`, `beams` and `prompt` of `beeline.spec.Caption`. Raise `ArchiveError` where the golden
    pictures would not notice a mistake, or where a caption is not that of transformers.
    """
    text, kind, words = checkpoint.model.config.text_config, request.architecture, checkpoint.tokenizer
    names = {"start": text.bos_token_id, "end": text.sep_token_id, "pad": text.pad_token_id}
    names["positions"] = text.max_position_embeddings

    def of(encoder: str, decoder: str, tokenizer: str) -> ModelSpec:
        return ModelSpec(
            name=request.name,
            version=request.version,
            labels=(),
            geometry=request.preprocessing.geometry,
            model=Artifact(ENCODER, "onnx", encoder, kind),
            geometry_version=pixels.GEOMETRY,
            engine="onnxruntime",
            accuracy=request.accuracy,
            provenance=request.provenance,
            task="caption",
            caption=Caption(Artifact(DECODER, "onnx", decoder, kind), TOKENIZER, tokenizer, **names, **writing),
        )

    # Checked before anything takes time.
    prompt = words(writing.get("prompt", ""), add_special_tokens=False).input_ids
    Captioning(of(*["0" * 64] * 3)).check_tokens(prompt, min(len(words), text.vocab_size))
    with whole_folder(out) as draft:
        write(checkpoint, draft)
        spec = of(*(sha256(draft / name) for name in (ENCODER, DECODER, TOKENIZER)))
        spec.save(draft / FILE_NAME)
        _make_goldens(draft, spec, checkpoint, request)
    return spec


def export_checkpoint(
    source: Path,
    out: Path,
    named: tuple[str, str],
    origin: Provenance,
    golden: Path | None,
    blind_to: tuple[str, ...],
    **writing: Any,
) -> ModelSpec:
    """Export a checkpoint, a folder or a hub's name, as `named`: name and version; see `export`.

    Where `origin` says no licence it is the checkpoint's own.
    """
    checkpoint = load(str(source))
    if origin.licence == "unknown":
        origin = replace(origin, licence=licence(source))
    request = ExportRequest(
        *named, (), checkpoint.preprocessing, "blip", provenance=origin, golden_pictures=golden, blind_to=blind_to
    )
    return export(checkpoint, request, out, **writing)


def _make_goldens(folder: Path, spec: ModelSpec, checkpoint: Checkpoint, request: ExportRequest) -> None:
    """Write golden pictures with the captions of transformers, and prove that the graphs and mistakes are noticed."""
    assert spec.caption is not None
    own = request.golden_pictures
    encoded = goldens.given(own, spec) if own else [_scene(spec.geometry, i) for i in range(_CANDIDATES)]
    crops = np.stack([pixels.decode(each.data, spec.geometry) for each in encoded])
    pairs = list(zip(encoded, reference(checkpoint, crops, spec.caption), strict=True))
    if not own:
        # Of each shape the surest one.
        groups = [pairs[number :: len(goldens.SHAPES)] for number in range(len(goldens.SHAPES))]
        pairs = [max(group, key=lambda pair: pair[1].margin) for group in groups]
    (folder / GOLDEN).mkdir()
    entries: list[dict[str, Any]] = []
    for number, (picture, written) in enumerate(pairs):
        name = f"{number}.{picture.ending.removeprefix('turned.')}"
        (folder / GOLDEN / name).write_bytes(picture.data)
        digest, top = hashlib.sha256(picture.data).hexdigest(), [[written.text, round(written.score, 6)]]
        entries.append({"file": name, "sha256": digest, "top": top, "ids": written.ids})
    record: dict[str, Any] = {"schema": 1, "detects": [], "pictures": entries}
    write_json(folder / GOLDEN / EXPECTED, record)
    task, photometry = task_of(folder, spec), (request.preprocessing.mean, request.preprocessing.std)
    golden.replay(folder, spec, task.forward)
    seen = mistakes.noticed(folder, spec, task.forward, [picture.data for picture, _ in pairs], photometry)
    goldens.check_noticed([name for name in NOTICED if seen.get(name) is False and name not in request.blind_to])
    write_json(folder / GOLDEN / EXPECTED, {**record, "detects": [name for name in seen if seen[name]]})


def _scene(geometry: Geometry, number: int) -> goldens.Encoded:
    """Draw golden picture `number`, in the size and the form of each of `goldens.SHAPES` in turn."""
    pattern = goldens.pattern(geometry, number % len(goldens.SHAPES), 0, number)
    size = pattern.width, pattern.height
    return goldens.encode(np.asarray(scenes.draw(random.Random(number), size)[0]), pattern.ending)
