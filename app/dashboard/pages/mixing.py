"""What do the connections do to the streams? Gains, spectra and their products."""

from __future__ import annotations

from depthscope.app.dashboard.components.page import Page

PAGE = Page(
    title="Mixing",
    url_path="mixing",
    help="Do the connections keep the signal, amplify it, or average the streams into one?",
    question="mixing",
    missing="None of the chosen runs has streams to mix: plain residual networks add each branch to one stream. "
    "Choose a run of a hyper-connection (HC or mHC) model.",
)
