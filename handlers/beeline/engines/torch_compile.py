"""The engine that compiles exported programs on the worker's machine: `torch.compile`, with a cache on disk."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import stat
import sysconfig
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from beeline.engines.torch import TorchEngine
from beeline.errors import ConfigError


class TorchCompileEngine(TorchEngine):
    """As `TorchEngine`, with an exported program compiled by PyTorch.

    The first load on a machine compiles for about a minute (ResNet-18, one core); later loads use the cache. Two graphs
    are compiled at load: one for a single picture, one for every larger batch.
    """

    def _prepare(self) -> None:
        super()._prepare()
        check_compiler(self.environ)
        import torch._inductor.config as settings

        # The number of threads is compiled into the code. PyTorch reads the variable at each compilation.
        name = f"torch-{torch.__version__}-threads-{self.choice['threads'].value}"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder(self.environ, name))
        # A pool of compiling processes, each with a PyTorch of its own, would live as long as the worker.
        settings.compile_threads = 1
        # It warns at each load where CUDA is installed without a device.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

    def _warm_up(self) -> None:
        with warnings.catch_warnings():
            # PyTorch, which compiles now, warns about its own code.
            warnings.simplefilter("ignore")
            super()._warm_up()

    def _load(self, path: Path) -> Any:
        # The whole graph or an error: a graph that runs partly in Python would be slower than the uncompiled one.
        return torch.compile(super()._load(path), dynamic=True, fullgraph=True)


def check_compiler(environ: Mapping[str, str]) -> None:
    """Check that PyTorch can compile here, and raise `ConfigError` with what to install."""
    compiler = environ.get("CXX") or "g++"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if shutil.which(compiler, path=environ.get("PATH", "")) is None:
        lack = f"a C++ compiler, and there is no {compiler} on the PATH: install g++ (Debian: apt-get install g++)"
    elif importlib.util.find_spec("setuptools") is None:
        lack = "the package setuptools, which is not installed here: install it"
    elif not headers.is_file():
        lack = f"Python's headers, and there is no {headers}: install python3-dev"
    else:
        return
    raise ConfigError(f"the engine torch_compile needs {lack}, or build the archive with --engine torch")


def cache_folder(environ: Mapping[str, str], name: str) -> Path:
    """Return the folder `name` for compiled code in a folder that only this user can write to; make what is missing.

    `BEELINE_COMPILE_CACHE` names the outer folder; else it is the user's own in the system's temporary folder.

    Raises:
        ConfigError: when another user owns it or others may write to it, since code is loaded from it.
    """
    fix = "name a folder of your own with mode 0700 by BEELINE_COMPILE_CACHE"
    given = environ.get("BEELINE_COMPILE_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"beeline-compile-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, parents=bool(given), exist_ok=True)
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode):
            wrong = "is a link or a file"
        elif about.st_uid != os.geteuid():
            wrong = f"belongs to the user {about.st_uid}, and this worker is {os.geteuid()}"
        elif about.st_mode & 0o022:
            wrong = f"may be written to by others (its mode is {stat.S_IMODE(about.st_mode):o})"
        else:
            (folder / name).mkdir(mode=0o700, exist_ok=True)
            return folder.resolve() / name
    except OSError as error:
        raise ConfigError(f"the compiler's cache {folder} cannot be made ({error.strerror}); {fix}") from error
    raise ConfigError(f"the compiler's cache {folder} {wrong}, and code is loaded from it: {fix}")
