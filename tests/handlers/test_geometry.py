"""While `GEOMETRY` stays, the pixels stay, and the code that makes them."""

from __future__ import annotations

import json

from beeline.formats import FORMATS
from tests import digests
from tests.conftest import ROOT
from tests.digests import tree_digest
from tests.handlers import drawn


def test_drawn_pictures_decode_to_the_recorded_pixels() -> None:
    recorded = json.loads(digests.RECORD.read_text())["pictures"]
    arrays = drawn.decoded()
    if digests.reader() != recorded["reader"]:
        drawn.check_close(arrays)
        return
    assert {
        "number": digests.pixels.GEOMETRY,
        "arrays": drawn.digest(arrays),
        "reader": digests.reader(),
    } == recorded, (
        f"pictures decode to other pixels than GEOMETRY {recorded['number']} was recorded for: raise GEOMETRY in "
        f"handlers/beeline/pixels.py, then run `{digests.RENEW}`"
    )


def test_the_pixels_are_recorded_for_the_locked_pillow() -> None:
    version = json.loads(digests.RECORD.read_text())["pictures"]["reader"].split()[1]
    assert f"\npillow=={version} " in (ROOT / "requirements" / "main.txt").read_text(), f"run `{digests.RENEW}`"


def test_the_stored_arrays_are_the_recorded_ones_and_cover_every_format_and_orientation() -> None:
    stored = drawn.stored()
    assert drawn.digest(stored) == json.loads(digests.RECORD.read_text())["pictures"]["arrays"]
    assert {name.split()[0] for name in stored} == set(FORMATS)
    for kind in drawn.TURNED:
        assert len({stored[f"{kind} turned {turn}"].tobytes() for turn in range(1, 9)}) == 8, kind


def test_the_code_is_the_recorded_one() -> None:
    digests.check("GEOMETRY")


CODE = """
def read(data):
    text: str
    found = data[:3]
    return found
"""
SAME = '''"""A docstring."""

# A comment.
def read(data: bytes) -> bytes:  # one more
    """Return the first bytes."""
    text: bytes
    found: bytes = data[:3]
    return found
'''


def test_a_comment_a_docstring_and_an_annotation_change_no_digest_and_code_does() -> None:
    assert tree_digest([CODE]) == tree_digest([SAME])
    assert tree_digest([CODE]) != tree_digest([CODE.replace("3", "4")])
    assert tree_digest([CODE]) != tree_digest([CODE.replace("return found", "return found, 1")])
    # The same in every Python that the project runs on.
    assert tree_digest([CODE]) == "c757be046ba0a0008a9cf447036bf00554d04a70af744f93e0e35393b9268873"
