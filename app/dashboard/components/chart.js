// One figure: plotly.js draws what Python sends. Text from a run arrives as data only, never as part of this script.

export default function (component) {
  const { parentElement, data, setTriggerValue } = component;
  let box = parentElement.querySelector(".depthscope-chart");
  if (!box) {
    box = document.createElement("div");
    box.className = "depthscope-chart";
    parentElement.appendChild(box);
    box.zoom = urlZoom(data.key, 4);
    keepZoom(data.key, box);
  }
  box.setAttribute("role", "figure");  // not an image, whose parts nobody could reach: plotly has buttons in it
  box.setAttribute("tabindex", "0");
  box.setAttribute("aria-label", data.alt);
  const figure = JSON.parse(data.figure);
  // Equal units on both axes: on a narrow page a square map leaves the rest of its height empty.
  const isSquare = Boolean(figure.layout.yaxis?.scaleanchor) && parentElement.clientWidth > 0;
  const isNarrow = parentElement.clientWidth > 0 && parentElement.clientWidth < 420;
  for (const trace of figure.data) placeBar(trace, isNarrow);
  const room = parentElement.clientWidth + (isNarrow ? 100 : 0);  // for the bar
  const height = isSquare ? Math.min(data.height, Math.max(260, room)) : data.height;
  // Both axes of a square have one title; below a map with a bar above it plotly writes it over the cells.
  if (isSquare && isNarrow) delete figure.layout.xaxis.title;
  box.style.height = `${height}px`;
  box.onpointerdown = (event) => {
    if (!event.target.closest(".modebar")) box.focus({ preventScroll: true });  // plotly would keep the arrow keys from it
  };
  offerSkip();
  // An explicit list: plotly.js 4 adds a button by default that sends the chart to its makers' cloud
  const config = { displaylogo: false, responsive: false, showSendToCloud: false, plotlyServerURL: "",
                   modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
                   toImageButtonOptions: { format: "svg", filename: data.name } };
  // Ends of both axes where the visitor has zoomed: [from, to, from, to], null for an axis that shows all.
  const zoomed = (event) => {
    const before = box.zoom ?? [null, null, null, null];
    const ends = ["xaxis", "yaxis"].flatMap((axis, i) => {
      if (event[`${axis}.autorange`]) return [null, null];
      if (event[`${axis}.range[0]`] === undefined && !event[`${axis}.range`]) return before.slice(2 * i, 2 * i + 2);
      const range = box._fullLayout[axis].range.map(Number);
      const full = figure.layout[axis]?.range;
      return full && Math.abs(range[0] - full[0]) + Math.abs(range[1] - full[1]) < 1e-9 ? [null, null] : range;
    });
    box.zoom = ends.some((end) => end !== null) ? ends : null;
    keepZoom(data.key, box);
  };
  const showsSomething = () => figure.data.some((trace, i) => {
    const drawn = box._fullData?.[i];
    if (!drawn || !drawn.y || drawn.visible !== true) return false;
    const [xs, ys] = ["xaxis", "yaxis"].map((axis) => box._fullLayout[axis]);
    const inside = (axis, value) => {
      const place = axis.d2l(value);
      return place >= Math.min(...axis.range) && place <= Math.max(...axis.range);
    };
    if (drawn.z) return drawn.x?.some((x) => inside(xs, x)) && drawn.y.some((y) => inside(ys, y));
    return Array.from(drawn.y).some((y, j) => Number.isFinite(y) && inside(ys, y) && inside(xs, drawn.x[j]));
  });
  load(data.plotly).then((Plotly) => {
    if (!box.isConnected) return;  // the page was left while plotly.js loaded
    const zooms = () => ["xaxis", "yaxis"].flatMap((axis, i) => {
      const [from, to] = box.zoom?.slice(2 * i, 2 * i + 2) ?? [null, null];
      return from === null ? [] : [[axis, [from, to]]];
    });
    const layout = () => {
      const dressed = dress({ ...figure.layout, height, autosize: true }, box);
      // Another revision each time: plotly would bring back a zoom that was given up.
      for (const axis of ["xaxis", "yaxis"]) dressed[axis] = { ...dressed[axis], uirevision: Math.random() };
      for (const [axis, range] of isFirst ? [] : zooms()) Object.assign(dressed[axis], { range, autorange: false });
      return dressed;
    };
    // A zoom of the address comes after the first drawing: what plotly draws first is what a double click goes back to.
    const isFirst = !box._fullLayout;
    const addressed = () => (isFirst && box.zoom
      ? Plotly.relayout(box, Object.fromEntries(zooms().map(([axis, range]) => [`${axis}.range`, range]))) : box);
    // A zoom is one of these axes: of others it would show anything, or nothing.
    if (box.axes !== undefined && box.axes !== data.axes) {
      box.zoom = null;
      keepZoom(data.key, box);
    }
    box.axes = data.axes;
    // react, not newPlot: what is hidden stays hidden when the numbers change
    return Plotly.react(box, coloured(figure.data, box), layout(), config).then(addressed).then(() => {
      if (!box.zoom || showsSomething()) return box;
      box.zoom = null;
      keepZoom(data.key, box);
      return Plotly.react(box, coloured(figure.data, box), layout(), config);
    }).then(() => {
      box.removeAllListeners?.("plotly_click");
      box.removeAllListeners?.("plotly_relayout");
      box.on("plotly_relayout", zoomed);
      box.on("plotly_click", (event) => {
        startAt(event.points[0], box);
        if (data.clickable) setTriggerValue("clicked", { x: event.points[0].x, y: event.points[0].y });
      });
      box.onkeydown = (event) => step(event, box, data.clickable ? setTriggerValue : null);
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

// The title of a colour bar is a line further out than plotly puts it, which is over labels with a sign. On a phone a bar at the
// side takes a third of the map's width: it lies above it.
function placeBar({ colorbar }, isNarrow) {
  const title = colorbar?.title;
  if (title && isNarrow) {
    Object.assign(colorbar, { orientation: "h", x: 0.5, xanchor: "center", y: 1.02, yanchor: "bottom", len: 1 });
    title.side = "top";
  } else if (title?.text) title.text = `<br>${title.text}`;
}

// Left and right go from point to point, up and down to the next curve or row, Enter opens a cell that a click would open.
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };

const traces = (box) => box._fullData.filter((trace) => trace.visible === true && trace.hoverinfo !== "skip");

// The keys go on from the point that was clicked.
function startAt(point, box) {
  const [row, column] = Array.isArray(point.pointNumber)
    ? point.pointNumber
    : [traces(box).findIndex((trace) => trace.index === point.curveNumber), point.pointNumber];
  if (row >= 0) box.depthscopeAt = { row, column, cell: { x: point.x, y: point.y } };
}

function step(event, box, open) {
  if (event.target !== box || event.ctrlKey || event.metaKey || event.altKey) return;
  const drawn = traces(box);
  const at = box.depthscopeAt ?? { row: 0, column: -1 };
  if (event.key in STEPS && drawn.length > 0) {
    event.preventDefault();
    const [up, right] = STEPS[event.key];
    const map = drawn.find((trace) => trace.type === "heatmap");
    const rows = map ? map.z.length : drawn.length;
    const row = Math.min(Math.max(at.row + up, 0), rows - 1);
    const trace = map ?? drawn[row];
    const columns = map ? map.z[row].length : trace.x.length;
    const column = Math.min(Math.max(at.column + right, 0), columns - 1);
    box.depthscopeAt = { row, column };
    const point = map ? [row, column] : column;
    window.Plotly.Fx.hover(box, [{ curveNumber: trace.index, pointNumber: point }]);
    const x = trace.x?.[column] ?? column;
    const y = map ? (trace.y?.[row] ?? row) : trace.y[column];
    // Of a logarithmic map the numbers themselves are the custom data.
    const value = map ? ((map.customdata ?? map.z)[row][column]) : y;
    const words = Number.isFinite(value) ? digits(Number(value)) : "undefined";
    speak(box, map ? `column ${x}, row ${y}: ${words}` : `${trace.name ?? ""}, ${x}: ${words}`);
    if (map) box.depthscopeAt.cell = { x, y };
  } else if (event.key === "Enter" && open && at.cell) {
    event.preventDefault();
    open("clicked", at.cell);
  }
}

// What a screen reader says of the point that the keys have reached.
function speak(box, words) {
  let said = box.parentElement.querySelector(".depthscope-said");
  if (!said) {
    said = document.createElement("div");
    said.className = "depthscope-said";
    said.setAttribute("aria-live", "polite");
    box.parentElement.appendChild(said);
  }
  said.textContent = words;
}

// The first stop of the Tab key: past navigation and controls to the first chart.
function offerSkip() {
  if (document.querySelector(".depthscope-skip")) return;
  const skip = document.createElement("button");
  skip.className = "depthscope-skip";
  skip.textContent = "Skip to the charts";
  skip.onclick = () => document.querySelector(".depthscope-chart, .depthscope-microscope")?.focus();
  document.body.prepend(skip);
}
