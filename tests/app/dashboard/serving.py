"""A dashboard in a process of its own, and a watch over what its pages do."""

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from depthscope.app.dashboard.server import free_port

ROOT = Path(__file__).parents[3]
CHART = ".depthscope-chart .main-svg, .depthscope-panels .main-svg"


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """The address of a dashboard in a process of its own, killed on every way out."""
    port = free_port()
    code = (
        "import sys; from pathlib import Path; from depthscope.app.dashboard.server import launch; "
        "launch([Path(sys.argv[1])], port=int(sys.argv[2]), open_browser=False)"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(port)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: server.poll() is None and status(port, "/_stcore/health") == 200, 180)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def status(port: int, path: str, host: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path, headers={"Host": host} if host else {})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the dashboard did not answer in time"
        time.sleep(0.2)


class Watch:
    """What a page does while it is open: requests that leave the host, errors of the console."""

    def __init__(self, page, address: str):
        self.outside: list[str] = []
        self.errors: list[str] = []
        self.host = urlsplit(address).netloc
        page.on("request", self.request)
        page.on("websocket", self.request)
        page.on("console", self.console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def request(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self.host:
            self.outside.append(request.url)

    def console(self, message) -> None:
        # below a page's path Streamlit first asks whether its server lives there: a 404 that it expects
        expected = "/_stcore/" in message.location.get("url", "") and "404" in message.text
        if message.type == "error" and not expected:
            self.errors.append(message.text)
