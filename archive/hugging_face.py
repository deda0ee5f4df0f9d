"""Models of Hugging Face's transformers: their files hold no code, so a sentence says how to export them.

Without torch, since a plan of training is made without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONFIG, _PREPARATION = "config.json", "preprocessor_config.json"
_FILTERS = {1: "lanczos", 3: "bicubic"}
# From this size on, a model with a `crop_pct` gets the whole picture, squashed.
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
    options = " --preset unit" if values else ""
    if values.get("do_normalize", True) and all(isinstance(each, list) for each in numbers.values()):
        options = "".join(f" --{key} {','.join(map(str, each or ()))}" for key, each in numbers.items())
    options += " --channels bgr" if values.get("do_flip_channel_order") else ""
    if values.get("resample") in _FILTERS:
        options += f" --interpolation {_FILTERS[values['resample']]}"
    size, part, crops = _sides(values.get("size")), values.get("crop_pct"), values.get("do_center_crop")
    edge = size.get("shortest_edge") or size.get("height")
    if not edge:
        return "224, 224", options
    cut = _sides(values.get("crop_size")) if crops else size
    high, wide = cut.get("height", edge), cut.get("width", edge)
    if part and edge < _WHOLE:
        options += f" --resize {int(edge / part)}"
    else:
        options += f" --resize {edge}" if crops or ("shortest_edge" in size and not part) else " --fit squash"
    return f"{high}, {wide}", f"{options} --crop {high if high == wide else f'{wide}x{high}'}"


def _sides(size: Any) -> dict[str, int]:
    """Return a size as a dictionary; a number is both sides."""
    return {"height": size, "width": size} if isinstance(size, int) else size if isinstance(size, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
