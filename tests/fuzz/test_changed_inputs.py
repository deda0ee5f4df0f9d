"""Changed files of every kind that comes from outside: each is read, or refused by a named error, in bounded time.

`BEELINE_FUZZ` is the number of seconds for all of them, 60 by default; `make fuzz` takes an hour.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archive import mar
from beeline import payload, pixels
from beeline.errors import ArchiveError, ConfigError, RequestError, SpecError
from beeline.settings import Limits
from beeline.spec import Geometry, ModelSpec
from serve import properties
from tests.conftest import ROOT
from tests.handlers.test_payload import B64_JSON, DATA, FILE, form

pytestmark = pytest.mark.shared
# Of one case: seconds, and bytes of memory in addition to what the process has.
LONGEST, LARGEST = 10, 2 << 30
Target = tuple[list[bytes], Callable[[bytes], object], type[Exception]]
TARGETS = ("payload", "pixels", "spec", "mar", "properties")


@pytest.fixture
def target(
    request: pytest.FixtureRequest, shared_data: Path, colour_model: Path, colour_archive: Path, tmp_path: Path
) -> Target:
    """The seeds of a target, the call, and the only error that it may raise."""

    def written(data: bytes) -> Path:
        (tmp_path / "file").write_bytes(data)
        return tmp_path / "file"

    pictures = [path.read_bytes() for path in sorted((shared_data / "awkward").rglob("*.*"))]
    forms = [form((FILE, DATA)), form(('name="data"', B64_JSON)), B64_JSON, DATA]
    configuration = [(ROOT / "config" / "config.properties").read_bytes()]
    spec = [(colour_model / "model_spec.json").read_bytes()]
    targets: dict[str, Target] = {
        "payload": (forms, lambda data: payload.extract({"body": data}, Limits(100_000)), RequestError),
        "pixels": (pictures, lambda data: pixels.decode(data, Geometry(36, 32), max_pixels=1_000_000), RequestError),
        "spec": (spec, lambda data: ModelSpec.load(written(data)), SpecError),
        "mar": ([colour_archive.read_bytes()], lambda data: mar.check(written(data)), ArchiveError),
        "properties": (configuration, lambda data: properties.load(written(data)), ConfigError),
    }
    return targets[request.param]


@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_a_changed_file_is_read_or_refused_by_name(target: Target) -> None:
    seeds, call, error = target
    end, cases = time.monotonic() + float(os.environ.get("BEELINE_FUZZ", "60")) / len(TARGETS), 0

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 64), st.binary(max_size=64))))
    def one(data: bytes, changes: list[tuple[float, int, bytes]]) -> None:
        nonlocal cases
        for place, length, new in changes:
            at = int(place * len(data))
            data = data[:at] + new + data[at + length :]
        cases += 1
        # A case that takes longer ends all tests, with a traceback of where it is.
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        try:
            call(data)
        except error as refusal:
            assert str(refusal)
        finally:
            faulthandler.cancel_dump_traceback_later()

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + LARGEST, before[1]))
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.callback(resource.setrlimit, resource.RLIMIT_AS, before)
        while time.monotonic() < end:
            one()
    print(f"{cases} cases")  # noqa: T201
