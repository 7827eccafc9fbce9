// One figure: plotly.js draws what Python sends. Text from a run arrives as data only, never as part of this script.

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
