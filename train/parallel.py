"""A fit of several processes: the first one leads, and the others only take part in its epochs.

torchrun starts them, on one machine or on several. The leader alone reads pictures and weights, solves for the head and
writes the run; before the epochs it gives the others what they need.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from host.machine import cores
from train.errors import RunError

# Followers wait while the leader reads and downloads. A process that dies is noticed at once, by its connection.
_PATIENCE = timedelta(days=1)


def size() -> int:
    """Return how many processes train together; 1 before `join`."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them; 0 is the leader."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def local(variable: str = "LOCAL_WORLD_SIZE") -> int:
    """Return how many of them are on this machine; with `GROUP_WORLD_SIZE`, how many machines there are."""
    return int(os.environ[variable]) if distributed.is_initialized() else 1


def launch(processes: int) -> int:
    """Run this command in so many processes on this machine; return the exit code. The leader says what fails."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Otherwise torchrun takes one thread each, and says so at length.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    try:
        main(["--standalone", f"--nproc-per-node={processes}", "-m", "cli", *sys.argv[1:]])
    except ChildFailedError as error:
        # That of a killed process is negative.
        code = int(error.get_first_failure()[1].exitcode)
        return code if code > 0 else RunError.exit_code
    except SignalException:
        return RunError.exit_code
    return 0


def join() -> None:
    """Meet the other processes that torchrun has started."""
    both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(both, timeout=_PATIENCE)


def gather(value: Any) -> list[Any]:
    """Return the value of every process, the leader's first."""
    values = [value] * size()
    if size() > 1:
        distributed.all_gather_object(values, value)
    return values
