"""What do the connections do to the streams? Gains, spectra and their products."""

from __future__ import annotations

from depthscope.app.dashboard.components.figure_grid import show_figures, show_question
from depthscope.app.dashboard.components.page_style import heading
from depthscope.app.dashboard.state.chosen_runs import desk, explain_missing

heading("Mixing", "Do the connections keep the signal, amplify it, or average the streams into one?")
found = desk()
if found.kinds("mixing"):
    show_question(found, "mixing")
    show_figures(found, "mixing")
else:
    explain_missing(
        "mixing",
        "None of the chosen runs has streams to mix: plain residual networks add each branch to one stream. "
        "Choose a run of a hyper-connection (HC or mHC) model.",
        "depthscope demo",
    )
