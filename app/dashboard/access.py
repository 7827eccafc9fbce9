"""Who may ask the server, and what may its pages do? This machine's own pages; nothing but what the server sends."""

# Any page that is open in the visitor's browser can send requests to 127.0.0.1. Streamlit checks the hosts of its web
# sockets alone, and accepts sockets from every port of this machine; its downloads have no check at all.

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = ["guarded", "policy"]

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
