"""Who is answered, and what do answers forbid? Asked without a server, and of the real one with its pages."""

from __future__ import annotations

import asyncio
import http.client
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from depthscope.app.dashboard.server import CONFIG, HEADERS, free_port, guarded, launch, policy

HOSTS = ("localhost", "127.0.0.1")
OWN = "127.0.0.1:8501"


def ask(kind: str = "http", path: str = "/", **headers: str) -> list[dict]:
    """What a guarded application sends for one request; `sec_fetch_site` is the header `sec-fetch-site`."""
    sent: list[dict] = []

    async def application(scope, receive, send) -> None:
        await send(
            {"type": "websocket.accept" if kind == "websocket" else "http.response.start", "status": 200}
        )

    async def receive() -> dict:
        return {"type": f"{kind}.request"}

    async def send(message) -> None:
        sent.append(message)

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "headers": given, "method": "GET"}
    asyncio.run(guarded(application, hosts=HOSTS, page_policy="default-src 'none'")(scope, receive, send))
    return sent


def is_answered(sent: list[dict]) -> bool:
    return sent[0]["type"] == "websocket.accept" or sent[0].get("status") == 200


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
        {},
        {"host": OWN, "origin": "http://evil.example"},
        {"host": OWN, "origin": "null"},
        {"host": OWN, "origin": ""},
        {"host": OWN, "origin": "https://127.0.0.1:8501"},
        {"host": OWN, "origin": "http://127.0.0.1:3000"},  # another program of this machine
        {"host": OWN, "origin": "http://localhost:8501"},
        {"host": OWN, "origin": "http://127.0.0.1:8501@evil.example"},
        {"host": OWN, "sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"host": OWN, "sec_fetch_site": "same-site", "sec_fetch_mode": "cors"},
    ],
)
def test_other_sites_are_refused(kind, headers):
    assert not is_answered(ask(kind, **headers))


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "headers",
    [
        {"host": OWN},
        {"host": "localhost:9000", "origin": "http://localhost:9000"},
        {"host": OWN, "origin": f"http://{OWN}", "sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"},
        {"host": OWN, "sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"},  # a link
    ],
)
def test_own_pages_and_links_are_answered(kind, headers):
    assert is_answered(ask(kind, **headers))


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_every_answer_carries_the_headers(kind):
    sent = dict(ask(kind, host=OWN)[0]["headers"])
    for name, value in HEADERS.items():
        assert sent[name.lower().encode()] == value.encode()
    assert sent[b"content-security-policy"] == b"default-src 'none'"
    assert sent[b"cache-control"] == b"no-store"
    assert b"cache-control" not in dict(ask(path="/static/js/a.js", host=OWN)[0]["headers"])
    assert dict(ask(host="evil.example")[0]["headers"])[b"x-content-type-options"] == b"nosniff"


def test_the_policy_names_the_inline_scripts_of_the_installed_page(tmp_path):
    page = tmp_path / "index.html"
    page.write_text("<script>a</script><script src=x></script><script>b</script>")
    scripts = next(part for part in policy(page).split("; ") if part.startswith("script-src"))
    assert scripts.count("'sha256-") == 2
    assert "unsafe" not in scripts


# --- the server that is started ---


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/streams", "/nowhere", "/_stcore/health", "/_stcore/host-config", "/media/absent.csv"),
        *("/depthscope/plotly/plotly.min.js", "/..%2f..%2fetc%2fpasswd", "//evil.example/"),
    ],
)
def test_every_path_of_the_server_has_the_headers(path, address):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    for name, value in HEADERS.items():
        assert answer.getheader(name) == value
    assert "default-src 'none'" in answer.getheader("Content-Security-Policy")
    assert b"root:x:0" not in body


def test_a_socket_of_another_page_is_refused(address):
    url = address.replace("http", "ws") + "/_stcore/stream"
    for origin in ("http://evil.example", "http://localhost:3000", "http://127.0.0.1:1", "null"):
        with pytest.raises(InvalidStatus, match="403"), connect(url, origin=origin):
            pass
    with connect(url, origin=address) as socket:
        headers = socket.response.headers
        assert headers["X-Content-Type-Options"] == "nosniff"


# --- the launch


def test_the_server_is_local_and_silent():
    assert CONFIG["server.address"] == "127.0.0.1"
    assert CONFIG["server.allowedHosts"] == ["localhost", "127.0.0.1"]
    assert CONFIG["browser.gatherUsageStats"] is False
    assert CONFIG["server.fileWatcherType"] == "none"
    assert not {"server.enableCORS", "server.enableXsrfProtection"} & set(CONFIG)


def test_the_dashboard_needs_no_torch():
    package = "depthscope.app.dashboard"
    code = f"import sys, {package}.server, {package}.components.page; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_taken_port_is_refused_and_a_free_one_is_found():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is taken"):
            free_port(port)
    assert free_port(port) == port
    assert free_port() >= 8501


def test_a_launch_without_runs_or_on_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run was given"):
        launch([])
    with pytest.raises(FileNotFoundError, match="absent does not exist; make a run with"):
        launch([tmp_path / "absent"])
