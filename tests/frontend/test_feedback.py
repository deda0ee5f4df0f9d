"""'Wrong? Tell us': a picture that was told wrong arrives with its label, within the bound, for who may tell."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.conftest import RED, picture
from tests.frontend.conftest import Open, Serve, Visit, payload

pytestmark = pytest.mark.browser


@dataclass
class Keeping:
    """A site that keeps pictures: its address, their folder, and the token that they need, or ""."""

    site: str
    folder: Path
    token: str

    def kept(self) -> list[tuple[str, bytes]]:
        """Return model and label of each picture, with its bytes."""
        return [(str(path.parent.relative_to(self.folder)), path.read_bytes()) for path in self.folder.glob("*/*/*")]


@pytest.fixture(scope="module", params=["", "a-token-of-16-or-more"])
def keeping(
    serve: Serve, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Keeping]:
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"": folder, "_MEGABYTES": 1, "_TOKEN": request.param}.items():
            patch.setitem(os.environ, f"BEELINE_FEEDBACK{name}", str(value))
        running = serve("keeping")
    with running:
        yield Keeping(running.state.inference, folder, request.param)


def tell(seen: Visit, name: str, data: bytes, label: str) -> None:
    seen.pick(payload(name, data))
    if seen.page.locator("#grid li").count() > 1:
        seen.card(name).locator(".card").click()
    expect(seen.page.locator("#detail-name")).to_have_text(name)
    seen.page.get_by_label("Wrong? Tell us what it is:").fill(label)
    seen.page.get_by_role("button", name="Tell", exact=True).click()


def test_a_picture_told_wrong_arrives_with_its_label_and_the_bound_holds(visit: Open, keeping: Keeping) -> None:
    seen = visit(site=keeping.site, allowed=["403", "507"])
    told, token = seen.page.locator("#told"), seen.page.locator("#token")
    if keeping.token:
        token.evaluate("(field) => (field.value = 'not the token')")
        tell(seen, "red.png", RED, "blue")
        expect(told).to_contain_text("Not kept: management is for")
        assert keeping.kept() == []
        token.fill(keeping.token)
        seen.page.get_by_role("button", name="Clear all").click()
    else:
        expect(token).to_be_hidden()
    tell(seen, "red.png", RED, "a new label")
    expect(told).to_have_text("Kept as a new label. Thank you.")
    options = seen.page.locator("#labels option").evaluate_all("all => all.map(one => one.value)")
    assert {"red", "green", "blue"} <= {*options}
    # What follows a JPEG's end does not matter to its decoder.
    large = picture((20, 200, 60), kind="JPEG").ljust(990_000, b"\0")
    tell(seen, "green.jpg", large, "blue")
    expect(told).to_have_text("Kept as blue. Thank you.")
    tell(seen, "2.jpg", large + b"\0", "blue")
    expect(told).to_contain_text("Not kept: the folder of such pictures has its 1 MB")
    assert sorted(keeping.kept()) == [("colours/a new label", RED), ("colours/blue", large)]


def test_without_the_option_nobody_is_asked_and_nothing_is_kept(visit: Open) -> None:
    seen = visit()
    seen.pick(payload("red.png", RED))
    seen.expect_answer("red")
    expect(seen.page.locator("#feedback")).to_be_hidden()
    sent = seen.page.request.post(f"{seen.site}/feedback/colours", data=RED, headers={"X-Label": "blue"})
    assert sent.status == 404
