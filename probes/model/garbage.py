"""When does Python look for garbage? Not while a forward is measured: every look would go through all that we noted so far."""

from __future__ import annotations

import gc

from depthscope.probes.model.while_needed import WhileNeeded


class _Pause:
    was_on = False

    def begin(self) -> None:
        self.was_on = gc.isenabled()
        gc.disable()

    def end(self) -> None:
        if self.was_on:
            gc.enable()


_pause = _Pause()

no_collection = WhileNeeded(_pause.begin, _pause.end)
"""Put the search for cyclic garbage off, in this process; what nothing refers to any more is freed at once all the same.

A complete search goes through every object of the process, a tenth of a second for what torch and xarray alone bring.
It comes when the objects are a quarter more, which the notes on one deep forward are.
"""
