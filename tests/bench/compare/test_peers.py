"""Which servers there are: two classes, their numbers, their locked packages, loopback alone."""

import base64
import email
import email.policy
import json
import re
import sys
from pathlib import Path

import pytest

from beeline.errors import BeelineError
from bench.compare.peers import (
    DOCUMENTED,
    FOLDER,
    OURS,
    Numbers,
    Peer,
    base64_json,
    choose,
    everything,
    form,
    raw,
    triton,
)
from bench.compare.server import Bench, environ, fields
from bench.pictures import Pictures
from host import ROOT

PEERS = everything("resnet18", 2, Numbers(8, 2, 3, threads=1))
LOCKS = sorted(path.parent.name for path in FOLDER.glob("*/requirements.in"))


def by_name(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "m.mar", "m", "bf16", 2, tmp_path, tmp_path / "config.properties")


def test_names_are_unique_and_classes_are_never_mixed() -> None:
    names = [peer.name for peer in PEERS]
    assert len(set(names)) == len(names)
    kinds = [peer.kind for peer in PEERS]
    assert kinds == sorted(kinds, key=[DOCUMENTED, OURS].index)


def test_every_server_with_our_engine_has_the_same_numbers_and_a_documented_one_no_threads_unless_named() -> None:
    for peer in PEERS:
        if peer.kind == OURS:
            assert (peer.numbers.workers, peer.numbers.threads) == (2, 1)
            assert peer.numbers.batch == (1 if peer.name in ("ours-fastapi", "ours-flask") else 8)
        else:
            assert peer.numbers.threads == (1 if peer.name.endswith("-one-thread") else None)


def test_the_default_is_all_but_the_peers_on_one_thread_and_names_choose_in_the_records_order() -> None:
    names = [peer.name for peer in choose(PEERS, ())]
    assert names[0] == "torchserve"
    assert [name for name in names if name.endswith("-one-thread")] == ["torchserve-one-thread"]
    assert next(name for name in names if name.startswith("ours-")) == "ours-torchserve"
    assert len(names) == 9 + 11
    assert [peer.name for peer in choose(PEERS, ("ours-mms", "litserve"))] == ["litserve", "ours-mms"]
    with pytest.raises(BeelineError, match="did you mean 'litserve'"):
        choose(PEERS, ("litserv",))


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_everything_listens_on_loopback_alone_and_reports_to_nobody(peer: Peer, bench: Bench, tmp_path: Path) -> None:
    values = fields(peer, bench, 23456, tmp_path)
    command = [word.format_map(values) for word in peer.command]
    made = environ(peer, bench, values)
    assert "0.0.0.0" not in " ".join(command) + str(made)
    assert command[0].startswith(f"{values['bin']}/")
    assert made["BENTOML_DO_NOT_TRACK"] == "True"
    assert made["RAY_USAGE_STATS_ENABLED"] == "0"
    if not peer.server:
        assert made["PEER_ENGINE"] == ("beeline" if peer.kind == OURS else "documented")
        assert made.get("OMP_NUM_THREADS") == (None if peer.numbers.threads is None else "1")


def test_command_lines_carry_the_documented_workers_and_the_port(bench: Bench, tmp_path: Path) -> None:
    def line(name: str) -> str:
        values = fields(by_name(name), bench, 23456, tmp_path)
        return " ".join(word.format_map(values) for word in by_name(name).command)

    assert "--host 127.0.0.1 --port 23456" in line("fastapi")
    assert "--workers 2" in line("fastapi")
    assert "-w 4 --bind 127.0.0.1:23456" in line("flask")
    assert "--server mms --gateway nginx --name compare --port 23456" in line("ours-mms-nginx")
    assert "--batch-size 8 --workers 2 --max-batch-delay 3" in line("ours-torchserve")


def test_the_stock_archive_of_few_labels_asks_for_no_more_than_there_are(bench: Bench, tmp_path: Path) -> None:
    stock = by_name("torchserve")
    assert fields(stock, bench, 0, tmp_path)["handler"].endswith("torchserve/few_labels.py")
    many = Bench(bench.archive, "m", "fp32", 1000, bench.model, bench.config_file)
    assert fields(stock, many, 0, tmp_path)["handler"] == "image_classifier"


def test_every_peer_is_locked() -> None:
    assert LOCKS == ["bentoml", "fastapi", "flask", "litserve", "mosec", "pytriton", "ray", "torchserve"]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_has_hashes_and_the_versions_asked_for_and_no_address(name: str) -> None:
    environment, pinned = by_name(name).environment, by_name(name).pinned()
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
    for package, version in pinned.items():
        assert any(line.startswith(f"{package}=={version}") for line in (each.split(" ")[0] for each in lines)), package


DATA = b"\xff\xd8\xff picture \r\n--beeline"


def test_a_picture_is_sent_raw_in_base64_or_as_a_form_that_a_parser_reads() -> None:
    assert raw("/x").encode(DATA) == DATA
    sent = base64_json("/x", "image_data").pictures(Pictures("folder", ("a", "b"), (DATA, b"2")))
    assert sent.names == ("a", "b")
    assert [base64.b64decode(json.loads(body)["image_data"]) for body in sent.bodies] == [DATA, b"2"]
    wire = form("/x", "file")
    head = f"Content-Type: {wire.headers['Content-Type']}\r\n\r\n".encode()
    (part,) = email.message_from_bytes(head + wire.encode(DATA), policy=email.policy.HTTP).iter_parts()
    assert part.get_param("name", header="content-disposition") == "file"
    assert part.get_payload(decode=True) == DATA


@pytest.mark.parametrize("size", [1, 2_000_000])
def test_tritons_header_length_holds_for_every_picture(size: int) -> None:
    wire = triton("classifier")
    body = wire.encode(b"x" * size)
    length = int(wire.headers["Inference-Header-Content-Length"])
    tensor = body[length:]
    assert json.loads(body[:length])["inputs"][0]["parameters"]["binary_data_size"] == len(tensor) == size + 4
    assert int.from_bytes(tensor[:4], "little") == size


def test_the_best_label_is_read_whatever_the_order_and_an_answer_without_one_is_a_value_error() -> None:
    assert raw("/x").read(b'{"ants": 0.9, "bees": 0.1}') == "ants"
    assert raw("/x").read(b'{"ants": 0.1, "bees": 0.9}') == "bees"
    assert form("/x", "f", in_list=True).read(b'[{"bees": 0.9}]') == "bees"
    assert triton("m").read(b'{"outputs": [{"name": "label", "data": ["ants"]}]}') == "ants"
    for wire in (raw("/x"), form("/x", "f", in_list=True), triton("m")):
        for body in (b"", b"no", b"{}", b"[]", b"3"):
            with pytest.raises(ValueError, match=r"label|JSON|Expecting"):
                wire.read(body)
