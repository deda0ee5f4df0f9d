"""Two models and two versions of one, served at once: which of them answers, and the card of each."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import expect

from archive.inspect import card as inspected
from beeline.spec import Accuracy, ModelSpec, Provenance
from tests.conftest import GREEN, LABELS, RED, pack, write_checksums
from tests.frontend.conftest import Open, Serve, Visit, payload, row
from tests.serve.conftest import wait_for

pytestmark = pytest.mark.browser
FRENCH, GERMAN = ("rouge", "vert", "bleu"), ("rot", "gruen", "blau")
MEASURED = {
    "accuracy": Accuracy(0.948, 153, "drawn colours"),
    "provenance": Provenance(data="drawn colours", weights="random", licence="CC0-1.0"),
}


def renamed(source: Path, folder: Path, labels: tuple[str, ...], **changes: Any) -> Path:
    """Return an archive of the colour model with other labels, also in its golden pictures."""
    shutil.copytree(source, folder)
    spec = dataclasses.replace(ModelSpec.load(folder), labels=labels, **changes)
    spec.save(folder / "model_spec.json")
    expected = folder / "golden" / "expected.json"
    words = dict(zip(LABELS, labels, strict=True))
    values = json.loads(expected.read_text())
    for one in values["pictures"]:
        one["top"] = [[words[label], score] for label, score in one["top"]]
    expected.write_text(json.dumps(values))
    write_checksums(folder, spec)
    return pack(folder, folder.with_name(f"{spec.name}-{spec.version}.mar"))


@pytest.fixture(scope="module")
def archives(colour_model: Path, colour_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Archives by name and version; the second has its accuracy and origin."""
    folder = tmp_path_factory.mktemp("others")
    return {
        "colours/1.0": colour_archive,
        "colours/2.0": renamed(colour_model, folder / "french", FRENCH, version="2.0", **MEASURED),
        "farben/1.0": renamed(colour_model, folder / "german", GERMAN, name="farben", not_sure_under=0.2),
    }


@pytest.fixture(scope="module")
def several(serve: Serve, archives: dict[str, Path]) -> Iterator[str]:
    """The address of a site that serves all three."""
    with serve("several", archives=list(archives.values())) as running:
        yield running.state.inference


def ask(seen: Visit, model: str, name: str, data: bytes, label: str) -> None:
    """Choose a model on the page, and check that this model answers."""
    seen.page.get_by_role("combobox", name="Model", exact=True).select_option(model)
    seen.pick(payload(name, data))
    expect(seen.page.locator("#detail-name")).to_have_text(name)
    seen.expect_answer(label)
    expect(seen.page.locator("#detail-note")).to_have_text(f"answered by {model.replace('/', ' ')}")


def test_the_chosen_one_answers(visit: Open, several: str) -> None:
    seen = visit(site=several)
    page = seen.page
    listed = page.get_by_role("combobox", name="Model", exact=True).locator("option").all_inner_texts()
    assert sorted(listed) == ["colours 1.0", "colours 2.0", "farben 1.0"]
    for model, data, label in (
        ("colours/2.0", RED, "rouge"),
        ("farben/1.0", RED, "rot"),
        ("colours/1.0", GREEN, "green"),
        ("colours/2.0", GREEN, "vert"),
    ):
        ask(seen, model, f"{label}.png", data, label)
        # An answer says which model gave it, and the code asks the same one.
        answer = page.request.post(page.locator("#snippet").inner_text().split()[2], data=data)
        assert next(iter(answer.json())) == label
    # Earlier pictures keep their answers.
    expect(seen.card("rot.png").locator(".label")).to_have_text("rot")


def test_the_choice_is_kept_in_the_address(visit: Open, several: str) -> None:
    seen = visit(site=several)
    page, choice = seen.page, seen.page.get_by_role("combobox", name="Model", exact=True)
    first = choice.input_value()
    choice.select_option("farben/1.0")
    assert page.url.endswith("#model=farben/1.0")
    page.reload()
    expect(choice).to_have_value("farben/1.0")
    expect(row(page, "name")).to_have_text("farben")
    seen.pick(payload("1.png", RED))
    seen.expect_answer("rot")
    page.goto(several)
    expect(choice).to_have_value(first)
    # A link to a model, and back: an address without a name means the default.
    page.evaluate("location.hash = '#model=colours/2.0'")
    expect(row(page, "version")).to_have_text("2.0")
    page.go_back()
    expect(choice).to_have_value(first)
    expect(row(page, "version")).to_have_text(first.rpartition("/")[2])
    page.go_forward()
    expect(choice).to_have_value("colours/2.0")


def test_each_model_has_its_own_score_of_a_guess(visit: Open, several: str) -> None:
    seen = visit(site=several)
    page, choice = seen.page, seen.page.get_by_role("combobox", name="Model", exact=True)
    # Two equally strong colours, each with about half of the score.
    either = io.BytesIO()
    Image.new("RGB", (64, 64), (150, 150, 10)).save(either, "PNG")
    for model, label, sentence in (
        (
            "farben/1.0",
            "^(rot|gruen)$",
            "Under 20 % the best label is only a guess, as validation pictures showed, and",
        ),
        ("colours/1.0", "^perhaps (red|green)$", "Under 60 % the best label is only a guess, and is called"),
    ):
        choice.select_option(model)
        expect(page.locator("#threshold")).to_contain_text(sentence)
        seen.pick(payload(f"{model[:3]}.png", either.getvalue()))
        expect(page.locator("#detail-label")).to_have_text(re.compile(label))
    expect(seen.card("far.png").locator(".label")).to_have_text(re.compile("^(rot|gruen)$"))


@pytest.mark.parametrize("model", ["colours/2.0", "farben/1.0"])
def test_the_card_is_what_inspect_says(visit: Open, several: str, archives: dict[str, Path], model: str) -> None:
    seen = visit(ready=False, site=several)
    page = seen.page

    def read() -> dict[str, Any]:
        return dict(page.request.get(f"{several}/catalog/{model}.json").json())

    # A worker adds its choices a while after the start.
    card = wait_for(read, lambda card: "serving" in card)
    serving = card.pop("serving")
    assert card == {key: value for key, value in inspected(archives[model]).to_dict().items() if key != "archive"}
    page.goto(f"{several}/#model={model}")
    spec = card["spec"]
    device, precision = serving["device"], serving["precision"]
    assert precision["reason"]
    assert device["reason"]
    for name, text in {
        "name": spec["name"],
        "version": spec["version"],
        "engine": f"{spec['engine']} on {device['value']}: {device['reason']}",
        "precision": f"{spec['precision']}: {precision['reason']}",
        "labels": f"3: {', '.join(spec['labels'])}",
        "accuracy": "94.8 % top-1 on 153 pictures (drawn colours)" if spec["accuracy"] else "not measured",
        "licence": spec["provenance"]["licence"],
    }.items():
        expect(row(page, name)).to_have_text(text)
    fingerprint = row(page, "fingerprint").locator("code")
    expect(fingerprint).to_have_text(card["fingerprint"][:12])
    expect(fingerprint).to_have_attribute("title", card["fingerprint"])
    page.get_by_role("button", name="Copy the whole fingerprint").click()
    expect(page.locator("#announcer")).to_have_text("Fingerprint copied")
    assert page.evaluate("navigator.clipboard.readText()") == card["fingerprint"]


def test_generated_pictures_are_a_warning_and_what_is_strange_in_a_card_stays_text(visit: Open) -> None:
    seen = visit(ready=False)
    page, strange = seen.page, "<img src=x onerror=alert(1)>"
    # A fake of the card of a model that was trained on generated pictures.
    card = {
        "bytes": 44_900_000,
        "fingerprint": "0123456789abcdef" * 4,
        "spec": {
            "labels": ["ants", "bees"],
            "engine": "torch",
            "precision": "fp32",
            "model": {"architecture": "resnet18"},
            "provenance": {"data": strange, "weights": "random", "licence": "MIT", "generated": True},
        },
    }
    page.route("**/catalog/*/*.json", lambda route: route.fulfill(json=card))
    seen.open()
    texts = {"architecture": "resnet18", "data": strange, "weights": "random", "size": "44.9 MB"}
    for name, text in texts.items():
        expect(row(page, name)).to_have_text(text)
    expect(page.locator("#generated")).to_contain_text(f"generated pictures ({strange}), not on photographs")
    expect(page.locator("#choice")).to_be_hidden()


def test_of_thirty_models_a_filter_finds_one_and_what_is_not_served_is_named(visit: Open) -> None:
    seen = visit(ready=False)
    page = seen.page
    # A fake of thirty models: the catalog names the one that is served under thirty names.
    catalog = page.request.get(f"{seen.site}/catalog.json").json()
    (model,) = catalog["models"]
    names = ["colours", *(f"net{number}" for number in range(29))]
    catalog["models"] = [{**model, "name": name, "version": f"{len(name)}.0"} for name in names]
    page.route("**/catalog.json", lambda route: route.fulfill(json=catalog))
    failed = {"net3/4.0": "it needs a package"}
    healthy = {"status": "Healthy", "models": {"colours": {"7.0": {"workers": 1, "ready": 1}}}, "failed": failed}
    page.route("**/ping", lambda route: route.fulfill(json=healthy))
    seen.open()
    choice, options = page.get_by_role("combobox", name="Model", exact=True), page.locator("#models option")
    expect(options).to_have_count(30)
    expect(page.get_by_role("status")).to_have_text("Ready, 1 worker; not served: net3 4.0")
    page.get_by_role("searchbox", name="Filter models").fill("Net1 5.0")
    expect(options).to_have_text(["colours 7.0", *(f"net{number} 5.0" for number in range(10, 20))])
    choice.select_option("net17/5.0")
    expect(row(page, "name")).to_have_text("net17")
    seen.pick(payload("1.png", RED))
    seen.expect_answer("red")
    page.get_by_role("searchbox").fill("net3")
    expect(options).to_have_text(["net3 4.0 (not served)", "net17 5.0"])
    expect(options.first).to_be_disabled()
    assert options.first.get_attribute("title") == "it needs a package"
    assert choice.input_value() == "net17/5.0"


def test_few_models_have_no_filter(visit: Open, several: str) -> None:
    seen = visit(site=several)
    expect(seen.page.locator("#models")).to_be_visible()
    expect(seen.page.get_by_role("searchbox")).to_be_hidden()
