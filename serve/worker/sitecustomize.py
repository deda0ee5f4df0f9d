"""Hides this repository from TorchServe's workers, so that an archive works by what is in it alone.

They run on the environment into which the repository is installed as editable; without this, code that
was forgotten in an archive would be found here, and only here. Python runs it at start-up because its
folder is on the worker's PYTHONPATH.
"""

import pathlib
import sys

_root = pathlib.Path(__file__).resolve().parents[2]
sys.path[:] = [entry for entry in sys.path if entry not in (str(_root), str(_root / "handlers"))]
