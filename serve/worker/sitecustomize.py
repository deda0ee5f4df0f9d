"""Hides this repository from TorchServe's workers, so that an archive works with its own files alone.

Their environment has the repository installed as editable. Without this, a worker would find code that an archive lacks
here, and only here. Python runs this file at start-up, since its folder is on the worker's PYTHONPATH.
"""

import pathlib
import sys

_root = pathlib.Path(__file__).resolve().parents[2]
sys.path[:] = [entry for entry in sys.path if entry not in (str(_root), str(_root / "handlers"))]
