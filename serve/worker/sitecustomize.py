"""Python runs this file at the start of each process of a server that runs from this environment.

It hides this repository, so that an archive works with its own files alone: their environment has the repository
installed as editable, and a worker would find code that an archive lacks here, and only here. It also keeps PyTorch out
of workers whose archives do not import it: they are ready 2 s earlier, and each takes 0.5 GB less.
"""

import importlib
import pathlib
import sys
import types
from typing import Any


class Torch(types.ModuleType):
    """The `torch` of TorchServe's protocol, which asks of an answer only whether it is a tensor, and then saves it.

    No answer is a tensor if nobody has imported PyTorch. Every other `import torch` in the process is the real one.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "Tensor" and "torch" not in sys.modules:
            return ()  # What `isinstance` takes for no class at all.
        return getattr(importlib.import_module("torch"), name)


_folder = pathlib.Path(__file__).resolve().parent
_hidden = {str(path) for path in (_folder, _folder.parents[1], _folder.parents[1] / "handlers")}
sys.path[:] = [entry for entry in sys.path if entry not in _hidden]

if any(word.endswith("model_service_worker.py") for word in sys.orig_argv):
    sys.modules["torch"] = Torch("torch")
    try:
        importlib.import_module("ts.protocol.otf_message_handler")
    finally:
        del sys.modules["torch"]

# Python runs only the first `sitecustomize` on its path, so this one runs the next.
_own = sys.modules.pop("sitecustomize")
try:
    importlib.import_module("sitecustomize")
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":
        raise
finally:
    sys.modules.setdefault("sitecustomize", _own)
