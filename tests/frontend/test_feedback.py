"""'Wrong? Tell us': a picture that was told wrong arrives with its label, within the bound, for who may tell."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.conftest import RED, picture
from tests.frontend.conftest import Open, Serve, Visit, payload

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module", params=["", "a-token-of-16-or-more"])
def keeping(serve: Serve, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A site that keeps at most a megabyte of pictures: its address, the token that they need, their folder."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"": folder, "_MEGABYTES": 1, "_TOKEN": request.param}.items():
            patch.setitem(os.environ, f"BEELINE_FEEDBACK{name}", str(value))
        running = serve("keeping")
    with running:
        yield running.state.inference, request.param, folder


def tell(seen: Visit, name: str, data: bytes, label: str, answer: str) -> None:
    """Choose a picture, tell its label, and wait for what the page says then."""
    seen.pick(payload(name, data))
    expect(seen.page.locator("#detail-name")).to_have_text(name)
    seen.page.get_by_label("Wrong? Tell us what it is:").fill(label)
    seen.page.get_by_role("button", name="Tell", exact=True).click()
    expect(seen.page.locator("#told")).to_contain_text(answer)


def test_a_picture_told_wrong_arrives_with_its_label_and_the_bound_holds(
    visit: Open, keeping: tuple[str, str, Path]
) -> None:
    site, secret, folder = keeping
    seen = visit(site=site, allowed=["403", "507"])
    token = seen.page.locator("#token")
    if secret:
        token.evaluate("(field) => (field.value = 'not the token')")
        tell(seen, "red.png", RED, "blue", "Not kept: management is for")
        assert not list(folder.iterdir())
        token.fill(secret)
    tell(seen, "red.png", RED, "a new label", "Kept as a new label. Thank you.")
    expect(token).to_be_visible(visible=bool(secret))
    assert {"red", "green", "blue"} <= {
        *seen.page.locator("#labels option").evaluate_all("all => all.map(a => a.value)")
    }
    large = picture((20, 200, 60), kind="JPEG").ljust(990_000, b"\0")
    tell(seen, "green.jpg", large, "blue", "Kept as blue. Thank you.")
    tell(seen, "2.jpg", large + b"\0", "blue", "Not kept: the folder of such pictures has its 1 MB")
    kept = {path.parent.name: path.read_bytes() for path in folder.glob("colours/*/*")}
    assert kept == {"a new label": RED, "blue": large}


def test_without_the_option_nobody_is_asked(visit: Open) -> None:
    seen = visit()
    seen.pick(payload("red.png", RED))
    seen.expect_answer("red")
    expect(seen.page.locator("#feedback")).to_be_hidden()
