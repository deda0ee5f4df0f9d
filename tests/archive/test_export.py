"""Exporting: presets, the saved graph, the folder's contents, the same bytes anywhere, and what is refused."""

from __future__ import annotations

import filecmp
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torchvision.transforms.v2 import functional

from archive.export import export_folder, find_preset
from archive.graph import IMAGENET_MEAN, IMAGENET_STD, Graph, Network
from beeline import golden
from beeline.engines.torch import TorchEngine
from beeline.errors import ArchiveError
from beeline.spec import Geometry, ModelSpec
from tests.archive.conftest import LABELS, Changed, TinyNet, tiny_program, tiny_request
from tests.conftest import ROOT


def probable() -> TinyNet:
    return Changed(lambda scores: scores.softmax(1))


def test_the_preset_imagenet_is_that_of_torchvisions_first_resnets() -> None:
    assert find_preset("imagenet") == find_preset("ResNet18_Weights.IMAGENET1K_V1") == find_preset(None, "resnet18")


def test_torchvision_gives_the_preprocessing_of_the_architectures_default_weights() -> None:
    transform = torchvision.models.Swin_T_Weights.DEFAULT.transforms()
    geometry = Geometry(transform.resize_size[0], transform.crop_size[0], "bicubic")
    assert find_preset("torchvision", "swin_t").geometry == geometry


@pytest.mark.parametrize("name", ["efficientnet_b0", "vit_base_patch16_clip_224.openai", "inception_v3.tf_in1k"])
def test_timm_gives_the_preprocessing_that_it_names(name: str) -> None:
    config = resolve_model_data_config(timm.create_model(name, pretrained=False))
    resize, crop, *_, normalise = create_transform(**config).transforms
    preset = find_preset("timm", f"timm:{name}")
    assert preset == find_preset(None, f"timm:{name}")
    assert preset.geometry == Geometry(resize.size, crop.size[0], resize.interpolation.value)
    assert torch.equal(torch.tensor(preset.mean), normalise.mean)
    assert torch.equal(torch.tensor(preset.std), normalise.std)


def test_timms_squash_is_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "timm:coat_lite_medium_384"
    assert find_preset("timm", name).geometry == Geometry(384, 384, "bicubic", fit="squash")
    config = {**resolve_model_data_config(timm.create_model("resnet18d", pretrained=False)), "crop_pct": 1.0}
    changes = {"crop_mode": "squash", "input_size": (3, 240, 320)}
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda network: config | changes)
    assert find_preset("timm", name).geometry == Geometry(240, 240, "bicubic", fit="squash", width=320)
    for change in ({"crop_mode": "border"}, {"crop_mode": "center"}, {"crop_pct": 0.9}, {"input_size": (1, 224, 224)}):
        monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda network, odd=change: config | changes | odd)
        with pytest.raises(ArchiveError, match="allowed: three channels, and 'center' with a square or 'squash' with"):
            find_preset("timm", name)


def test_an_override_wins_and_leaves_the_rest() -> None:
    preset = find_preset("imagenet").override(resize=72, crop=64, interpolation=None, mean=[0, 0, 0])
    assert preset.geometry == Geometry(72, 64, "bilinear")
    assert (preset.mean, preset.std) == ([0, 0, 0], IMAGENET_STD)


@pytest.mark.parametrize(
    ("name", "architecture", "reason"),
    [
        ("imagnet", None, "did you mean 'imagenet'"),
        ("torchvision", None, "needs an architecture"),
        ("timm", None, "needs an architecture"),
        ("timm", "timm:resnet1000", "timm .* lacks"),
        ("torchvision", "resnet1000", "resnet1000"),
        ("ResNet18_Weights.V9", None, "ResNet18_Weights.V9"),
        ("torchvision", "fcn_resnet50", "fcn_resnet50"),
    ],
)
def test_an_unknown_preset_is_one_sentence_with_the_fix(name: str, architecture: str | None, reason: str) -> None:
    with pytest.raises(ArchiveError, match=reason):
        find_preset(name, architecture)


@pytest.mark.parametrize(("key", "values"), [("std", (1, 0, 1)), ("mean", (1, 0))])
def test_an_impossible_mean_or_deviation_is_refused(key: str, values: Sequence[float]) -> None:
    with pytest.raises(ArchiveError, match=rf"{key} is .*allowed: three numbers"):
        tiny_request(**{key: values})


def test_the_folder_holds_what_a_worker_needs(tiny_export: Path) -> None:
    spec = ModelSpec.load(tiny_export)
    assert (spec.labels, spec.geometry) == (LABELS, Geometry(36, 32))
    names = {path.relative_to(tiny_export).as_posix() for path in tiny_export.rglob("*") if path.is_file()}
    goldens = {f"golden/{name}" for name in ("0.jpg", "1.png", "2.jpg", "3.jpg", "expected.json")}
    assert names == {"model.pt2", "model_spec.json", *goldens}
    assert golden.replay(tiny_export, spec, TorchEngine(tiny_export, spec, device="cpu").forward) == 4


def test_another_process_folder_umask_and_hash_seed_give_the_same_bytes(tiny_export: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; os.umask(0o077)\n"
        "from archive.export import export_folder\n"
        "from tests.archive.conftest import TinyNet, tiny_request\n"
        "export_folder(TinyNet(), tiny_request(), pathlib.Path('deeper/still'))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    again = tmp_path / "deeper" / "still"
    names = sorted(path.relative_to(tiny_export) for path in tiny_export.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in names:
        assert filecmp.cmp(tiny_export / name, again / name, shallow=False), name


@pytest.mark.parametrize(
    ("network", "changes", "reason"),
    [
        (lambda: TinyNet(4), {}, "4 outputs and there are 3 labels"),
        (lambda: Changed(lambda scores: scores / 0), {}, "not finite"),
        (lambda: Changed(lambda scores: scores - scores.mean(0, keepdim=True)), {}, "depends on its neighbours"),
        (lambda: Changed(lambda scores: (scores, scores)), {}, "name one with --output-key 0"),
        (probable, {"output": "logits"}, "the network returns probabilities"),
        (TinyNet, {"output": "probabilities"}, "say --output logits"),
        (lambda: tiny_program(batch=1), {}, "batches of exactly 1"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(
    tmp_path: Path, network: Callable[[], Network], changes: dict[str, object], reason: str
) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ArchiveError, match=reason):
        export_folder(network(), tiny_request(**changes), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads


def test_probabilities_are_exported_as_such(tmp_path: Path) -> None:
    spec = export_folder(probable(), tiny_request(), tmp_path / "export")
    assert spec.output == "probabilities"
    engine = TorchEngine(tmp_path / "export", spec, device="cpu")
    assert golden.replay(tmp_path / "export", spec, engine.forward) >= 2


def test_only_an_export_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "chapter1.txt").write_text("years of work")
    with pytest.raises(ArchiveError, match="is not an exported folder"):
        export_folder(TinyNet(), tiny_request(), tmp_path)
    assert (tmp_path / "chapter1.txt").read_text() == "years of work"


def graph_of(network: Network, takes_uint8: bool = False) -> Graph:
    return Graph(network, find_preset("imagenet").override(resize=32, crop=32, takes_uint8=takes_uint8))


def noise(count: int) -> torch.Tensor:
    pictures = np.random.default_rng(3).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return torch.from_numpy(pictures)


def test_the_graph_normalises_like_torchvision_and_the_network_does_not_change() -> None:
    network = TinyNet().train()
    graph = graph_of(network)
    planes = functional.to_dtype(noise(4).permute(0, 3, 1, 2), torch.float32, scale=True)
    expected = network(functional.normalize(planes, list(IMAGENET_MEAN), list(IMAGENET_STD)))
    torch.testing.assert_close(graph(noise(4)), expected, rtol=1e-5, atol=1e-5)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("scripted", [False, True])
def test_the_saved_file_answers_like_the_graph_has_the_same_bytes_each_time_and_names_no_path(
    tmp_path: Path, scripted: bool, jit: None
) -> None:
    network = torch.jit.script(TinyNet().eval()) if scripted else TinyNet()
    graph = graph_of(network)
    path = graph.save(tmp_path)
    assert path.name == ("model.pt" if scripted else "model.pt2")
    loaded = torch.jit.load(str(path)) if scripted else torch.export.load(path).module()
    for count in (1, 2, 7):
        torch.testing.assert_close(loaded(noise(count)), graph(noise(count)))
    saved = path.read_bytes()
    for _ in range(2):
        assert graph_of(network).save(tmp_path).read_bytes() == saved
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist()[0].startswith("model/")
        content = b"".join(map(archive.read, archive.namelist()))
    for trace in (str(ROOT), str(tmp_path), str(Path.home()), "site-packages", "stack_trace"):
        assert trace.encode() not in content, trace
    # Classes of ours only: this process may have compiled the user's before.
    assert not re.search(rb"archive[./][a-z]+[./]___torch_mangle", content)


@pytest.mark.parametrize("kind", ["module", "program", "script"])
def test_denormal_weights_are_saved_as_zeros(tmp_path: Path, kind: str, jit: None) -> None:
    module = TinyNet()
    with torch.no_grad():
        module.head.weight[:, ::2] = 1e-40
    network: Network = module
    if kind == "program":
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        network = torch.export.export(module, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=sizes)
    if kind == "script":
        network = torch.jit.script(module)
    path = graph_of(network).save(tmp_path)
    loaded = torch.jit.load(str(path)) if kind == "script" else torch.export.load(path).module()
    weight = next(tensor for name, tensor in loaded.state_dict().items() if name.endswith("head.weight"))
    assert torch.equal(weight == 0, module.head.weight.abs() < 1e-39)
    assert (module.head.weight[:, ::2] == 1e-40).all(), "the user's network is not changed"


def test_filters_are_stored_channels_last(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    path = graph_of(network).save(tmp_path)
    filters = next(p for p in torch.export.load(path).module().parameters() if p.ndim == 4)
    assert filters.is_contiguous(memory_format=torch.channels_last)


def test_a_network_that_fixes_its_batch_is_refused(tmp_path: Path) -> None:
    class Fixed(TinyNet):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return super().forward(pictures.reshape(2, 3, 32, 32))

    with pytest.raises(ArchiveError, match="for every batch size"):
        graph_of(Fixed()).save(tmp_path)


@pytest.mark.parametrize("kind", ["module", "program", "script"])
def test_gradients_reach_the_pixels_of_a_network_that_takes_uint8_itself(kind: str, jit: None) -> None:
    inner = graph_of(TinyNet())
    network: torch.nn.Module | torch.export.ExportedProgram = inner.module
    if kind == "program":
        batch = torch.export.Dim("batch", min=1)
        network = torch.export.export(inner.module, (noise(2),), dynamic_shapes=({0: batch},))
    if kind == "script":
        network = torch.jit.script(inner.module)
    graph = graph_of(network, takes_uint8=True)
    pixels = noise(2).float().requires_grad_()
    graph.differentiable(pixels).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    torch.testing.assert_close(graph(noise(2)), inner(noise(2)))
