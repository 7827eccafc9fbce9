"""What each thread is in the middle of: forwards in several threads are kept apart."""

from __future__ import annotations

import threading

from depthscope.probes.session.forward import Forward
from depthscope.probes.structure.tape import Tape


class Here(threading.local):
    """The forward that this thread is in the middle of, and its tape where the chains are still to be found."""

    forward: Forward | None = None
    tape: Tape | None = None
    paused = False

    def let_go(self) -> None:
        """Forget a forward that did not end."""
        if self.forward is not None:
            self.forward.let_go()
        self.forward = self.tape = None
