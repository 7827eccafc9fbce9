"""How does a figure stand on a page? Plotly that keeps its zoom, its caption, its table and its CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from depthscope.app.dashboard.components.figure_numbers import numbers_of
from depthscope.app.dashboard.components.markdown import plain
from depthscope.app.drawing.plotly import shrink, to_plotly
from depthscope.app.figures import Figure, FigureKind, Heatmap

__all__ = ["PLOTLY_ROUTE", "card", "clicked_cell", "draw"]

PLOTLY_ROUTE = "/depthscope/plotly"

_CSS = """
.depthscope-chart { width: 100%; outline-offset: 2px; border-radius: 4px; }
.depthscope-chart:focus-visible { outline: 2px solid var(--st-primary-color); }
.depthscope-chart .modebar { opacity: 0; transition: opacity .15s; }
.depthscope-chart:hover .modebar, .depthscope-chart:focus-within .modebar { opacity: 1; }
"""

# Run names reach the browser only as data, never as part of this script.
_JS = """
const SOURCE = "__ROUTE__/plotly.min.js";

function load() {
  if (window.Plotly) return Promise.resolve(window.Plotly);
  window.depthscopePlotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = SOURCE;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("plotly.min.js did not load"));
    document.head.appendChild(script);
  });
  return window.depthscopePlotly;
}

function dress(layout, box) {
  const style = getComputedStyle(box);
  const ink = style.getPropertyValue("--st-text-color").trim() || "#333";
  const paper = style.getPropertyValue("--st-background-color").trim() || "#fff";
  const family = style.getPropertyValue("--st-font").trim() || layout.font.family;
  layout.font = { ...layout.font, color: ink, family };
  layout.hoverlabel = { ...layout.hoverlabel, bgcolor: paper, bordercolor: "rgba(128,128,128,.35)",
                        font: { color: ink, family, size: 12 } };
  return layout;
}

export default function (component) {
  const { parentElement, data, setTriggerValue } = component;
  let box = parentElement.querySelector(".depthscope-chart");
  if (!box) {
    box = document.createElement("div");
    box.className = "depthscope-chart";
    parentElement.appendChild(box);
  }
  box.setAttribute("role", "img");
  box.setAttribute("tabindex", "0");
  box.setAttribute("aria-label", data.alt);
  box.style.height = `${data.height}px`;
  const figure = JSON.parse(data.figure);
  // an explicit list: plotly.js 4 adds a button by default that sends the chart to its makers' cloud
  const config = { displaylogo: false, responsive: false, showSendToCloud: false, plotlyServerURL: "",
                   modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
                   toImageButtonOptions: { format: "svg", filename: data.name } };
  load().then((Plotly) => {
    if (!box.isConnected) return;
    const layout = dress({ ...figure.layout, height: data.height, autosize: true }, box);
    return Plotly.react(box, figure.data, layout, config).then(() => {
      box.removeAllListeners?.("plotly_click");
      if (data.clickable) {
        box.on("plotly_click", (event) => {
          const point = event.points[0];
          setTriggerValue("clicked", { x: point.x, y: point.y });
        });
      }
      if (!box.depthscopeResize) {
        box.depthscopeResize = new ResizeObserver(() => {
          if (box.isConnected && box.clientWidth > 0) Plotly.Plots.resize(box);
        });
        box.depthscopeResize.observe(parentElement);
      }
    });
  }).catch((error) => { box.textContent = error.message; });
  return () => {
    box.depthscopeResize?.disconnect();
    box.depthscopeResize = null;
    window.Plotly?.purge(box);
  };
}
""".replace("__ROUTE__", PLOTLY_ROUTE)

_plot = st.components.v2.component("depthscope_chart", css=_CSS, js=_JS, isolate_styles=False)


def draw(
    figure: Figure,
    *,
    key: str,
    height: int = 300,
    clickable: bool = False,
    mark: tuple[float, float] | None = None,
    runs: Sequence[str] = (),
) -> Any:
    """Draw a figure with plotly, with its alt text for screen readers.

    Parameters
    ----------
    figure : Lines or Heatmap
        What to draw.
    key : str
        Widget key; the zoom lives as long as it does.
    height : int
        Pixels.
    clickable : bool
        Whether clicks come back.
    mark : tuple of float or None
        Cell to ring.
    runs : sequence of str
        Runs of the page, in the order of their colours.

    Returns
    -------
    ComponentResult
        Its `clicked` is {"x", "y"} after a click, else None.
    """
    data = {
        "name": figure.name,
        "figure": to_plotly(figure, mark=mark, runs=runs).to_json(),
        "alt": figure.alt,
        "height": height,
        "clickable": clickable,
    }
    return _plot(data=data, key=key, on_clicked_change=lambda: None)


def clicked_cell(key: str) -> tuple[float, float] | None:
    """Cell of a clickable heat map that was clicked last.

    Parameters
    ----------
    key : str
        Key given to `draw`.

    Returns
    -------
    tuple of float or None
        (x, y).
    """
    state = st.session_state.get(key)
    clicked = state.get("clicked") if state is not None else None
    return (float(clicked["x"]), float(clicked["y"])) if clicked else None


def card(
    figure: Figure,
    *,
    key: str,
    height: int = 300,
    clickable: bool = False,
    mark: tuple[float, float] | None = None,
    runs: Sequence[str] = (),
) -> Any:
    """A figure with its title, caption, and its numbers as a table and a CSV file.

    Parameters
    ----------
    figure : Lines or Heatmap
        What to show.
    key : str
        Widget key.
    height : int
        Pixels of the plot.
    clickable : bool
        Whether clicks come back.
    mark : tuple of float or None
        Cell to ring.
    runs : sequence of str
        Runs of the page, in the order of their colours.

    Returns
    -------
    ComponentResult
        As `draw`.
    """
    shown = shrink(figure) if isinstance(figure, Heatmap) else figure
    with st.container(border=True, gap="xsmall"):
        left, right = st.columns([4, 1], vertical_alignment="center")
        left.markdown(f"**{plain(shown.title)}**")
        with right, st.container(horizontal=True, horizontal_alignment="right"):
            _numbers(figure, key)
        result = draw(shown, key=key, height=height, clickable=clickable, mark=mark, runs=runs)
        st.caption(plain(shown.caption))
    return result


def _numbers(figure: Figure, key: str) -> None:
    """The table behind a figure, with its download."""
    with st.popover("Numbers", type="tertiary", width="content"):
        table = numbers_of(figure)
        st.dataframe(table, hide_index=True, height=320, width=620)
        st.download_button(
            "Download CSV",
            table.to_csv(index=False).encode(),
            file_name=f"{figure.name}.csv",
            mime="text/csv",
            key=f"{key}_csv",
            on_click="ignore",
        )


def build(kind: FigureKind, analyses: Any, selection: dict[str, Any]) -> Figure:
    """Figure of a kind, with those choices of a selection that it uses.

    Parameters
    ----------
    kind : FigureKind
        What to build.
    analyses : mapping
        Run name → analysis.
    selection : dict
        Choices of all controls of the page.

    Returns
    -------
    Lines or Heatmap
    """
    return kind.build(analyses, **{name: value for name, value in selection.items() if name in kind.uses})
