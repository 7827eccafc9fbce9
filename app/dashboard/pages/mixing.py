"""What do the connections do to the streams? Products of any two connections, gains, spectra, shares and the depth kernel."""

from __future__ import annotations

import numpy as np
import streamlit as st
import xarray as xr

from depthscope.app.dashboard.components.chart import card
from depthscope.app.dashboard.components.choices import choose_index, choose_one
from depthscope.app.dashboard.components.depth_pane import show_matrices
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.question import show_figures
from depthscope.app.dashboard.state import run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import Heatmap
from depthscope.app.readings.close_up import CloseUp, Matrix
from depthscope.app.text.numbers import number

BENCH = "Composites"


def _show(chosen: ChosenRuns) -> None:
    show_figures(chosen, "mixing", before={BENCH: _show_bench})


def _show_bench(chosen: ChosenRuns) -> None:
    close_ups = {name: run_library.close_up_of(reading) for name, reading in chosen.readings.items()}
    mixing = {name: each for name, each in close_ups.items() if each is not None and each.num_connections}
    if not mixing:
        st.info(
            "None of the chosen runs has the matrices of single tokens: their connections were recorded as sums alone, or "
            "their files have changed. The other parts of this page show what the sums tell.",
            icon="ℹ️",
        )
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        run = choose_one("Run", list(mixing), "mixing_run")
        close_up = mixing[run]
        last = close_up.num_connections - 1
        a = choose_index("From connection a", last, "from_connection", default=0, width=160)
        b = choose_index("to connection b", last, "to_connection", default=last, width=160)
        st.caption("The product H_res(b) ⋯ H_res(a), of every token; for a = b one matrix.", width="content")
    first, last = min(a, b), max(a, b)
    matrices = close_up.matrices(first) if first == last else close_up.composite(first, last)
    if not matrices:
        st.info("The run has no real token: all of it is padding.", icon="ℹ️")
        return
    left, right = st.columns(2, gap="medium")
    with left, st.container(border=True):
        st.markdown(f"**{escaped(_words_of(close_up, first, last))}**")
        st.markdown(escaped(_extreme_words(matrices)))
        show_matrices(matrices, "bench")
    with right:
        card(cells_figure(close_up.mean_matrices, close_up, run), key="mixing_cells", height=430)
        history = run_library.mixing_history_of(chosen.readings[run])
        if history is not None and a < history.sizes["connection"]:
            card(steps_figure(history, a, close_up, run), key="mixing_steps", height=430)


def _words_of(close_up: CloseUp, first: int, last: int) -> str:
    if first == last:
        return f"H_res of {close_up.connection_name(first)}"
    return (
        f"Product of {last - first + 1} H_res, from {close_up.connection_name(first)} "
        f"to {close_up.connection_name(last)}"
    )


def _extreme_words(matrices: list[Matrix]) -> str:
    """What the mean and the extreme token do: the largest sums, and the largest singular value."""
    mean, worst = matrices[0], matrices[-1]
    if not (np.isfinite(mean.h_res).all() and np.isfinite(worst.h_res).all()):
        return "Some of the matrices are not finite: their numbers are undefined."
    words = [
        f"{name}: row sums {_ends(each.row_sums)}, column sums {_ends(each.column_sums)}, largest singular value "
        f"{number(float(np.linalg.norm(each.h_res, 2)))}"
        for name, each in (("Mean over tokens", mean), (worst.of[:1].upper() + worst.of[1:], worst))
    ]
    return ". ".join(words) + "."


def _ends(sums: np.ndarray) -> str:
    return f"{number(float(sums.min()))} to {number(float(sums.max()))}"


def cells_figure(means: np.ndarray, close_up: CloseUp, run: str) -> Heatmap:
    """Every cell of H_res over the connections, the mean over tokens.

    ``close_up``: of the run, for the names of its connections.
    """
    names = [close_up.connection_name(i) for i in range(len(means))]
    return _cells(
        means, np.arange(len(means), dtype=float), names, run,
        name="h_res_cells", title="Cells of H_res over depth", x_label="connection (0 = first sublayer)",
    )  # fmt: skip


def steps_figure(history: xr.DataArray, connection: int, close_up: CloseUp, run: str) -> Heatmap:
    """Every cell of the H_res of one connection over the steps of a training, the mean over tokens.

    ``close_up``: of the run, for the name of the connection.
    """
    steps = history["step"].values if "step" in history.coords else np.arange(history.sizes["step"])
    return _cells(
        history.isel(connection=connection).values, steps.astype(float), [f"step {step}" for step in steps], run,
        name="h_res_steps", title=f"Cells of H_res over steps: {close_up.connection_name(connection)}", x_label="step",
    )  # fmt: skip


def _cells(
    matrices: np.ndarray, x: np.ndarray, names: list[str], run: str, *, name: str, title: str, x_label: str
) -> Heatmap:
    """The cells of some matrices (place, n, n) as rows over the places."""
    n = matrices.shape[-1]
    z = matrices.reshape(len(matrices), n * n).T
    known = z[np.isfinite(z)]
    undefined = z.size - known.size
    ends = f"from {number(float(known.min()))} to {number(float(known.max()))}" if known.size else "undefined"
    gaps = f" {undefined} are undefined, and are gaps." if undefined else ""
    words = f"Run {run}, mean over tokens, {ends}.{gaps} 1/n = {number(1 / n)} everywhere is uniform mixing."
    return Heatmap(
        name=name,
        title=title,
        x=x,
        y=np.arange(n * n, dtype=float),
        z=z,
        x_label=x_label,
        y_label="cell of H_res",
        z_label="",
        caption=words,
        alt=f"{title}: heat map of {n * n} cells at {len(matrices)} places. {words}",
        x_text=names,
        y_text=[f"to {i} from {j}" for i in range(n) for j in range(n)],
        run=run,
        square=False,
        categorical=("y",),
    )


PAGE = Page(
    title="Streams and mixing",
    url_path="mixing",
    help="Do the connections keep the signal, amplify it, or average the streams into one?",
    question="mixing",
    missing="None of the chosen runs has streams to mix: plain residual networks add each branch to one stream. "
    "Choose a run of a hyper-connection (HC or mHC) model.",
    show=_show,
)
