"""A visitor without a browser: opens a page of the dashboard by its web socket, and measures the server's memory."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import urlsplit

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.util import calc_hash
from websockets.sync.client import ClientConnection, connect


class Visitor:
    """One open page: a session of its own on the server."""

    def __init__(self, address: str):
        host = urlsplit(address).netloc
        self._socket: ClientConnection = connect(
            f"ws://{host}/_stcore/stream",
            subprotocols=["streamlit"],
            origin=address,
            max_size=None,
            open_timeout=120,
        )

    def open(self, page: str = "", query: str = "", *, seconds: float = 300) -> list[ForwardMsg]:
        """Ask for a page and wait until it is drawn.

        Returns
        -------
        list of ForwardMsg
            All that the server sent.
        """
        message = BackMsg()
        message.rerun_script.query_string = query
        message.rerun_script.page_script_hash = calc_hash(page)
        self._socket.send(message.SerializeToString())
        return self._until_finished(seconds)

    def _until_finished(self, seconds: float) -> list[ForwardMsg]:
        found: list[ForwardMsg] = []
        end = time.monotonic() + seconds
        while True:
            data = self._socket.recv(timeout=max(end - time.monotonic(), 0.01))
            message = ForwardMsg()
            message.ParseFromString(data)
            found.append(message)
            if message.WhichOneof("type") == "script_finished":
                return found

    def close(self) -> None:
        self._socket.close()


def resident_bytes(process: int) -> int:
    """Memory of a process on this machine (Linux)."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096


def open_files(process: int, below: Path) -> int:
    """Files below a folder that a process has open."""
    count = 0
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            count += str(link.readlink()).startswith(str(below))
        except OSError:
            continue
    return count
