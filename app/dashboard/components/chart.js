// One figure: plotly.js draws what Python sends. Text from a run arrives as data only, never as part of this script.

// All charts of a page share one copy of plotly.js, from this server: the page must work without a network.
function load(source) {
  if (window.Plotly) return Promise.resolve(window.Plotly);
  window.depthscopePlotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = source;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("plotly.min.js did not load"));
    document.head.appendChild(script);
  });
  return window.depthscopePlotly;
}

// Colours and font of Streamlit's theme, light or dark, which Python does not know.
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
  // An explicit list: plotly.js 4 adds a button by default that sends the chart to its makers' cloud
  const config = { displaylogo: false, responsive: false, showSendToCloud: false, plotlyServerURL: "",
                   modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
                   toImageButtonOptions: { format: "svg", filename: data.name } };
  load(data.plotly).then((Plotly) => {
    if (!box.isConnected) return;  // the page was left while plotly.js loaded
    const layout = dress({ ...figure.layout, height: data.height, autosize: true }, box);
    // react, not newPlot: with the same uirevision it keeps the zoom when the numbers change
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
