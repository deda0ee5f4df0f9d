"""What the page says of a model that knows all of itself, and of strange ones; their cards are fakes."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.frontend.conftest import Open, row

pytestmark = pytest.mark.browser
FINGERPRINT = "0123456789abcdef" * 4


def fake_card(page: Page, **provenance: object) -> None:
    """Fake the card of a model that was fitted, measured and chosen for; the colour model knows little of itself."""
    card = {
        "bytes": 44_900_000,
        "fingerprint": FINGERPRINT,
        "spec": {
            "labels": ["ants", "bees"],
            "engine": "torch",
            "precision": "fp32",
            "model": {"architecture": "resnet18"},
            "accuracy": {"top1": 0.948, "pictures": 153, "data": "hymenoptera_data"},
            "provenance": {"data": "drawn shapes", "weights": "random", "licence": "MIT", **provenance},
        },
        "serving": {
            "device": {"value": "cpu", "reason": "no accelerator was found"},
            "precision": {"value": "fp32", "reason": "the archive asks for it"},
        },
    }
    page.route("**/catalog/*/*.json", lambda route: route.fulfill(json=card))


def test_the_served_model(visit: Open) -> None:
    seen = visit()
    page = seen.page
    model = page.request.get(f"{seen.site}/catalog.json").json()["models"][0]
    card = page.request.get(seen.site + model["card"]).json()
    expect(row(page, "name")).to_have_text(model["name"])
    expect(row(page, "version")).to_have_text(card["spec"]["version"])
    expect(row(page, "accuracy")).to_have_text("not measured")
    expect(row(page, "served by")).to_contain_text("behind")
    expect(page.locator("#choice")).to_be_hidden()
    expect(page.locator("#generated")).to_be_hidden()


def test_a_whole_card(visit: Open) -> None:
    seen = visit(ready=False)
    page = seen.page
    fake_card(page)
    seen.open()
    for name, text in {
        "architecture": "resnet18",
        "engine": "torch on cpu: no accelerator was found",
        "precision": "fp32: the archive asks for it",
        "accuracy": "94.8 % top-1 on 153 pictures (hymenoptera_data)",
        "labels": "2: ants, bees",
        "data": "drawn shapes",
        "weights": "random",
        "licence": "MIT",
        "size": "44.9 MB",
    }.items():
        expect(row(page, name)).to_have_text(text)
    expect(row(page, "fingerprint").locator("code")).to_have_text(FINGERPRINT[:12])
    expect(row(page, "fingerprint").locator("code")).to_have_attribute("title", FINGERPRINT)
    page.get_by_role("button", name="Copy the whole fingerprint").click()
    expect(page.locator("#announcer")).to_have_text("Fingerprint copied")
    assert page.evaluate("navigator.clipboard.readText()") == FINGERPRINT


def test_generated_pictures_are_a_warning(visit: Open) -> None:
    seen = visit(ready=False)
    fake_card(seen.page, generated=True)
    seen.open()
    expect(seen.page.locator("#generated")).to_contain_text("generated pictures (drawn shapes), not on photographs")


def test_what_is_strange_in_a_card_stays_text(visit: Open) -> None:
    seen = visit(ready=False)
    fake_card(seen.page, data="<img src=x onerror=alert(1)>")
    seen.open()
    expect(row(seen.page, "data")).to_have_text("<img src=x onerror=alert(1)>")
