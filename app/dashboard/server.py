"""How does the dashboard start, and whom does it answer? One server on 127.0.0.1 that sends nothing out."""

from __future__ import annotations

import base64
import gc
import hashlib
import importlib
import re
import socket
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from depthscope.diagnostics.errors import AbsentError, InputError
from depthscope.diagnostics.memory import share_heaps

HOST = "127.0.0.1"
FIRST_PORT = 8501  # Streamlit's own
TRIED_PORTS = 100
# A heuristic of ours: a first start reads streamlit, plotly and xarray from a cold disk.
START_SECONDS = 60.0

# Both themes are given, so that a visitor's choice of light or dark is followed; Streamlit's own red would read as failure.
_LIGHT = {
    "primaryColor": "#35618E",
    "backgroundColor": "#FFFFFF",
    "secondaryBackgroundColor": "#F5F6F8",
    "textColor": "#1D232B",
    "borderColor": "#E2E5EA",
}
_DARK = {
    "primaryColor": "#7FB0DD",
    "backgroundColor": "#12161C",
    "secondaryBackgroundColor": "#1A2029",
    "textColor": "#E4E8EE",
    "borderColor": "#2C3440",
}

CONFIG: dict[str, Any] = {
    # Runs may be confidential: this machine alone is answered, also where it has a public address.
    "server.address": HOST,
    "server.allowedHosts": ["localhost", HOST],
    "server.headless": True,  # `launch` opens the browser, and no question for an e-mail address is asked
    # The code does not change while it runs; a watcher would walk through every imported package, torch among them.
    "server.fileWatcherType": "none",
    "server.runOnSave": False,
    "runner.magicEnabled": False,  # a bare expression in a page is not printed
    "browser.gatherUsageStats": False,
    "client.toolbarMode": "minimal",
    # A reload is a new session; what the old one showed is in its address, and need not be kept for two minutes.
    "server.disconnectedSessionTTL": 10,
    "server.maxUploadSize": 1,  # MB; no page takes files
    "client.showErrorDetails": "type",  # a traceback shows paths of this machine
    "logger.level": "warning",
    "theme.baseRadius": "8px",
    **{f"theme.light.{name}": value for name, value in _LIGHT.items()},
    **{f"theme.dark.{name}": value for name, value in _DARK.items()},
}
"""Options of Streamlit. CORS and XSRF protection are not listed: they are on by default and stay on."""


def launch(
    paths: Sequence[Path], *, port: int | None = None, open_browser: bool = True, max_bytes: int | None = None
) -> None:
    """Show runs in a dashboard at a local address.

    ``paths``: run files, or folders of runs; nothing else can be opened from the dashboard.
    ``port``: port to use; None takes the first free one from 8501.
    ``open_browser``: open the address in the default browser once the server answers.
    Raises InputError: For no path at all, or a port that is taken.
    """
    if not paths:
        raise InputError(
            "no run was given; name a run file or a folder of runs, such as: depthscope dashboard runs"
        )
    for path in paths:
        if not path.exists():
            raise AbsentError(f"{path} does not exist; make a run with: depthscope demo")
    importlib.import_module("streamlit")  # a missing extra is an error before an address is printed
    chosen = free_port(port)
    address = f"http://{HOST}:{chosen}"
    if open_browser:
        # From a thread: this one is about to serve, and the browser must not come before the server answers.
        Thread(target=lambda: webbrowser.open(address) if _answers(address) else None, daemon=True).start()
    _import_pages()  # before the address is printed, so that it answers soon after
    sys.stderr.write(f"dashboard at {address}  (Ctrl-C stops it)\n")
    sys.stderr.flush()
    serve(paths, chosen, max_bytes)


def free_port(port: int | None = None) -> int:
    """A port that no other program listens on: the one that is asked for, or the first free one."""
    if port is not None and not 0 <= port <= 65535:
        raise InputError(f"port {port} is out of range; give one from 1 to 65535, or 0 to take a free one")
    # 0 is how programs ask for a free port.
    wanted = (port,) if port else range(FIRST_PORT, FIRST_PORT + TRIED_PORTS)
    free = next(filter(_is_free, wanted), None)
    if free is None:
        taken = f"port {port} is taken" if port else f"no port from {wanted[0]} to {wanted[-1]} is free"
        raise InputError(f"{taken}; name another one with --port")
    return free


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the server does: a port in TIME_WAIT, of a dashboard that was just stopped, counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _import_pages() -> None:
    """Import all pages before the first visit, and keep what they import out of later searches for garbage."""
    # Streamlit collects garbage after every run of a page: looking at these 200 000 objects again took 0.11 s of every click.
    importlib.import_module("depthscope.app.dashboard.pages")
    gc.collect()
    gc.freeze()


def serve(paths: Sequence[Path], port: int, max_bytes: int | None = None) -> None:
    """Serve the dashboard in this process until it is interrupted."""
    import streamlit as st
    from starlette.middleware import Middleware
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    from depthscope.app.dashboard.components import chart
    from depthscope.app.dashboard.state import run_library

    share_heaps()  # Streamlit runs every page in a thread of its own
    run_library.allow(paths, max_bytes=max_bytes)
    run_library.elsewhere.is_on = True
    # plotly.js of the installed package: its version is the one that made the figure, and no network is needed.
    plotly = StaticFiles(directory=str(files("plotly") / "package_data"))
    # Resolved: in a checkout the package is a link, and Streamlit compares real paths.
    script = Path(__file__).resolve().parent / "navigation" / "entrypoint.py"
    index = Path(str(files("streamlit") / "static" / "index.html"))
    guard = Middleware(guarded, hosts=tuple(CONFIG["server.allowedHosts"]), page_policy=policy(index))
    application = st.App(script, routes=[Mount(chart.PLOTLY_ROUTE, plotly)], middleware=[guard])
    try:
        application.run(config=CONFIG | {"server.port": port})
    finally:
        run_library.elsewhere.stop()


def _answers(address: str) -> bool:
    """Whether the server's health check passes before the time is up."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/_stcore/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False


HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), midi=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Sent with every answer, next to the policy for contents."""

# In 1.59 to 1.67 Streamlit needs: its own scripts; a blob for the script of a component, which it makes from the text that
# Python sends; style sheets that its theme and plotly write into the page; images and fonts as data.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self' blob:",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "media-src": "'self'",
    "connect-src": "'self'",
    "manifest-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
"""What a page may load, by kind; what is not named, frames and plugins among them, it may not."""

_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_PUBLIC = ("/static/", "/depthscope/plotly/")
"""Paths of files of installed packages, which contain nothing of a run and may stay in the browser's cache."""


def policy(page: Path) -> str:
    """Content-Security-Policy under which a page runs its own inline scripts, by their hash, and no other."""
    # Read from the installed version: another one may have another script.
    scripts = _INLINE_SCRIPT.findall(page.read_text(encoding="utf-8"))
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = POLICY | {
        "script-src": " ".join([POLICY["script-src"], *(f"'sha256-{digest}'" for digest in digests)])
    }
    return "; ".join(f"{kind} {sources}" for kind, sources in allowed.items())


def guarded(application: Any, *, hosts: tuple[str, ...], page_policy: str) -> Any:
    """Answer 403 to pages of other sites and names; every answer carries the headers that restrict its page."""
    from starlette.responses import PlainTextResponse

    added = HEADERS | {"Content-Security-Policy": page_policy}

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):  # the start and stop of the server
            await application(scope, receive, send)
            return
        private = not scope["path"].startswith(_PUBLIC)

        async def send_guarded(message: Any) -> None:
            if message["type"] in (
                "http.response.start",
                "websocket.accept",
                "websocket.http.response.start",
            ):
                # What a run contains stays in no cache of the browser.
                cache = {"Cache-Control": "no-store"} if private else {}
                message = message | {"headers": _replaced(message.get("headers", []), added | cache)}
            await send(message)

        reason = _refusal(scope, hosts)
        if not reason:
            await application(scope, receive, send_guarded)
        elif scope["type"] == "http":
            await PlainTextResponse(reason, status_code=403)(scope, receive, send_guarded)
        else:
            # Before the connection is accepted: the server answers 403 to it.
            await send({"type": "websocket.close", "code": 1008, "reason": "another site"})

    return answer


def _refusal(scope: Mapping[str, Any], hosts: tuple[str, ...]) -> str:
    """Why a request is refused; empty for one of this server's own pages, or of a program of this machine."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", [])}
    host = headers.get("host", "")
    # A page of another name that points here (DNS rebinding) comes with that name.
    if host.partition(":")[0] not in hosts:
        return f"this dashboard answers at {hosts[-1]} only"
    origin = headers.get("origin")
    # Programs send no origin; a page sends its own with every socket and every request that changes something.
    if origin is not None and (urlsplit(origin).scheme, urlsplit(origin).netloc) != ("http", host):
        return "this dashboard answers to its own pages only"
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
    # A link on another page may open the dashboard, but no page may load parts of it, as images or scripts.
    if site not in ("none", "same-origin") and mode != "navigate":
        return "this dashboard answers to its own pages only"
    return ""


def _replaced(headers: Any, added: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers of an answer with ours in place of those of the same name."""
    ours = {name.lower().encode(): value.encode() for name, value in added.items()}
    return [(name, value) for name, value in headers if name.lower() not in ours] + list(ours.items())
