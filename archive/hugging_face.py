"""Models of Hugging Face's transformers: their files hold no code, so a sentence says how to export them.

Without torch, since a plan of training is made without it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_CONFIG, _PREPARATION = "config.json", "preprocessor_config.json"
# Pillow's numbers.
_FILTERS, _LACKING = {1: "lanczos", 3: "bicubic"}, {0: "nearest", 4: "box", 5: "hamming"}
# Of these image processors a size that is one number is the shorter side; of the others it is both.
_SHORTER = re.compile("Bit|CLIP|MobileNet|MobileViT|PoolFormer|TextNet")
# From this size on, a model with a `crop_pct` and no middle crop gets the whole picture, squashed.
_WHOLE = 384


def refusal(path: Path) -> str | None:
    """Return how to bring the model of transformers at `path`, its folder or file of weights; None for another one."""
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.suffix not in (".safetensors", ".bin"):
        return None
    config = _read(folder / _CONFIG)
    # timm names its networks under `architecture`, and its weights are read.
    if "model_type" not in config or "architecture" in config:
        return None
    name = str((config.get("architectures") or [config["model_type"]])[0])
    if "ForImageClassification" not in name:
        return f"{path} is a {name} of transformers, which is no image classifier; name one ...ForImageClassification"
    side, options = _options(_read(folder / _PREPARATION))
    load = f"model = transformers.AutoModelForImageClassification.from_pretrained('{folder}').eval()"
    wrap = "logits = torch.nn.Module(); logits.model = model; logits.forward = lambda pictures: model(pictures).logits"
    program = f"torch.export.export(logits, (torch.zeros(2, 3, {side}),), dynamic_shapes=({{0: batch}},), strict=False)"
    return (
        f"{path} is a {name} of transformers, whose files hold no code, so export it first, in Python: "
        f"`import torch, transformers; {load}; {wrap}`, `batch = torch.export.Dim('batch'); "
        f"torch.export.save({program}, 'model.pt2')`; then take --model model.pt2 --labels {folder / _CONFIG}{options}"
    )


def _options(values: dict[str, Any]) -> tuple[str, str]:
    """Return height and width, and the options of `archive build` that a `preprocessor_config.json` stands for."""
    numbers = {key: values.get(f"image_{key}") for key in ("mean", "std")}
    if values.get("include_top") and isinstance(numbers["std"], list):
        # EfficientNet's divides by them twice.
        numbers["std"] = [round(each * each, 9) for each in numbers["std"]]
    options = " --preset unit" if values else ""
    flipped = values.get("do_flip_channel_order")
    # MobileViT's, the only one that takes blue first, does not normalise if the file says nothing.
    if values.get("do_normalize", not flipped) and all(isinstance(each, list) for each in numbers.values()):
        options = "".join(f" --{key} {','.join(map(str, each or ()))}" for key, each in numbers.items())
    options += " --channels bgr" if flipped else ""
    high, wide, geometry, own = _geometry(values)
    if (filter_ := values.get("resample")) in _FILTERS:
        options += f" --interpolation {_FILTERS[filter_]}"
    elif filter_ in _LACKING:
        own = [*own, f"resizes with the filter {_LACKING[filter_]}, so these take bilinear"]
    said = f"; no option says that its own preprocessing {', and '.join(own)}" if own else ""
    return f"{high}, {wide}", options + geometry + said


def _geometry(values: dict[str, Any]) -> tuple[int, int, str, list[str]]:
    """Return height, width, the options for them, and what no option says.

    Source: the image processors of transformers 5.24. There an exact height and width squash a picture.
    """
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
    part = values.get("crop_pct") or (224 / 256 if re.search("ConvNe|Levit", kind) else None)
    size = _sides(values.get("size"), square=not part and not _SHORTER.search(kind))
    cut = _sides(values.get("crop_size")) if values.get("do_center_crop") else {}
    if cut and "Perceiver" in kind:
        # It crops the same part before it resizes.
        size, cut = {"shortest_edge": cut["height"]}, size
    edge = size.get("shortest_edge") or (part and size.get("height"))
    high, wide = ((cut or size).get(side, edge or 224) for side in ("height", "width"))
    crop = f" --crop {high if high == wide else f'{wide}x{high}'}"
    if not size:
        return high, wide, crop if cut else "", []
    if not edge and cut not in ({}, size):
        own = f"squashes pictures to {size['width']}x{size['height']} before it crops, so these keep their proportions"
        return high, wide, f" --resize {min(size.values())}{crop}", [own]
    if not edge or (part and edge >= _WHOLE and not cut):
        return high, wide, f" --fit squash{crop}", []
    uncut = [] if cut or part else ["does not crop, so these take the middle"]
    return high, wide, f" --resize {int(edge / part) if part else edge}{crop}", uncut


def _sides(size: Any, square: bool = True) -> dict[str, int]:
    """Return a size as a dictionary; one number is both sides, or only the shorter one."""
    if isinstance(size, int):
        return {"height": size, "width": size} if square else {"shortest_edge": size}
    known = isinstance(size, dict) and ("shortest_edge" in size or {"height", "width"} <= size.keys())
    return size if known else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
