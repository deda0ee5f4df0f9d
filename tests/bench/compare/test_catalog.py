"""Which servers there are: two classes, their numbers, loopback alone."""

from pathlib import Path

import pytest

from beeline.errors import BeelineError
from bench.compare import catalog
from bench.compare.peer import DOCUMENTED, OURS, Bench, Numbers, Peer
from bench.compare.process import Place, Process
from bench.compare.stock import pack, properties

OURS_NUMBERS = Numbers(8, 2, 3, threads=1)
PEERS = catalog.everything("resnet18", 2, OURS_NUMBERS)


def by_name(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


def process(name: str) -> Process:
    peer = by_name(name)
    assert isinstance(peer, Process)
    return peer


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(Path("/env/bin/python"), 23456, tmp_path, Path("/peers/some"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "m.mar", "m", "bf16", 2, tmp_path, tmp_path / "config.properties")


def test_names_are_unique_and_classes_are_never_mixed() -> None:
    names = [peer.name for peer in PEERS]
    assert len(set(names)) == len(names)
    kinds = [peer.kind for peer in PEERS]
    assert kinds == sorted(kinds, key=[DOCUMENTED, OURS].index)
    assert all((peer.kind == OURS) == peer.name.startswith("ours-") for peer in PEERS)


def test_every_server_with_our_engine_has_the_same_numbers_as_far_as_it_batches() -> None:
    for peer in PEERS:
        if peer.kind == OURS:
            assert peer.numbers.workers == 2
            assert peer.numbers.threads == 1
            assert peer.numbers.batch == (1 if peer.name in ("ours-fastapi", "ours-flask") else 8)


def test_a_server_as_documented_gets_no_threads_unless_its_name_says_so() -> None:
    for peer in PEERS:
        if peer.kind == DOCUMENTED:
            assert peer.numbers.threads == (1 if peer.name.endswith("-one-thread") else None)


def test_the_default_is_all_but_the_peers_on_one_thread() -> None:
    names = [peer.name for peer in catalog.choose(PEERS, ())]
    assert names[0] == "torchserve"
    assert [name for name in names if name.endswith("-one-thread")] == ["torchserve-one-thread"]
    assert next(name for name in names if name.startswith("ours-")) == "ours-torchserve"
    assert len(names) == 9 + 11


def test_servers_are_chosen_by_name_in_the_catalogs_order() -> None:
    assert [peer.name for peer in catalog.choose(PEERS, ("ours-mms", "litserve"))] == ["litserve", "ours-mms"]
    with pytest.raises(BeelineError, match="did you mean 'litserve'"):
        catalog.choose(PEERS, ("litserv",))


@pytest.mark.parametrize("peer", [peer for peer in PEERS if isinstance(peer, Process)], ids=lambda peer: peer.name)
def test_everything_listens_on_loopback_alone_and_reports_to_nobody(peer: Process, place: Place, bench: Bench) -> None:
    (bench.model / "classifier.mar").write_bytes(b"")
    command = peer.command(place, peer.numbers, bench)
    environ = peer.environ(place, bench)
    told = " ".join(command) + str(environ)
    assert "0.0.0.0" not in told
    assert environ["BENTOML_DO_NOT_TRACK"] == "True"
    assert environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environ["PEER_ENGINE"] == ("beeline" if peer.kind == OURS else "documented")
    assert environ.get("OMP_NUM_THREADS") == (None if peer.numbers.threads is None else "1")
    assert command[0].startswith("/env/bin/")


def test_command_lines_carry_the_documented_workers(place: Place, bench: Bench) -> None:
    uvicorn = process("fastapi").command(place, process("fastapi").numbers, bench)
    assert uvicorn[uvicorn.index("--workers") + 1] == "2"
    gunicorn = process("flask").command(place, process("flask").numbers, bench)
    assert gunicorn[gunicorn.index("-w") + 1] == "4"
    assert "127.0.0.1:23456" in gunicorn
    assert process("mosec").variables(place, process("mosec").numbers, bench)["MOSEC_ADDRESS"] == "127.0.0.1"


def test_precision_is_the_archives_with_our_engine_only(bench: Bench) -> None:
    assert by_name("ours-ray").precision(bench) == by_name("ours-torchserve").precision(bench) == "bf16"
    assert by_name("ray").precision(bench) == "fp32 TorchScript"


def test_the_stock_server_is_on_loopback_with_its_numbers(place: Place) -> None:
    values = properties(place, Numbers(8, 2, 50))
    addresses = [value for key, value in values.items() if key.endswith("_address")]
    assert len(addresses) == 5
    assert all("127.0.0.1" in value for value in addresses)
    assert '"batchSize": 8' in values["models"]


def test_the_stock_archive_of_few_labels_asks_for_no_more_than_there_are(bench: Bench) -> None:
    assert any(
        word.endswith("few_labels.py") for word in pack(Path("/env/bin/python"), bench, Path("/peers/torchserve"))
    )
    many = Bench(bench.archive, "m", "fp32", 1000, bench.model, bench.config_file)
    assert "image_classifier" in pack(Path("/env/bin/python"), many, Path("/peers/torchserve"))
