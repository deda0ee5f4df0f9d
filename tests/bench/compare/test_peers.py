"""Which servers there are: two classes, their settings, their locked packages, loopback alone."""

import base64
import email
import email.policy
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

from beeline.errors import BeelineError
from bench.compare.peers import DEFAULT, FOLDER, OURS, Peer, base64_json, choose, everything, form, raw, triton
from bench.compare.server import Setup, start
from bench.peers.torchserve import server as torchserve
from bench.pictures import Pictures
from bench.tune.grid import Settings
from host import ROOT
from tests.conftest import RED

PEERS = {peer.name: peer for peer in everything("resnet18", 2, Settings(8, 2, 3, 1))}
LOCKS = sorted(path.parent.name for path in FOLDER.glob("*/requirements.in"))


def test_classes_are_not_mixed_and_have_their_settings() -> None:
    assert LOCKS == ["bentoml", "fastapi", "flask", "litserve", "mosec", "pytriton", "ray", "torchserve"]
    assert [*PEERS] == sorted(PEERS, key=lambda name: PEERS[name].kind == OURS)
    for peer in PEERS.values():
        if peer.kind == OURS:
            assert (peer.settings.workers, peer.settings.threads) == (2, 1)
            assert peer.settings.batch_size == (1 if peer.name in ("ours-fastapi", "ours-flask") else 8)
        else:
            # As documented, unless the name says otherwise.
            assert peer.settings.threads == (1 if peer.name.endswith("-one-thread") else DEFAULT)
            assert peer.pattern
    assert PEERS["ours-bentoml"].settings.max_batch_delay == PEERS["bentoml"].settings.max_batch_delay


def test_the_default_is_all_but_the_container_and_peers_on_one_thread_and_names_choose_in_the_records_order() -> None:
    names = [peer.name for peer in choose(PEERS.values(), ())]
    assert names[0] == "torchserve"
    assert [name for name in names if name.endswith("-one-thread")] == ["torchserve-one-thread"]
    assert next(name for name in names if name.startswith("ours-")) == "ours-torchserve"
    assert len(names) == 9 + 13
    assert "ours-container" not in names
    assert [peer.name for peer in choose(PEERS.values(), ("ours-mms", "litserve"))] == ["litserve", "ours-mms"]
    with pytest.raises(BeelineError, match="did you mean 'litserve'"):
        choose(PEERS.values(), ("litserv",))


@pytest.mark.parametrize("peer", PEERS.values(), ids=lambda peer: peer.name)
def test_a_start_has_its_port_on_loopback_its_settings_and_no_reports(peer: Peer, tmp_path: Path) -> None:
    pictures = Pictures("p", ("a",), (b"x",))
    setup = Setup(tmp_path / "m.mar", tmp_path / "config.properties", tmp_path, "bf16", pictures, 1, 1.0)
    words, variables = start(peer, setup, 23456, tmp_path)
    command = " ".join(words)
    assert "0.0.0.0" not in command + str(variables)
    assert variables["BENTOML_DO_NOT_TRACK"] == "True"
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    if peer.server:
        assert f"--server {peer.server} --gateway {'nginx' if 'nginx' in peer.name else 'none'} " in command
        assert "--port 23456 " in command
        assert command.endswith("--batch-size 8 --workers 2 --max-batch-delay 3")
    else:
        asked = json.loads(variables["PEER"])
        assert asked["engine"] == ("beeline" if peer.kind == OURS else "documented")
        assert (asked["port"], asked["workers"]) == (23456, peer.settings.workers)
        assert variables.get("OMP_NUM_THREADS") == (None if peer.settings.threads == DEFAULT else "1")
    if peer.name == "ours-container":
        assert f"--publish=127.0.0.1:23456:8080 --env=BEELINE_PEER={tmp_path} --env=BATCH_SIZE=8" in command


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_has_hashes_and_the_versions_asked_for_and_no_address(name: str) -> None:
    environment, pinned = PEERS[name].environment, PEERS[name].pinned()
    assert environment is not None
    assert environment.folder == ROOT / ".beeline" / "peers" / name
    assert environment.version in (sys.executable, "3.11")
    assert any("--require-hashes" in command for command in environment.commands())
    text = environment.lock_file.read_text(encoding="utf-8")
    assert "://" not in text
    assert "index-url" not in text
    lines = [line for line in text.splitlines() if re.match(r"[A-Za-z]", line)]
    assert all("==" in line for line in lines)
    assert text.count("--hash=sha256:") >= len(lines) > 0
    assert {"torch": "2.13.0", "torchvision": "0.28.0"}.items() <= pinned.items()
    assert {f"{package}=={version}" for package, version in pinned.items()} <= {line.split()[0] for line in lines}


@pytest.mark.parametrize(("labels", "handler"), [(4, "few_labels.py"), (5, "image_classifier")])
def test_the_stock_archive_of_few_labels_asks_for_no_more_than_there_are(
    labels: int, handler: str, tmp_path: Path
) -> None:
    (tmp_path / "documented.pt").touch()
    (tmp_path / "index_to_name.json").write_text(json.dumps(dict.fromkeys(map(str, range(labels)))))
    torchserve.write_archive(tmp_path, tmp_path / "classifier.mar")
    with zipfile.ZipFile(tmp_path / "classifier.mar") as archive:
        model = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
        assert model["handler"] == handler
        assert {model["serializedFile"], "index_to_name.json", "few_labels.py"} <= set(archive.namelist())


DATA = b"\xff\xd8\xff picture \r\n--beeline"


@pytest.mark.parametrize(("data", "kind"), [(DATA, "image/jpeg"), (RED, "image/png")])
def test_a_picture_is_sent_raw_in_base64_or_as_a_form_that_a_parser_reads(data: bytes, kind: str) -> None:
    assert raw("/x").encode(data) == data
    assert base64.b64decode(json.loads(base64_json("/x", "image_data").encode(data))["image_data"]) == data
    wire = form("/x", "file")
    head = f"Content-Type: {wire.headers['Content-Type']}\r\n\r\n".encode()
    (part,) = email.message_from_bytes(head + wire.encode(data), policy=email.policy.HTTP).iter_parts()
    assert part.get_param("name", header="content-disposition") == "file"
    # BentoML opens a picture by its content type.
    assert (part.get_content_type(), part.get_payload(decode=True)) == (kind, data)


@pytest.mark.parametrize("size", [1, 2_000_000])
def test_tritons_header_length_holds_for_every_picture(size: int) -> None:
    wire = triton("classifier")
    body = wire.encode(b"x" * size)
    length = int(wire.headers["Inference-Header-Content-Length"])
    tensor = body[length:]
    assert json.loads(body[:length])["inputs"][0]["parameters"]["binary_data_size"] == len(tensor) == size + 4
    assert int.from_bytes(tensor[:4], "little") == size


def test_the_best_label_is_read_whatever_the_order_and_an_answer_without_one_has_none() -> None:
    assert raw("/x").label({"ants": 0.9, "bees": 0.1}) == "ants"
    assert raw("/x").label({"ants": 0.1, "bees": 0.9}) == "bees"
    assert form("/x", "f").label([{"bees": 0.9}]) == "bees"
    assert triton("m").label({"outputs": [{"name": "label", "data": ["ants"]}]}) == "ants"
    for wire in (raw("/x"), triton("m")):
        for answer in ("{}", "[]", "3"):
            with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
                wire.label(json.loads(answer))
