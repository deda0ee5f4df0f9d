"""An archive of TorchServe's own `image_classifier` as a source: its model, labels, name and version.

That handler's preprocessing is the preset `imagenet`, and it answers with the best five labels.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from archive.artifact import kind_of, load_network, read_tensors
from archive.graph import Network
from archive.mar import MANIFEST
from beeline.errors import ArchiveError, short
from beeline.spec import EXPECTED, GOLDEN
from host import Say, zips

_HANDLER, _LABELS = "image_classifier", "index_to_name.json"
_RULES = zips.Rules(ArchiveError, "copy it again", 2_000, 4 << 30, 100)
# Resize rounds differently, and the worker may have another version of PyTorch.
_APART = 0.05
_SECONDS = 300
_OWN = """
import json, sys
from unittest.mock import Mock
from ts.context import Context, RequestProcessor
from ts.torch_handler.image_classifier import ImageClassifier

folder, manifest, pictures = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
context = Context(manifest["model"]["modelName"], folder, manifest, 1, None, "0.12.0", model_yaml_config={})
context.request_processor, context.metrics = [RequestProcessor({})], Mock()
handler = ImageClassifier()
handler.initialize(context)
# It answers with five labels, and fails where there are fewer.
handler.topk = 1
print(json.dumps([handler.handle([{"body": open(path, "rb").read()}], context)[0] for path in pictures]))
"""


@dataclass(frozen=True)
class Foreign:
    """An unpacked archive of `image_classifier`; `labels` is None where it has none."""

    folder: Path
    manifest: dict[str, Any]
    name: str
    version: str
    weights: Path
    labels: Path | None

    def network(self, architecture: str | None = None) -> Network:
        """Return its network; a state dict is loaded into the class of its own model file, or into `architecture`.

        The model file is code of the archive and runs in this process.
        """
        file = self.manifest["model"].get("modelFile")
        if not file or architecture or kind_of(self.weights) != "pickle":
            return load_network(self.weights, architecture)
        try:
            network = _class(self.folder / str(file))()
            network.load_state_dict(read_tensors(self.weights))
        except ArchiveError:
            raise
        except Exception as error:
            why = f"{file} of {self.name} cannot be loaded ({short(error)})"
            raise ArchiveError(f"{why}; give --architecture") from error
        return network.eval()

    def compare(self, export: Path, say: Say) -> None:
        """Compare the export's golden pictures with the answers of the archive's own handler, where that runs here.

        Raise `ArchiveError` where the first label or its probability is another one.
        """
        pictures = json.loads((export / GOLDEN / EXPECTED).read_text(encoding="utf-8"))["pictures"]
        # Its handler does not turn pictures as EXIF says.
        upright = [each for each in pictures if not _turned(export / GOLDEN / each["file"])]
        paths = [str(export / GOLDEN / each["file"]) for each in upright]
        command = [sys.executable, "-c", _OWN, str(self.folder), json.dumps(self.manifest), *paths]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
            answers: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            say(f"  its own handler does not run here ({short(lines[-1])}), so nothing is compared with it")
            return
        for one, answer in zip(upright, answers, strict=True):
            (label, probability), (theirs, value) = one["top"][0], next(iter(answer.items()))
            if label.partition(" (")[0] != theirs.partition(" (")[0] or abs(probability - value) > _APART:
                both = f"with {label!r} ({probability:.3f}) and its own handler with {theirs!r} ({value:.3f})"
                fix = "name its model and preprocessing with --model"
                raise ArchiveError(f"{self.name} answers {one['file']} {both}; {fix}")
        say(f"  its own handler gives the same answers to {len(answers)} golden pictures")


def unpack(mar: Path, folder: Path) -> Foreign:
    """Unpack an archive into the new `folder`; raise `ArchiveError` unless it is of `image_classifier`."""
    folder.mkdir()
    zips.unpack(mar, folder, _RULES)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        model = manifest["model"]
        handler, name = str(model["handler"]), str(model["modelName"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{mar} is no model archive ({MANIFEST}: {short(error)})"
        raise ArchiveError(f"{why}; give its model with --model") from error
    if handler.partition(":")[0] != _HANDLER:
        fix = f"taken are archives of {_HANDLER}: unpack it, and give its model and labels with --model and --labels"
        raise ArchiveError(f"{mar} has the handler {handler!r}; {fix}")
    version, labels = str(model.get("modelVersion", "1.0")), folder / _LABELS
    weights = folder / str(model.get("serializedFile"))
    return Foreign(folder, manifest, name, version, weights, labels if labels.is_file() else None)


def _class(path: Path) -> type[nn.Module]:
    """Return the one class that a model file defines, as TorchServe finds it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ArchiveError(f"the model file {path.name} is no Python module; give --architecture")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    found = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    if len(found) != 1:
        names = ", ".join(each.__name__ for each in found) or "none"
        raise ArchiveError(f"{path.name} defines the classes {names}, expected one; give --architecture")
    return found[0]


def _turned(path: Path) -> bool:
    with Image.open(path) as image:
        return bool(image.getexif().get(0x0112, 1) != 1)
