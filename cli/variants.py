"""Engine and precision of an archive that is built: the ones asked for, or the fastest that passes the gate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from beeline.errors import ConfigError, did_you_mean

# What runs in the images as they are; a compiler for `torch_compile` is not there.
IN_IMAGES = ("torch", "openvino")


def prepared(
    export: Path,
    scratch: Path,
    asked: tuple[str, str | None],
    pictures: tuple[Path | None, Path | None],
    gate: tuple[float, float],
    decoding: str = "full",
) -> tuple[Path, dict[str, float | str] | None]:
    """Return the folder to build of, and for `auto` what each variant took or why it was refused.

    Args:
        export: of the fp32 model for PyTorch.
        scratch: a folder for variants.
        asked: engine and precision, each perhaps `auto`.
        pictures: to judge by, and to calibrate with.
        gate: the part of equal first labels, and how far probabilities may move on 99 of 100 pictures.
        decoding: `full`, `scaled` for JPEGs at a part of their size, or `cuda` for JPEGs on the model's device.

    Raises:
        ConfigError: for what is not known, or without pictures.
        ArchiveError: when the gate refuses it.
    """
    from archive import variants
    from archive.variants import agreement, to_torch
    from beeline.engines import ON_CPUS
    from beeline.spec import DECODINGS, ModelSpec
    from cli.console import say

    engine, precision = asked
    known = variants.known()
    for word, option, names in (
        (engine, "--engine", {each.engine for each in known}),
        (precision, "--precision", {each.precision for each in known}),
    ):
        if word not in (None, "auto", *names):
            raise ConfigError(f"{option} is {word!r}{did_you_mean(str(word), ('auto', *sorted(names)))}")
    wanted = [
        each
        for each in known
        if engine in ("auto", each.engine)
        and (precision or ("auto" if engine == "auto" else "fp32")) in ("auto", each.precision)
    ]
    if decoding == "cuda" and engine in ON_CPUS:
        raise ConfigError(f"--decoding is 'cuda', and {engine} runs on CPUs; take full or scaled, or --engine torch")
    if not wanted:
        both = ", ".join(map(str, known))
        raise ConfigError(f"there is no {engine} {precision} here; allowed: {both}")
    spec = ModelSpec.load(export)
    if decoding not in DECODINGS:
        raise ConfigError(f"--decoding is {decoding!r}{did_you_mean(decoding, DECODINGS)}")
    geometry = dataclasses.replace(spec.geometry, decoding=decoding)
    if wanted == [variants.REFERENCE] and geometry == spec.geometry:
        if pictures != (None, None):
            raise ConfigError(
                "--pictures and --calibration are for a fast variant, and this is the fp32 reference: add --engine, "
                "--precision or --decoding, or leave them out"
            )
        return export, None
    judged, calibration = pictures
    if judged is None:
        raise ConfigError("a variant is judged by pictures; name a folder of photographs with --pictures")
    # A lone one that cannot be made here says so itself.
    tried = [each for each in wanted if len(wanted) == 1 or variants.left_out(each, decoding) is None]
    calibrates = any(each.precision == "int8" for each in tried)
    if calibration is not None and all(each.precision != "int8" for each in wanted):
        raise ConfigError(
            f"--calibration is {calibration}, and only int8 is calibrated; leave it out: --pictures judge, or add "
            "--precision int8"
        )
    read = agreement.read(judged, calibration, geometry, calibrates)
    photometry = to_torch.photometry(export, spec)
    allowed = agreement.Gate(*gate)
    if len(wanted) == 1:
        folder = scratch / "variant"
        folder.mkdir()
        say(f"making {wanted[0]} and comparing it with fp32 on {len(read.judged)} pictures ...")
        variants.make(export, folder, wanted[0], read, allowed, photometry)
        return folder, None
    say(f"trying {len(wanted)} variants on {len(read.judged)} pictures ...")
    folder, results = variants.fastest(export, scratch, read, allowed, photometry, wanted, say)
    return folder, {
        str(each.wanted): each.refused or "" if each.milliseconds is None else each.milliseconds for each in results
    }


def needed(engine: str) -> str | None:
    """Return what an engine needs to be installed where it serves; None for those that the images bring."""
    from beeline.engines import runtime

    if engine in IN_IMAGES:
        return None
    lacking = "a C++ compiler" if engine == "torch_compile" else runtime(engine)
    return f"{engine} needs {lacking} where it serves, which the images have not; for them take --engine openvino"
