// Panels over one axis, of depth or of steps: a cursor that follows the mouse through all of them, and a pin.
// What can be pinned are places on the axis: depths, or measured steps.
// Text from a run arrives as data only, never as part of this script.

const WAIT = 160;  // milliseconds without another key before a pin is sent: held arrow keys move the line only

export default function (component) {
  const { parentElement, data, setStateValue } = component;
  let box = parentElement.querySelector(".depthscope-panels");
  if (!box) {
    box = document.createElement("div");
    box.className = `depthscope-panels depthscope-${data.name}`;
    box.innerHTML = '<div class="plot"></div><div class="line cursor"></div><div class="line pin"></div>'
                  + '<div class="name"></div>';
    parentElement.appendChild(box);
    box.pinned = {};
    box.zoom = urlZoom(data.name, 2);
    keepZoom(data.name, box);
  }
  const [plot, cursor, pin, name] = box.children;
  box.setAttribute("role", "application");
  box.setAttribute("tabindex", "0");
  box.setAttribute("aria-label", data.alt);
  box.style.height = `${data.height}px`;
  box.places = data.places;
  // Until the page repeats the token that was marked here, it repeats earlier ones.
  if (box.marked === data.token) box.marked = undefined;
  else if (box.marked === undefined) box.token = data.token;
  box.names = data.names;
  // What Python pinned last: it does not repeat what was pinned here, so that the figure is not sent again for it.
  if (box.sentByPage !== data.pin && !box.waiting) {
    box.sentByPage = data.pin;
    box.pinned = { depth: data.pin };
  }

  const nearest = (value) => {
    let best = 0;
    box.places.forEach((place, i) => { if (Math.abs(place - value) < Math.abs(box.places[best] - value)) best = i; });
    return best;
  };
  // Position on the page of a place, and the reverse; undefined before plotly has drawn.
  const axis = () => plot._fullLayout?.xaxis;
  const place = (depth) => {
    const x = axis();
    return x && x._offset + ((depth - x.range[0]) / (x.range[1] - x.range[0])) * x._length;
  };
  const depthAt = (event) => {
    const x = axis();
    if (!x) return null;
    const share = (event.clientX - plot.getBoundingClientRect().left - x._offset) / x._length;
    if (share < -0.02 || share > 1.02) return null;
    return box.places[nearest(x.range[0] + share * (x.range[1] - x.range[0]))] ?? null;
  };
  // The row of the map of tokens that the mouse is on; null elsewhere.
  const rowAt = (event) => {
    const y = data.rows && plot._fullLayout?.[data.rows];
    const row = y ? Math.round(y.p2d(event.clientY - plot.getBoundingClientRect().top - y._offset)) : null;
    return row !== null && row >= Math.min(...y.range) && row <= Math.max(...y.range) ? row : null;
  };
  const put = (line, depth) => {
    const x = axis();
    const left = depth === null || depth === undefined ? undefined : place(depth);
    const shown = left !== undefined && x && left >= x._offset - 1 && left <= x._offset + x._length + 1;
    line.style.display = shown ? "block" : "none";
    if (shown) line.style.left = `${left}px`;
    line.dataset.depth = shown ? depth : "";
    // In the panels alone: across their titles a line would hide letters.
    const panels = shown ? Object.keys(plot._fullLayout).filter((key) => /^yaxis\d*$/.test(key)).map((key) => plot._fullLayout[key]) : [];
    line.replaceChildren(...panels.map(({ _offset, _length }) => {
      const part = document.createElement("i");
      part.style.cssText = `top: ${_offset}px; height: ${_length}px`;
      return part;
    }));
  };
  // Whoever shows what is at a place listens: the pane on the right of the panels.
  const tell = (at) => document.dispatchEvent(new CustomEvent("depthscope-place", {
    detail: { name: data.name, at, pin: box.pinned.depth ?? null } }));
  const show = () => {
    put(pin, box.pinned.depth);
    tell(null);
  };
  const send = (pinned, wait) => {
    box.pinned = pinned;
    show();
    clearTimeout(box.waiting);
    const now = () => { box.waiting = null; setStateValue("pin", { ...box.pinned }); };
    if (wait) box.waiting = setTimeout(now, wait); else now();
  };
  const point = (depth) => {
    put(cursor, depth);
    tell(depth);
    name.style.display = depth === null ? "none" : "block";
    if (depth !== null) {
      name.textContent = box.names ? `${depth}  ${box.names[nearest(depth)]}` : `step ${Math.round(depth)}`;
      name.style.left = `${Math.min(place(depth) + 6, plot.clientWidth - 190)}px`;
    }
  };

  plot.onmousemove = (event) => point(depthAt(event));
  plot.onmouseleave = () => point(null);
  // Before plotly hears of it: it puts a cover over the page as soon as the button is down, which gets the rest.
  box.listening?.abort();
  box.listening = new AbortController();
  const options = { capture: true, signal: box.listening.signal };
  plot.addEventListener("mousedown", (event) => {
    box.pressed = event.target.closest?.(".modebar") ? null : event.clientX;
    if (box.pressed !== null) box.focus({ preventScroll: true });  // plotly would keep the arrow keys from the panels
  }, options);
  window.addEventListener("mouseup", (event) => {
    const pressed = box.pressed ?? null;
    box.pressed = null;
    if (box.waitsToDraw) setTimeout(() => box.draw?.(), 100);  // after plotly has taken up the zoom
    // A drag is a zoom of plotly's.
    if (pressed === null || Math.abs(event.clientX - pressed) > 4) return;
    const depth = depthAt(event);
    if (depth === null) return;
    const token = rowAt(event);
    send({ depth, token }, 0);
  }, options);
  box.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const last = box.places.length - 1;
    const end = { Home: 0, End: last }[event.key];
    const from = box.pinned.depth ?? box.places[last];
    if ((step !== undefined || end !== undefined) && last >= 0) {
      event.preventDefault();
      send({ depth: box.places[Math.min(Math.max(end ?? nearest(from) + step, 0), last)] }, WAIT);
    } else if (data.rows && ["ArrowUp", "ArrowDown"].includes(event.key)) {
      event.preventDefault();
      const at = data.tokens.indexOf(box.token) + (event.key === "ArrowDown" ? 1 : -1);
      const token = data.tokens[Math.min(Math.max(at, 0), data.tokens.length - 1)];
      if (token === box.token) return;
      box.token = box.marked = token;
      send({ ...box.pinned, token: box.token }, WAIT);
    } else if (event.key === "Enter") {
      event.preventDefault();
      if (box.waiting) send(box.pinned, 0);  // without the rest of the wait
      document.querySelector(`.st-key-${data.name}_detail`)?.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Escape") {
      // Of steps the last one is shown where none is pinned, also while more of them come.
      send({ depth: data.follows ? null : box.pinned.depth }, 0);
    }
  };

  // An explicit list: plotly.js 4 adds a button by default that sends the chart to its makers' cloud
  const config = { displaylogo: false, responsive: false, showSendToCloud: false, plotlyServerURL: "",
                   modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
                   toImageButtonOptions: { format: "svg", filename: data.name } };
  const zoomed = (event) => {
    if (event["xaxis.autorange"]) box.zoom = null;
    else if (event["xaxis.range[0]"] !== undefined || event["xaxis.range"]) {
      const range = axis().range.map(Number);
      const full = box.fullRange ?? [NaN, NaN];
      box.zoom = Math.abs(range[0] - full[0]) + Math.abs(range[1] - full[1]) < 1e-9 ? null : range;
    } else return show();  // such as a change of size
    keepZoom(data.name, box);
    if (data.follows) setStateValue("zoom", box.zoom);  // fewer steps have room for more of their numbers
    show();
  };
  const draw = (Plotly) => {
    if (!box.isConnected) return;  // the page was left while plotly.js loaded
    // A drawing in the middle of a drag would end it.
    box.waitsToDraw = (box.pressed ?? null) !== null;
    if (box.waitsToDraw) return;
    const theme = getComputedStyle(box).getPropertyValue("--st-background-color");
    if (box.drawn === data.figure && box.theme === theme) return show();
    box.drawn = data.figure;
    box.theme = theme;
    const figure = JSON.parse(data.figure);
    box.fullRange = figure.layout.xaxis.range;
    const layout = dress({ ...figure.layout, height: data.height, autosize: true }, box);
    // On a phone a title that has no room gives up its unit.
    for (const note of layout.annotations ?? []) {
      if (note.text.replace(/<[^>]*>/g, "").length * 6.4 > box.clientWidth) note.text = note.text.replace(/(: | \()[^<]*<\/b>/, "</b>");
    }
    // Another revision each time: plotly would bring back a zoom that was given up.
    layout.xaxis = { ...layout.xaxis, uirevision: Math.random() };
    // A zoom of the address comes after the first drawing: what plotly draws first is what a double click goes back to.
    const isFirst = !plot._fullLayout;
    const zoom = box.zoom ? { range: [...box.zoom], autorange: false } : {};
    if (!isFirst) layout.xaxis = { ...layout.xaxis, ...zoom };
    return Plotly.react(plot, coloured(figure.data, box), layout, config)
      .then(() => (isFirst && box.zoom ? Plotly.relayout(plot, { "xaxis.range": [...box.zoom] }) : null)).then(() => {
      plot.removeAllListeners?.("plotly_relayout");
      plot.on("plotly_relayout", zoomed);
      show();
      if (!box.depthscopeResize) {
        box.depthscopeResize = new ResizeObserver(() => {
          if (box.isConnected && box.clientWidth > 0) Promise.resolve(Plotly.Plots.resize(plot)).then(show);
        });
        box.depthscopeResize.observe(parentElement);
      }
    });
  };
  box.draw = () => draw(window.Plotly);
  load(data.plotly).then(draw).catch((error) => { plot.textContent = error.message; });
  return () => {
    box.depthscopeResize?.disconnect();
    box.depthscopeResize = null;
    box.drawn = null;
    box.listening?.abort();
    clearTimeout(box.waiting);
    window.Plotly?.purge(plot);
  };
}
