"""A tiny BLIP checkpoint with seeded weights, as transformers saves it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "a",
    "photo",
    "of",
    "red",
    "##s",
    "circle",
    "blue",
    "square",
    "two",
    "left",
]
SIDE = 32


def checkpoint(folder: Path) -> Path:
    """Write weights, tokenizer and image processor into `folder`."""
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.disable_progress_bar()
    tokens = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "vocab_size": len(WORDS)}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Weights so large that captions differ between pictures.
    text = {**shape, **tokens, "max_position_embeddings": 32, "initializer_range": 0.4}
    vision = {**shape, "image_size": SIDE, "patch_size": 16, "initializer_range": 0.3}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, initializer_range=0.4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BlipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder
