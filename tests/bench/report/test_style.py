"""Colours that can be told from the ground in both themes, by the formula of the accessibility guidelines."""

from __future__ import annotations

import pytest

from bench.report.style import DARK, LIGHT


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_series_have_enough_contrast(theme: dict[str, str]) -> None:
    for ground in ("ground", "panel"):
        for name in ("ink", "dim", "bad", "limit"):
            assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
        for name in ("s0", "s1", "s2", "s3", "s4", "s5", "ref", "good"):
            assert contrast(theme[name], theme[ground]) >= 3, (name, ground)
    assert contrast(theme["ink"], theme["mark"]) >= 4.5


def test_both_themes_have_the_same_names() -> None:
    assert set(LIGHT) == set(DARK)
