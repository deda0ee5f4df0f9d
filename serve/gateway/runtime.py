"""The gateway's runtime folder: settings, page, error bodies, and nginx's configuration from `frontend/nginx`."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from beeline.errors import Undetermined
from host import ROOT
from host.files import write_json, write_whole
from serve.gateway.settings import CLASSES, Backend, Settings
from serve.instance import AUDIT
from serve.ports import Address

PAGE = ROOT / "frontend"
# In the runtime folder, as in `frontend/nginx`: nginx listens on the one, `serve.gateway.adapter` on the other.
GATEWAY_SOCKET, ADAPTER_SOCKET = "gateway.sock", "adapter.sock"
# The gateway's own errors, in the shape of the workers' errors: for each status a type and one sentence.
ERRORS = {
    400: ("BadRequest", "the request is not valid HTTP/1.1; send it with a common client"),
    401: ("Unauthorized", "a change needs the token of BEELINE_MANAGEMENT_TOKEN: -H 'Authorization: Bearer TOKEN'"),
    403: (
        "Forbidden",
        "management is for curl on this machine, and for the addresses in BEELINE_MANAGEMENT_FROM; feedback is for "
        "a browser on this machine, or with a token (BEELINE_FEEDBACK_TOKEN) for anybody who sends it",
    ),
    404: ("NotFound", "nothing has this address; send a picture to /predictions/MODEL, /catalog.json lists the models"),
    405: ("MethodNotAllowed", "this address does not take that method; the Allow header names those that it takes"),
    408: ("RequestTimeout", "the request did not arrive in time; send it without pauses of ten seconds"),
    409: ("SeveralBackends", "several backends share this address; run `beeline serve scale` in the container of one"),
    412: ("PreconditionFailed", "the request's condition does not hold; send it without If-Match"),
    413: ("TooManyBytes", "the request is larger than a picture of {max_image} bytes; send a smaller one"),
    414: ("UriTooLong", "the address is too long; /catalog.json lists the models"),
    416: ("NoSuchRange", "the file is shorter than that range; ask for all of it"),
    429: ("TooManyRequests", "the server holds as many requests as it can; try again after Retry-After seconds"),
    500: ("GatewayError", "the gateway failed; its log says why"),
    501: ("NotImplemented", "the request has a transfer encoding other than chunked; send it without one"),
    502: ("BadGateway", "the server broke the connection; try again"),
    503: ("NotReady", "the server is not ready; /ping says why, try again after Retry-After seconds"),
    504: ("DeadlineExceeded", "there was no answer within {deadline} seconds; try again when the server is less busy"),
    505: ("HttpVersion", "this version of HTTP is not supported; use HTTP/1.1"),
}


def lay_out(settings: Settings) -> None:
    """Write everything that the gateway reads except the catalog, which `serve.gateway.catalog` writes afterwards.

    Everybody may read what nginx's workers read: where root starts nginx, its workers run as nobody. It raises
    Undetermined, with nginx's own words, when nginx refuses its configuration.
    """
    settings.logs.mkdir(parents=True, exist_ok=True)
    settings.folder.mkdir()
    for name in ("state/closed", "errors", "settings", "temporary"):
        (settings.folder / name).mkdir(parents=True)
    not_shown = shutil.ignore_patterns("nginx", "screenshot.png")
    shutil.copytree(PAGE, settings.web, ignore=not_shown, copy_function=shutil.copyfile)
    for status, (kind, sentence) in ERRORS.items():
        message = sentence.format(max_image=settings.max_image, deadline=settings.deadline)
        text = json.dumps({"code": status, "type": kind, "message": message})
        (settings.folder / "errors" / f"{status}.json").write_text(text, encoding="utf-8")
    write_state(settings, ready=False, text=json.dumps({"status": "Unhealthy", "reason": "starting", "models": {}}))
    open_to_all(settings.folder)
    # Links, because a path may have characters with a meaning in nginx's configuration.
    (settings.folder / "logs").symlink_to(settings.logs.absolute())
    (settings.folder / AUDIT).symlink_to(settings.logs.parent.absolute() / AUDIT)
    if settings.tls is not None:
        (settings.folder / "certificate.pem").symlink_to(settings.tls.certificate)
        (settings.folder / "key.pem").symlink_to(settings.tls.key)
    settings.save()
    description = json.loads((PAGE / "nginx" / "openapi.json").read_text(encoding="utf-8"))
    paths = {path: of for path, of in description["paths"].items() if getattr(settings, of.pop("x-needs", "listen"))}
    write_json(settings.folder / "description.json", {**description, "paths": paths}, 0o644)
    for path in (PAGE / "nginx").glob("*.conf"):
        shutil.copyfile(path, settings.folder / path.name)
    for name, lines in _files(settings).items():
        _write(settings, name, lines)
    write_backends(settings, [backend.inference for backend in settings.backends], settings.backends)
    check = [*command(settings), "-t", "-q"]
    # Without a terminal, so that a key with a passphrase fails here and asks nobody for it.
    test = subprocess.run(
        check, cwd=settings.folder, stdin=subprocess.DEVNULL, start_new_session=True, capture_output=True, text=True
    )
    if test.returncode:
        raise Undetermined(f"nginx refuses its configuration: {test.stderr.strip()}; see {settings.folder}")


def command(settings: Settings) -> list[str]:
    """Return the command line that runs nginx in the foreground."""
    folder = settings.folder
    return [settings.program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(settings.error_log)]


def write_state(settings: Settings, ready: bool, text: str, closed: AbstractSet[str] = frozenset()) -> None:
    """Write what `/ping` answers, and take predictions except those of `closed`; none where neither is given."""
    (settings.state / "closed").mkdir(parents=True, exist_ok=True)
    open_to_all(settings.state)
    if ready or closed:
        # Before `/ping` answers 200, so that nobody who sees that is refused.
        _open(settings, closed)
    write_ping(settings, ready, text)
    if not ready and not closed:
        (settings.state / "open").unlink(missing_ok=True)


def lost(settings: Settings, ready: bool, closed: bool) -> Path | None:
    """Return what of the state, or of nginx's folders, somebody has removed."""
    needed = [settings.state / ("ready" if ready else "unready"), settings.folder / "temporary" / "bodies"]
    needed += [settings.state / "closed", *([settings.state / "open"] if ready or closed else [])]
    return next((path for path in needed if not path.exists()), None)


def write_ping(settings: Settings, ready: bool, text: str) -> None:
    """Write what `/ping` answers: 200 or 503, and the text; one of the two files exists at every moment."""
    write_whole(settings.state / ("ready" if ready else "unready"), text + "\n", 0o644)
    if not ready:
        (settings.state / "ready").unlink(missing_ok=True)


def _open(settings: Settings, closed: AbstractSet[str]) -> None:
    folder = settings.state / "closed"
    before = {path.name for path in folder.iterdir()}
    for name in closed - before:
        (folder / name).touch(0o644)
    (settings.state / "open").touch(0o644)
    for name in before - closed:
        (folder / name).unlink()


def open_to_all(folder: Path) -> None:
    """Let everybody read a folder and everything below it, whatever the umask is."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def write_backends(settings: Settings, members: Sequence[str], known: Sequence[Backend]) -> None:
    """Write which backends share the load, and which one management is for; nginx reads it at its next reload.

    Only the prober decides which backends are in the group: nginx by itself would take a server out for ten seconds
    after one broken connection, and refuse everybody if that was the last one.
    """
    hosts = [url.removeprefix("http://") for url in members]
    # A group must not be empty; nginx never connects to this address.
    none = ["server 127.0.0.1:1 down;"]
    # Where no server has room, nginx logs the group's name as the address; it does so too once it has tried them all.
    full = f'"~^([^,]+, ){{0,{max(1, len(members)) - 1}}}predictions(_[0-9]+)?$" 1;'
    blocks = {"map $upstream_addr $full": [full, 'default "";']}
    # A group for each class of bodies, so that each has its own places.
    for size in CLASSES:
        group, held = f"predictions_{size}", min(settings.in_flight, settings.places.get(size, settings.in_flight))
        servers = [f"server {host} max_conns={held} max_fails=0;" for host in hosts] or none
        blocks[f"upstream {group}"] = [f"zone {group} 128k;", "least_conn;", *servers, "keepalive 64;"]
    if settings.name:
        # Without a limit, so that the page gets its catalog however busy the backends are.
        blocks["upstream catalog"] = [f"server {host} max_fails=0;" for host in hosts] or none
    _write(settings, "upstream.conf", [line for name, lines in blocks.items() for line in _block(name, lines)])

    held = settings.in_flight * max(1, len(known))
    # Requests that still arrive count too, so one address may send twice as many as the servers hold.
    of_address = [f"limit_conn address {2 * held};", f"limit_req zone=rate burst={2 * held} nodelay;"]
    free = shutil.disk_usage(settings.folder).free
    # Large bodies that arrive may fill half of the free space; middling ones, of at most a megabyte, a quarter.
    places = [*_places("large", free // 2 // settings.max_body), *_places("middling", free // 4 // 1_000_000)]
    _write(settings, "admission.conf", [*of_address, *places])
    # The gateway proxies the catalog of backends on other hosts; any other catalog is files.
    _write(settings, "catalog.conf", [*of_address, "include catalog.conf;"] if settings.name else [])
    _write(settings, "management.conf", _management(settings, known))


def _files(settings: Settings) -> dict[str, list[str]]:
    """Return the lines of each file of settings, by its name."""
    tls, deadline = settings.tls, settings.deadline
    limited = "$limited" if settings.adapter else "$binary_remote_addr"
    again, connect, send = min(5000, 200 * deadline), min(2000, 100 * deadline), min(5000, 100 * deadline)
    listen = [f"listen {_at(address)} backlog=1024;" for address in settings.listen]
    if tls is not None:
        # nginx before 1.25.1 refuses the directive; later versions warn of the parameter.
        has_directive = tuple(map(int, settings.version.split("."))) >= (1, 25, 1)
        listen += [
            f"listen {_at(tls.address)} ssl{'' if has_directive else ' http2'} backlog=1024;",
            *(["http2 on;"] if has_directive else []),
            "ssl_certificate certificate.pem;",
            "ssl_certificate_key key.pem;",
            "ssl_protocols TLSv1.2 TLSv1.3;",
            "ssl_session_cache shared:tls:2m;",
        ]
    # The catalog is kept for a day after the last request, so that it outlives the backends.
    cache = (
        "proxy_cache_path temporary/catalog keys_zone=catalog:1m max_size=64m inactive=1d use_temp_path=off levels=1;"
    )
    # Without versions, the server would answer for any version with the one that it has.
    only = {} if settings.versions else {re.escape(name): re.escape(one) for name, one in settings.defaults.items()}
    others = [f'"~^/predictions/{name}/(?!{version}\\z)" 1;' for name, version in only.items()]
    # What a backend's own gateway answers without its server: too many requests, a broken connection, not ready.
    of_gateways = " http_429 http_502 http_503" if settings.name else ""
    # Parts of the configuration that are on, in the order of nginx's rewrites.
    names = {"adapter": settings.adapter, "url": settings.url_hosts, "kserve": settings.kserve}
    names |= {"server_routes": settings.server_routes, "feedback": settings.feedback}
    # SageMaker's name of a prediction.
    invocations = [
        "if ($request_method != POST) { return 405; }",
        f"rewrite ^ /predictions/{settings.invocations} last;",
    ]
    # Who changes something through management; empty is refused.
    proof = f"Bearer {settings.management_token}" if settings.management_token else ""
    who = ['default "";', "~^GET reader;", f'"~ {proof}\\z" token;'] if proof else ["default anybody;"]
    # As long as the adapter may take: fetch a picture, and wait for the gateway's own answer.
    adapter = {"adapter.conf": [f"proxy_read_timeout {settings.url_seconds + deadline + 5}s;"]}
    return {
        "process.conf": [
            f"worker_processes {settings.processes};",
            # After a reload the old workers answer their requests; a gateway that stops gives them less time.
            f"worker_shutdown_timeout {deadline + 5}s;",
            *_user(),
        ],
        "zones.conf": [
            f"limit_req_zone {limited} zone=rate:2m rate={settings.per_second}r/s;",
            *(["include adapter_maps.conf;"] if settings.adapter else []),
            *([cache] if settings.name else []),
            *_block('map "$request $http_authorization" $who', who),
            *_block("map $uri $other_version", ["default 0;", *others]),
        ],
        "listen.conf": listen,
        "limits.conf": [
            f"client_max_body_size {settings.max_body};",
            # The sum of the four is the deadline: how late another try may begin, its connection, a pause while its
            # body is sent, its answer. A first try without an answer ends earlier, and no other begins after it.
            f"proxy_next_upstream_timeout {again}ms;",
            f"proxy_connect_timeout {connect}ms;",
            f"proxy_send_timeout {send}ms;",
            f"proxy_read_timeout {1000 * deadline - again - connect - send}ms;",
            *(f"include {name}.conf;" for name, on in names.items() if on),
        ],
        "invocations.conf": _block("location = /invocations", invocations) if settings.invocations else [],
        "retry.conf": [f"proxy_next_upstream error timeout non_idempotent{of_gateways};"],
        **(adapter if settings.adapter else {}),
    }


def _places(size: str, count: int) -> list[str]:
    """Limit how many bodies of a size lie in the temporary folder at once: of all addresses, and half of it of each."""
    # nginx takes numbers up to 65535.
    places = min(65_535, max(4, count))
    return [f"limit_conn {size} {places};", f"limit_conn {size}_of {places // 2};"]


def _management(settings: Settings, known: Sequence[Backend]) -> list[str]:
    if settings.management is None:
        return []
    # With several backends the listener cannot know which one is meant.
    one = known[0].management if len(known) == 1 else ("several" if known else "none")
    allowed = [f"allow {address};" for address in settings.management_from]
    allowed += ["deny all;"] if allowed else []
    lines = [f"listen {_at(settings.management)};", *allowed, f"set $management {one};", "include management.conf;"]
    return _block("server", lines)


def _block(name: str, lines: Iterable[str]) -> list[str]:
    return [f"{name} {{", *(f"    {line}" for line in lines), "}"]


def _write(settings: Settings, name: str, lines: Iterable[str]) -> None:
    # Some hold a token; nginx reads them as the user who starts it.
    write_whole(settings.folder / "settings" / name, "".join(f"{line}\n" for line in lines), 0o600)


def _user() -> list[str]:
    """Name the user that nginx's workers run as, where root starts nginx."""
    if os.geteuid() != 0:
        return []
    nobody = pwd.getpwnam("nobody")
    return [f"user nobody {grp.getgrgid(nobody.pw_gid).gr_name};"]


def _at(address: Address) -> str:
    """Return host and port in nginx's notation."""
    return str(address).partition("://")[2]
