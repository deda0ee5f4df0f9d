"""A captioning model on the page: the caption under its picture, its time, and what it begins with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from archive import caption
from tests.caption_models import drawn, model_folder
from tests.captions import checkpoint
from tests.conftest import pack
from tests.frontend.conftest import Open, Serve, payload, row

pytestmark = pytest.mark.browser
PICTURES = drawn(3)


@pytest.fixture(scope="module")
def captions(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("captions")
    model_folder(caption.load(str(checkpoint(folder / "blip"))), folder / "export", "openvino", 3)
    with serve("captions", archives=[pack(folder / "export", folder / "blip.mar")]) as running:
        yield running.state.inference


def test_a_caption_stands_under_its_picture_and_begins_as_asked(visit: Open, captions: str, tmp_path: Path) -> None:
    seen = visit(site=captions)
    page = seen.page
    expect(page.locator("#known")).to_have_text("blip writes captions.")
    expect(row(page, "captions")).to_have_text("beam search with 3, at most 12 tokens")
    expect(page.locator("#threshold")).to_have_text("")
    seen.pick(payload("plain.png", PICTURES[2]))
    expect(page.locator("#detail")).to_have_attribute("data-state", "answered")
    page.get_by_label("Captions begin with").fill("a photo of")
    seen.pick(payload("begun.png", PICTURES[2]))
    expect(page.locator("#detail-name")).to_have_text("begun.png")
    expect(page.locator("#detail-label")).to_have_text(re.compile("^a photo of"))
    seen.wait_done(2)
    expect(seen.card("begun.png").locator(".label")).to_have_text(page.locator("#detail-label").inner_text())
    expect(page.locator("#detail-verdict")).to_have_text(re.compile(r"^[\d.]+ %$"))
    expect(page.locator("#detail-spans")).to_be_visible()
    page.screenshot(path=Path(os.environ.get("BEELINE_SCREENSHOTS") or tmp_path) / "caption.png", full_page=True)
