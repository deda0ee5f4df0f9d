"""Weights as people have them: `archive build` and `beeline train` take each form, or name the way out.

The right values are those of torchvision's and timm's own networks.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gzip
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from archive.architectures import build
from archive.artifact import load_network, read_weights, write_safetensors
from archive.export import find_preset
from archive.graph import Graph
from archive.outputs import settle
from beeline.errors import ArchiveError
from tests.archive.conftest import TinyNet

State = dict[str, Tensor]
Wrap = Callable[[State], Any]
FILE = "weights.pth"


def seeded(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm:"):
        network: nn.Module = timm.create_model(name.removeprefix("timm:"), pretrained=False, **options)
    else:
        network = torchvision.models.get_model(name, weights=None, **options)
    if name.startswith("vit_"):
        # torchvision makes it of zeros, so that all answers are equal.
        nn.init.normal_(network.get_parameter("heads.head.weight"))
    return network.eval()


def check(path: Path, architecture: str, network: nn.Module, side: int = 64, transform_input: bool = False) -> None:
    """Compare what both readers make of a file with the library's network."""
    pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    loaded = load_network(path, architecture, transform_input)
    assert isinstance(loaded, nn.Module)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pictures), network(pictures), rtol=1e-4, atol=1e-6)
    weights, expected = read_weights(path, architecture), network.state_dict()
    assert weights.head
    fresh = build(architecture, 7)
    before = copy.deepcopy(fresh.state_dict())
    weights.start(fresh)
    for name, tensor in fresh.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, (before if name in weights.head else expected)[name]), name


def prefixed(prefix: str) -> Wrap:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


def under(key: str) -> Wrap:
    return lambda state: {"epoch": 3, key: state}


WRAPS: dict[str, Wrap] = {
    "plain": lambda state: state,
    **{
        prefix: prefixed(prefix)
        for prefix in ("module.", "model.", "_orig_mod.", "module._orig_mod.", "backbone.", "net.", "0.", "a.b.")
    },
    "part": lambda state: {name.replace("features.", "features.module."): tensor for name, tensor in state.items()},
    "n_averaged": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.")(state)},
    "thop": lambda state: {**state, "total_ops": torch.zeros(1), "features.0.total_ops": torch.zeros(1)},
    "sorted": lambda state: dict(sorted(state.items())),
    "halves": lambda state: {name: tensor.bfloat16() for name, tensor in state.items()},
    **{key: under(key) for key in ("state_dict", "model", "model_ema", "state_dict_ema", "model_state_dict", "ema")},
    "deep": lambda state: {"train": [{"states": {"net": prefixed("net.")(state)}}]},
    "twice": lambda state: {"model": state, "best": {name: tensor.clone() for name, tensor in state.items()}},
    "criterion": lambda state: {"state_dict": {"criterion.weight": torch.ones(4), **prefixed("model.")(state)}},
    "optimizer": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "namespace": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, out=Path("runs"))},
    "numpy": lambda state: {
        "model": state,
        "best": np.float64(0.9),
        "seen": collections.deque([np.int64(1)]),
        "counts": collections.defaultdict(list, a=[1]),
    },
    "objects": lambda state: {"model": state, "loss": nn.CrossEntropyLoss(), "to": torchvision.transforms.Resize(8)},
    "omegaconf": lambda state: {"state_dict": state, "cfg": omegaconf.OmegaConf.create({"a": [1, {"b": 2.5}]})},
}


@pytest.fixture(scope="module")
def squeezenet() -> nn.Module:
    return seeded("squeezenet1_1", num_classes=4)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_wrapped_state_dict_is_read(tmp_path: Path, squeezenet: nn.Module, wrap: Wrap) -> None:
    torch.save(wrap(dict(squeezenet.state_dict())), tmp_path / FILE)
    if wrap is WRAPS["halves"]:
        squeezenet = copy.deepcopy(squeezenet).bfloat16().float()
    check(tmp_path / FILE, "squeezenet1_1", squeezenet)


def test_what_was_found_elsewhere_or_left_out_is_said(tmp_path: Path, squeezenet: nn.Module) -> None:
    torch.save(WRAPS["criterion"](squeezenet.state_dict()), tmp_path / FILE)
    said: list[str] = []
    load_network(tmp_path / FILE, "squeezenet1_1", say=said.append)
    assert said == [
        "the weights are ['state_dict'][model.*] of weights.pth",
        "left out of weights.pth: criterion.weight",
    ]


def test_safetensors_are_read_and_written(tmp_path: Path, squeezenet: nn.Module) -> None:
    state, path = squeezenet.state_dict(), tmp_path / "model.safetensors"
    save_file(dict(state), path)
    check(path, "squeezenet1_1", squeezenet)
    write_safetensors(copy.deepcopy(squeezenet).to(memory_format=torch.channels_last), path)  # type: ignore[call-overload]
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(path).items())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArchiveError, match="damaged safetensors"):
        read_weights(path, "squeezenet1_1")


OLDER: dict[str, tuple[str, Any, int]] = {
    "densenet121": (r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", 64),
    "vit_b_32": (r"\.mlp\.(?:0|(3))\.", lambda match: f".mlp.linear_{2 if match[1] else 1}.", 224),
}


@pytest.mark.parametrize("name", OLDER)
def test_published_files_with_older_names_are_read(tmp_path: Path, name: str) -> None:
    network = seeded(name, num_classes=5)
    pattern, older, side = OLDER[name]
    state = {re.sub(pattern, older, key): tensor for key, tensor in network.state_dict().items()}
    assert state.keys() != network.state_dict().keys()
    torch.save(state, tmp_path / FILE)
    check(tmp_path / FILE, name, network, side)


def test_a_vit_is_made_for_the_size_of_pictures_that_its_file_shows(tmp_path: Path) -> None:
    """As those that torchvision publishes for 384, 512 and 518 pixels."""
    network = seeded("vit_b_32", num_classes=5, image_size=64)
    torch.save(network.state_dict(), tmp_path / FILE)
    loaded = load_network(tmp_path / FILE, "vit_b_32")
    assert isinstance(loaded, nn.Module)
    pictures = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(loaded(pictures), network(pictures), rtol=1e-4, atol=1e-6)
    graph = Graph(loaded, find_preset("half"))
    with pytest.raises(ArchiveError, match="take pictures of 224 x 224, and takes 64 x 64; add --resize 64 --crop 64"):
        settle(graph, loaded, 5, None)
    # A file of other patches still gets the sentence about its shapes.
    with pytest.raises(ArchiveError, match=r"shape .* name the right architecture, and the size of picture"):
        load_network(tmp_path / FILE, "vit_b_16")


@pytest.mark.parametrize("lost", [False, True])
def test_an_mnasnet_is_read_with_its_version_and_without(tmp_path: Path, lost: bool) -> None:
    network = seeded("mnasnet0_5", num_classes=5)
    state = network.state_dict()
    torch.save(dict(state) if lost else state, tmp_path / FILE)
    check(tmp_path / FILE, "mnasnet0_5", network)


def test_an_mnasnet_of_the_first_version_gets_its_first_layers(tmp_path: Path) -> None:
    network, old = seeded("mnasnet0_5", num_classes=5), seeded("mnasnet0_5", num_classes=5)
    state = network.state_dict()
    state._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    # torchvision gives a network the first layers of the first version before it compares shapes.
    with pytest.warns(UserWarning, match="previous version"), pytest.raises(RuntimeError):
        old.load_state_dict(state)
    torch.save(old.state_dict(), tmp_path / FILE)
    loaded = load_network(tmp_path / FILE, "mnasnet0_5")
    assert isinstance(loaded, nn.Module)
    pictures = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(loaded(pictures), old.eval()(pictures), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_pixels_are_normalised_as_published_weights_expect(tmp_path: Path, name: str, auxiliary: bool) -> None:
    network = seeded(name, num_classes=5, init_weights=False, aux_logits=auxiliary, transform_input=True)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            # Without this its answer hardly depends on the picture.
            nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), tmp_path / FILE)
    check(tmp_path / FILE, name, network, 96, transform_input=True)
    plain = load_network(tmp_path / FILE, name)
    pictures = torch.rand(2, 3, 96, 96)
    assert isinstance(plain, nn.Module)
    assert not torch.allclose(plain(pictures), network(pictures), rtol=1e-2)


@pytest.mark.parametrize("name", ["timm:efficientnet_b0", "timm:convnext_atto", "timm:vit_tiny_patch16_224"])
def test_a_network_of_timm_is_read(tmp_path: Path, name: str) -> None:
    network = seeded(name, num_classes=5)
    torch.save(network.state_dict(), tmp_path / FILE)
    check(tmp_path / FILE, name, network, 224)


def resnet(head: nn.Module) -> nn.Module:
    network = seeded("resnet18")
    network.fc = head
    return network.eval()


LAYERS = {
    # Its network is built with numbers that a device without memory lacks.
    "regnet_y_400mf": lambda network: setattr(network, "fc", nn.Sequential(nn.Linear(440, 3))),
    "resnet18": lambda network: setattr(network, "fc", nn.Sequential(nn.Dropout(), nn.Linear(512, 3))),
    # One class, whose bias is as small as a counter.
    "mobilenet_v2": lambda network: setattr(network, "classifier", nn.Linear(1280, 1)),
    "alexnet": lambda network: network.classifier.__setitem__(6, nn.Sequential(nn.Linear(4096, 3))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_single_layer_in_the_heads_place_is_the_head(tmp_path: Path, name: str) -> None:
    network = seeded(name)
    LAYERS[name](network)
    torch.save(network.eval().state_dict(), tmp_path / FILE)
    check(tmp_path / FILE, name, network)


TWO = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 3))
HEADS: dict[str, tuple[Callable[[], State], str]] = {
    "several layers": (
        lambda: resnet(TWO).state_dict(),
        r"head of its own \(fc\.0\.weight \[64, 512\], fc\.2\.weight \[3, 64\]\).*torch\.jit\.trace",
    ),
    "normalised": (
        lambda: resnet(nn.Sequential(nn.BatchNorm1d(512), nn.Linear(512, 3))).state_dict(),
        r"head of its own \(fc\.1\.weight \[3, 512\]\)",
    ),
    "outside": (
        lambda: {**prefixed("backbone.")(resnet(nn.Identity()).state_dict()), "classifier.weight": torch.ones(3, 512)},
        r"head of its own \(classifier\.weight \[3, 512\]\)",
    ),
    "none": (lambda: resnet(nn.Identity()).state_dict(), r"lacks 'fc\.weight', the head.*`beeline train`"),
}


@pytest.mark.parametrize(("make", "message"), HEADS.values(), ids=HEADS)
def test_another_head_is_left_out_in_training_and_refused_in_an_archive(
    tmp_path: Path, make: Callable[[], State], message: str
) -> None:
    torch.save(state := make(), tmp_path / FILE)
    with pytest.raises(ArchiveError, match=message):
        load_network(tmp_path / FILE, "resnet18")
    fresh = build("resnet18", 2)
    read_weights(tmp_path / FILE, "resnet18").start(fresh)
    assert torch.equal(
        fresh.state_dict()["conv1.weight"], {**state, **resnet(nn.Identity()).state_dict()}["conv1.weight"]
    )


def test_an_added_layer_of_a_known_head_is_a_head_of_its_own(tmp_path: Path) -> None:
    network = seeded("mobilenet_v2")
    network.classifier = nn.Sequential(*network.get_submodule("classifier").children(), nn.Linear(1000, 2))
    torch.save(network.state_dict(), tmp_path / FILE)
    with pytest.raises(ArchiveError, match=r"classifier\.2\.weight \[2, 1000\].*lacks its code; make TorchScript"):
        load_network(tmp_path / FILE, "mobilenet_v2")


class Strange:
    """A type that nobody knows."""


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("resnet18.pth", b"x")


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "weights.pth")


SQUEEZENET = torchvision.models.squeezenet1_1(num_classes=2).state_dict()
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is empty; download or copy it again"),
    "pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x"), "git lfs pull"),
    "page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>"), "is a web page"),
    "json": (lambda path: path.write_bytes(b'{\n "metadata": {}}'), "is JSON"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "unpack it with `gunzip`"),
    "tar": (tarred, "unpack it with `tar xf`"),
    "zip": (zipped, r"is a zip archive \(resnet18\.pth\).*`unzip`"),
    "cut": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "is cut off.*copy it again"),
    "text": (lambda path: path.write_bytes(b"no weights"), "is no file that torch.save wrote; download or copy"),
    "openvino": (lambda path: path.write_bytes(b'<?xml version="1.0"?>\n<net name="x">'), "is no file that torch.save"),
    "protocol": (lambda path: path.write_bytes(pickle.dumps(SQUEEZENET, 4)), r"state dict \(Unsupported operand 149\)"),
    "int8": (
        lambda path: torch.save({name: tensor.char() for name, tensor in SQUEEZENET.items()}, path),
        r"has 'features\.0\.weight' as int8, .*; save it as float32",
    ),
    "pruned": (lambda path: torch.save({"a_orig": torch.ones(1)}, path), r"a_orig .*give `archive build` a changed"),
    "module": (
        lambda path: torch.save(nn.Linear(2, 2), path),
        r"holds a torch\.nn\.modules\.linear\.Linear.*torch\.load\('weights.pth', .*torch\.jit\.trace",
    ),
    "object": (lambda path: torch.save({"a": Strange()}, path), r"holds a .*test_weights\.Strange, .*is refused"),
    "code": (lambda path: path.write_bytes(pickle.dumps(eval, 2)), r"holds a (__builtin__\.)?eval, whose unpickling"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "holds no tensors by name"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "several": (
        lambda path: torch.save(
            {"model": SQUEEZENET, "ema": {name: tensor + 1 for name, tensor in SQUEEZENET.items()}}, path
        ),
        r"2 sets of weights of squeezenet1_1: \['model'\], \['ema'\]; save",
    ),
}


@pytest.mark.parametrize("read", [load_network, read_weights])
@pytest.mark.parametrize(("write", "message"), FILES.values(), ids=FILES)
def test_a_file_without_weights_is_one_sentence_with_the_way_out(
    tmp_path: Path, write: Callable[[Path], object], message: str, read: Callable[[Path, str], object]
) -> None:
    write(tmp_path / FILE)
    with pytest.raises(ArchiveError, match=message) as caught:
        read(tmp_path / FILE, "squeezenet1_1")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_programs_are_for_archives_and_refused_in_training(tmp_path: Path, jit: None) -> None:
    torch.jit.script(TinyNet()).save(str(tmp_path / "model.pt"))
    torch.export.save(torch.export.export(TinyNet(), (torch.zeros(2, 3, 32, 32),)), tmp_path / "model.pt2")
    for name, kind in (("model.pt", "torchscript"), ("model.pt2", "exported_program")):
        assert load_network(tmp_path / name)
        with pytest.raises(
            ArchiveError, match=rf"is a program \({kind}\), which cannot be trained; save the state dict"
        ):
            read_weights(tmp_path / name, "resnet18")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("squeeznet1_1", r"lacks \(near it: squeezenet1_1"),
        ("microsoft/ResNet-50", r"lacks \(near it: resnet50"),
        ("fcn_resnet50", r"has as no classifier"),
        ("mobilenetv4_conv_small", r"timm \S+ has others \(near it: timm:mobilenetv4_conv_small"),
        ("timm:efficientnetb0", r"timm \S+ lacks \(near it: efficientnet_b0"),
        ("timm:gemma4_vit_167m_enc", "has no head with a row a class"),
        ("x", r"torchvision \d\S+ lacks; timm lacks it too; bring it as TorchScript"),
    ],
)
def test_an_unknown_architecture_gets_the_nearest_names(tmp_path: Path, name: str, message: str) -> None:
    torch.save(SQUEEZENET, tmp_path / FILE)
    with pytest.raises(ArchiveError, match=message):
        read_weights(tmp_path / FILE, name)
