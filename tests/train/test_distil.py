"""A teacher is a fair one, its answers reach the student, and nothing changes without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beeline.errors import ConfigError
from host import silent
from host.files import write_json
from train.distil import Teacher, find_teacher, shrunk
from train.fit import fit
from train.plan import Plan, plan
from train.runs import Run, open_run

WORDS = ["model.name=squeezenet1_1", "model.resize=54", "model.crop=48", "fit.epochs=1", "fit.batch=6"]


@pytest.fixture(scope="module")
def student(tiny_run: Run, environ: dict[str, str]) -> Plan:
    return plan([*WORDS, f"fit.distil={tiny_run.folder}"], silent, environ=environ)


def test_a_student_of_a_smaller_input_learns_from_a_run_and_names_it(student: Plan, tmp_path: Path) -> None:
    run = fit(student, silent, tmp_path)
    teacher = student.teacher
    assert teacher is not None
    assert run.record["teacher"] == {
        "run": teacher.id,
        "fingerprint": teacher.fingerprint,
        "accuracy": teacher.accuracy,
    }
    alone = fit(replace(student, config=replace(student.config, fit=replace(student.config.fit, distil=None)),
                        teacher=None), silent, tmp_path)  # fmt: skip
    weights = [torch.load(each.checkpoint, weights_only=True) for each in (run, alone)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_fingerprint_is_that_of_before_without_a_teacher_and_another_with_each(
    student: Plan, environ: dict[str, str]
) -> None:
    alone = plan(WORDS, silent, environ=environ)
    assert student.teacher is not None
    assert alone.fingerprint != student.fingerprint
    assert replace(student, teacher=None).fingerprint == alone.fingerprint
    other = Run(student.teacher.folder, {**student.teacher.record, "fingerprint": "0"})
    assert replace(student, teacher=other).fingerprint != student.fingerprint


def test_the_loss_is_half_of_the_labels_where_the_student_answers_as_its_teacher(tiny_run: Run) -> None:
    teacher = Teacher(tiny_run, "cpu")
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    from train.model import normalised

    model = tiny_run.config().model
    with torch.no_grad():
        logits = teacher._network(normalised(pictures, model.mean, model.std))
    assert float(teacher.loss(pictures, logits, torch.tensor(2.0))) == pytest.approx(1.0, abs=1e-5)
    assert float(teacher.loss(pictures, logits.flip(1) + torch.tensor([3.0, 0.0]), torch.tensor(2.0))) > 1.01


def test_pictures_are_shrunk_as_pillow_does_and_left_alone_at_their_own_size() -> None:
    from PIL import Image

    picture = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert shrunk(picture, (64, 64)) is picture
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy()).resize((48, 48), Image.Resampling.BILINEAR)
    expected = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(48, 48, 3).permute(2, 0, 1)
    assert (shrunk(picture, (48, 48))[0] - expected).abs().max() < 2


def test_an_unfair_teacher_is_refused(student: Plan, tiny_run: Run, tmp_path: Path) -> None:
    fit_config, data = student.config.fit, student.data
    swapped = replace(data, train=data.val, val=data.train)
    with pytest.raises(ConfigError, match="which was trained on 16 of the 16 validation pictures"):
        find_teacher(fit_config, swapped, silent)
    with pytest.raises(ConfigError, match=r"but fit\.epochs is 0"):
        find_teacher(replace(fit_config, epochs=0), data, silent)
    # What the student learns from itself is no advantage of the teacher.
    assert find_teacher(fit_config, replace(data, val=data.train), silent) == tiny_run
    write_json(tmp_path / "run.json", {**tiny_run.record, "labels": ["cat", "dog"]})
    assert open_run(tmp_path).labels == ("cat", "dog")
    with pytest.raises(ConfigError, match=r"whose labels differ \(cat, dog\); train a teacher on these pictures"):
        find_teacher(replace(fit_config, distil=str(tmp_path)), data, silent)
