// What every drawing by plotly.js needs: the library itself, and the theme of the page.

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

// The layout in colours and font of Streamlit's theme, light or dark, which Python does not know. A copy of all of it: plotly
// writes the ends of a zoom into the arrays that it is given.
function dress(given, box) {
  const layout = structuredClone(given);
  const style = getComputedStyle(box);
  const ink = style.getPropertyValue("--st-text-color").trim() || "#333";
  const paper = style.getPropertyValue("--st-background-color").trim() || "#fff";
  const family = style.getPropertyValue("--st-font").trim() || layout.font.family;
  layout.font = { ...layout.font, color: ink, family };
  layout.hoverlabel = { ...layout.hoverlabel, bgcolor: paper, bordercolor: "rgba(128,128,128,.35)",
                        font: { color: ink, family, size: 12 } };
  return layout;
}

// Around zero a map has the colour of the page, and not white, which would glare on a dark one.
const DIVERGING_ON_DARK = [[0, "#8FCBF5"], [0.25, "#2F6C9E"], [0.5, "#252C36"], [0.75, "#A3502F"], [1, "#FFA07A"]];

function coloured(traces, box) {
  const paper = getComputedStyle(box).getPropertyValue("--st-background-color").trim();
  const red = paper.startsWith("#") ? parseInt(paper.slice(1, 3), 16) : Number(paper.match(/\d+/)?.[0] ?? 255);
  return red > 127 ? traces
    : traces.map((trace) => (trace.meta === "diverging" ? { ...trace, colorscale: DIVERGING_ON_DARK } : trace));
}

// The zoom of a chart is in the address of the page, which restores it: "?zoom_NAME=from,to". It is written there without a word to
// the server: a zoom needs nothing from it.
const LARGEST = 1e15;

function urlZoom(name, count) {
  const text = new URLSearchParams(location.search).get(`zoom_${name}`) ?? "";
  const numbers = text.length < 200 ? text.split(",").map((part) => (part === "" ? null : Number(part))) : [];
  const isRange = (low, high) => (low === null && high === null)
    || (low !== null && high !== null && Math.abs(low) < LARGEST && Math.abs(high) < LARGEST && low !== high);
  if (numbers.length !== count || numbers.every((number) => number === null)) return null;
  for (let i = 0; i < count; i += 2) if (!isRange(numbers[i], numbers[i + 1])) return null;
  return numbers;
}

// Streamlit writes the address anew from what it knows of it, so that it is looked at again and again.
const zooms = (window.depthscopeZooms ??= new Map());
window.depthscopeZoomClock ??= setInterval(() => {
  for (const [name, { box, text }] of zooms) {
    if (!box.isConnected) zooms.delete(name);
    else writeZoom(name, text);
  }
}, 300);

function writeZoom(name, text) {
  const address = new URL(location.href);
  if ((address.searchParams.get(`zoom_${name}`) ?? "") === text) return;
  if (text) address.searchParams.set(`zoom_${name}`, text);
  else address.searchParams.delete(`zoom_${name}`);
  history.replaceState(history.state, "", address);
}

function keepZoom(name, box) {
  const short = (number) => (number === null ? "" : String(Number(number.toPrecision(6))));
  const text = box.zoom ? box.zoom.map(short).join(",") : "";
  zooms.set(name, { box, text });
  writeZoom(name, text);
}

// Key g goes to the next chart, with shift to the one before: by Tab there are as many stops before it as the page has fields.
window.depthscopeKeys ??= document.addEventListener("keydown", (event) => {
  const writing = event.target.closest?.("input, textarea, [contenteditable=true], [role=combobox]");
  if (event.key.toLowerCase() !== "g" || writing || event.ctrlKey || event.metaKey || event.altKey) return;
  const charts = [...document.querySelectorAll(".depthscope-chart, .depthscope-panels")];
  if (!charts.length) return;
  event.preventDefault();
  const at = charts.indexOf(document.activeElement);
  const next = event.shiftKey ? (at <= 0 ? charts.length : at) - 1 : (at + 1) % charts.length;
  charts[next].focus();
  charts[next].scrollIntoView({ block: "nearest" });
}) ?? true;
