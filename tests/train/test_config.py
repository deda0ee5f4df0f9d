"""The training configuration: files, environment, overrides, and a sentence for every mistake."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from beeline.errors import ConfigError
from train.config import FOLDER, compose, load


def test_the_files_alone_are_a_whole_configuration() -> None:
    config = compose(environ={})
    assert (config.model.name, config.seed, config.fit.recipe) == ("resnet18", 0, "finetune")
    assert (config.model.geometry.resize, config.model.geometry.crop) == (256, 224)


def test_overrides_change_values_and_recipe_and_the_users_recipe_beats_the_chosen_one() -> None:
    config = compose(["model.name=resnet34", "fit.epochs=3", "fit=scratch"], environ={})
    assert (config.model.name, config.fit.epochs, config.fit.batch_norm) == ("resnet34", 3, "learnt")
    assert compose(recipe="scratch", environ={}).fit.recipe == "scratch"
    assert compose(["fit=finetune"], recipe="scratch", environ={}).fit.recipe == "finetune"


@pytest.mark.parametrize(
    "file", [path for path in FOLDER.glob("*/*.yaml") if path.parent.name not in ("experiment", "task")], ids=str
)
def test_every_file_of_every_group_is_a_configuration(file: Path) -> None:
    assert compose([f"{file.parent.name}={file.stem}"], environ={})


def test_an_experiment_is_a_short_difference_and_the_command_line_beats_it() -> None:
    experiment = compose(["+experiment=dogs133"], environ={})
    assert (experiment.model.name, experiment.fit.class_weights, experiment.fit.epochs) == ("resnet50", "balanced", 4)
    assert compose(["+experiment=dogs133", "model=resnet101"], environ={}).model.name == "resnet101"
    assert compose(["+experiment=dogs10", "fit.epochs=2"], environ={}).fit.epochs == 2
    assert compose(["+experiment=dogs10"], recipe="scratch", environ={}).fit.recipe == "scratch"
    assert all(len(file.read_text().splitlines()) < 20 for file in FOLDER.glob("experiment/*.yaml"))


def test_a_run_from_before_the_groups_is_still_read(tmp_path: Path) -> None:
    config = compose(environ={})
    config.save(tmp_path / "config.yaml")
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for key in ("optimiser", "schedule", "log"):
        del values[key]
    del values["fit"]["precision"], values["fit"]["class_weights"], values["data"]["cache"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert dataclasses.replace(load(tmp_path / "config.yaml"), data=config.data) == config


def test_command_line_beats_environment_beats_file(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "train"))
    file = folder / "data/pictures.yaml"
    file.write_text(file.read_text().replace("folder: null", "folder: /file"))
    environ = {"BEELINE_DATA": "/environment", "BEELINE_WEIGHTS": "/weights"}
    assert compose(environ={}, folder=folder).data.folder == "/file"
    assert compose(environ=environ, folder=folder).data.folder == "/environment"
    assert compose(["data.folder=/flag"], environ=environ, folder=folder).data.folder == "/flag"
    assert compose(environ=environ, folder=folder).model.weights == "/weights"


def test_numbers_become_texts_and_fractions_where_those_are_meant() -> None:
    """For YAML a version is a number, and 1 is no fraction; a run's fingerprint depends on the difference."""
    config = compose(["export.version=2.0", "data.folder=2024", "fit.rate=1", "model.std=[1,1,2]"], environ={})
    assert (config.export.version, config.data.folder) == ("2.0", "2024")
    assert repr((config.fit.rate, config.model.std)) == "(1.0, (1.0, 1.0, 2.0))"


def test_a_saved_configuration_loads_as_it_was(tmp_path: Path) -> None:
    config = compose(["seed=7", "augment.scale=[0.3,0.9]"], environ={})
    config.save(tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.nmae=resnet34", r"unknown key model\.nmae; did you mean 'model\.name'\?"),
        ("epochs=3", r"unknown key epochs; did you mean 'fit\.epochs'\?"),
        ("fit=finetun", r"fit is 'finetun'; did you mean 'finetune'\?"),
        ("model=resnet34", r"model is 'resnet34'; did you mean 'resnet50'\?; or set a key, as model\.crop=\.\.\."),
        ("export=x", r"export is a group of keys; set one of them"),
        ("+experiment=dog10", r"experiment is 'dog10'; did you mean 'dogs10'\?"),
        ("experiment=dogs10", r"adds, deletes or sweeps; only key=value and \+experiment=NAME are understood"),
        ("optimiser.name=adam", r"optimiser\.name is 'adam'; allowed: adamw or sgd"),
        ("schedule.patience=0", r"schedule\.patience is 0; allowed: at least 1"),
        ("log.tensorboard=1", r"log\.tensorboard is 1; allowed: true or false"),
        ("fit.epochs=many", r"fit\.epochs is 'many'; allowed: 0 to 10000, a whole number"),
        ("fit.epochs=3.5", r"fit\.epochs is 3\.5; allowed: 0 to 10000, a whole number"),
        ("seed=true", r"seed is True; allowed: 0 to"),
        ("model.mean=[a,b,c]", r"model\.mean is \['a', 'b', 'c'\]; allowed: three numbers"),
        ("export.version=null", r"export\.version is None; allowed: 1 to 128 letters"),
        ("export.version='1 beta'", r"export\.version is '1 beta'; allowed: 1 to 128 letters"),
        ("export.name='my model'", r"export\.name is 'my model'; allowed: null, or 1 to 128 letters"),
        (f"export.name={'m' * 129}", r"export\.name is 'm+'; allowed: null, or 1 to 128 letters"),
        ("model.crop=${model.risize}", r"model\.crop: Interpolation key 'model\.risize' not found; correct the value"),
        ("fit.epochs=-1", r"fit\.epochs is -1; allowed: 0 to 10000"),
        ("fit.epochs=1,2", r"adds, deletes or sweeps; only key=value"),
        ("+fit.speed=3", r"adds, deletes or sweeps; only key=value"),
        ("~fit", r"adds, deletes or sweeps; only key=value"),
        ("resnet34", r"'resnet34' is no override; write key=value"),
        ("augment.scale=[0.9,0.3]", r"augment\.scale is \[0\.9, 0\.3\]; allowed: two shares, low first"),
        ("augment.scale=[]", r"augment\.scale is \[\]; allowed"),
        ("model.crop=300", r"model\.crop is 300; allowed: 1 to model\.resize \(256\)"),
        ("model.interpolation=cubic", r"model\.interpolation is 'cubic'; allowed: bilinear, bicubic"),
        ("model.std=[1,1,0]", r"model\.std is .*; allowed: three numbers over 0"),
        ("fit.recipe=finetun", r"fit\.recipe is 'finetun'; allowed: finetune, scratch, head, small"),
        ("fit.batch_norm=on", r"fit\.batch_norm is .*; allowed: frozen or learnt"),
        ("fit.rate=nan", r"fit\.rate is nan; allowed: over 0"),
        ("seed=-1", r"seed is -1; allowed: 0 to 4294967295"),
        ("data.held_out=1", r"data\.held_out is 1; allowed: over 0, under 1"),
    ],
)
def test_every_mistake_has_its_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        compose([override], environ={})
    assert "\n" not in str(caught.value)


def test_without_epochs_and_without_a_head_nothing_would_be_learnt() -> None:
    with pytest.raises(ConfigError, match=r"fit\.head_penalty is None; allowed: over 0, where fit\.epochs is 0"):
        compose(["fit=scratch", "fit.epochs=0"], environ={})


@pytest.mark.parametrize(
    ("name", "line", "written", "sentence"),
    [
        ("augment/light", "flip: 0.5", "filp: 0.5", r"unknown key augment\.filp .*did you mean 'augment\.flip'\?"),
        ("config", "seed: 0", "", "seed is missing; allowed: 0 to"),
    ],
)
def test_a_wrong_key_in_a_file_is_named(tmp_path: Path, name: str, line: str, written: str, sentence: str) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "train"))
    file = folder / f"{name}.yaml"
    file.write_text(file.read_text().replace(line, written))
    with pytest.raises(ConfigError, match=sentence):
        compose(environ={}, folder=folder)


@pytest.mark.parametrize("text", ["seed: x", "][", "seed: 0\nsped: 1", ""])
def test_a_damaged_stored_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is no training configuration"):
        load(tmp_path / "config.yaml")
