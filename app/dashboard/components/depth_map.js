// Every run over its depth as a row of colours: rows are walked by keys, several are marked for a comparison, a click on a depth
// opens the microscope there. Text from a run arrives as data only, never as part of this script.

const WAIT = 250;  // milliseconds without another key before the page hears of a row: held arrow keys move the mark only

// From dead to healthy; of two sides, from vanishing by healthy to exploding. Told apart without seeing red or green.
const ONE_SIDE = ["#6E0B26", "#B2182B", "#E8813A", "#F7D889", "#A9D3E8", "#4B93C7", "#20639B"];
const TWO_SIDES = ["#1B3F8F", "#4B7FC4", "#9CC3E6", "#EFEFE6", "#F5B183", "#D6513E", "#7F0A1F"];
const UNDEFINED = "repeating-linear-gradient(45deg, #888 0 3px, #ccc 3px 6px)";

function mixed(stops, share) {
  const at = share * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  const part = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
  const one = (k) => Math.round(part(stops[i], k) + (at - i) * (part(stops[i + 1], k) - part(stops[i], k)));
  return `rgb(${one(0)},${one(1)},${one(2)})`;
}

export default function ({ parentElement, data, setStateValue, setTriggerValue }) {
  let box = parentElement.querySelector(".depthscope-map");
  if (!box) {
    box = document.createElement("div");
    box.className = "depthscope-map";
    box.marked = new Set();
    parentElement.appendChild(box);
  }
  const make = (tag, attributes = {}, ...inside) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...inside);
    return made;
  };
  const paper = getComputedStyle(box).getPropertyValue("--st-background-color").trim();
  box.classList.toggle("dark", paper.startsWith("#") && parseInt(paper.slice(1, 3), 16) < 128);
  const kept = box.contains(document.activeElement) ? document.activeElement.closest("tr")?.dataset.run : null;
  const scrolled = box.querySelector(".rows")?.scrollTop ?? 0;
  if (box.at === undefined || box.sentAt !== data.at) box.at = box.sentAt = data.at;
  const tell = (name, wait) => {
    clearTimeout(box.waiting);
    box.waiting = setTimeout(() => { box.sentAt = name; setStateValue("at", name); }, wait);
  };
  const open = (run, depth) => setTriggerValue("open", { run, depth: depth ?? null });

  const stops = data.twoSided ? TWO_SIDES : ONE_SIDE;
  const [low, high] = data.limits.map(Math.log);
  const share = (value) => (value > 0 ? Math.min(Math.max((Math.log(value) - low) / (high - low), 0), 1) : 0);
  // Sharp edges between cells: a colour between two depths would be of no state.
  const colours = (cells) => {
    const width = 100 / cells.length;
    const parts = cells.map((value, i) =>
      `${value === null ? "transparent" : mixed(stops, share(value))} ${(i * width).toFixed(3)}% ${((i + 1) * width).toFixed(3)}%`);
    return `linear-gradient(to right, ${parts.join(", ")}), ${UNDEFINED}`;
  };

  const bar = make("div", { class: "bar" });
  const showBar = () => {
    const known = new Set(data.rows.filter((row) => row.cells).map((row) => row.name));
    const marked = [...box.marked].filter((name) => known.has(name));
    const to = (page, words, least) => {
      const meant = marked.length < least && known.has(box.at) ? [...new Set([box.at, ...marked])] : marked;
      const button = make("button", { type: "button", onclick: () => setTriggerValue("together", { page, names: meant }) }, words);
      button.disabled = meant.length < least;
      return button;
    };
    const ends = data.ends.map((words, i) => make("span", {}, `${digits(data.limits[i])} ${words}`));
    bar.replaceChildren(make("span", {}, marked.length ? `${marked.length} marked:` : "Mark runs to compare them."),
      to("compare", "Compare", 2), to("training", "Training", 1),
      make("div", { class: "legend", "aria-hidden": "true" }, ends[0],
        make("i", { style: `background: linear-gradient(to right, ${stops.join(", ")})` }), ends[1]));
  };

  const tip = make("div", { class: "tip", role: "status" });
  const name = (row, cell) => (row.block > 1
    ? `depths ${cell * row.block} to ${Math.min((cell + 1) * row.block, row.names.length) - 1}`
    : `depth ${cell}: ${row.names[cell] ?? ""}`);
  const point = (made, row, cell) => {
    for (const each of box.querySelectorAll(".cursor")) each.style.display = "none";
    tip.style.display = cell === null ? "none" : "block";
    if (cell === null) return;
    const strip = made.querySelector(".strip");
    const cursor = strip.querySelector(".cursor");
    const width = 100 / row.cells.length;
    Object.assign(cursor.style, { display: "block", left: `${cell * width}%`, width: `${width}%` });
    const value = row.cells[cell];
    const here = row.marks.filter((mark) => Math.floor(mark.at / row.block) === cell).map((mark) => `▼ ${mark.title}`);
    tip.textContent = [`${name(row, cell)}`, `${data.measure}: ${value === null ? "undefined" : digits(value)}`, ...here].join("\n");
    const place = strip.getBoundingClientRect();
    const left = place.left + ((cell + .5) / row.cells.length) * place.width;
    Object.assign(tip.style, { left: `${Math.min(left + 12, innerWidth - tip.offsetWidth - 8)}px`,
      top: place.bottom + tip.offsetHeight + 8 > innerHeight ? `${place.top - tip.offsetHeight - 4}px` : `${place.bottom + 6}px` });
  };
  const worstOf = (marks) => marks.find((each) => each.severity === "FAIL") ?? marks.find((each) => each.severity === "WARN") ?? marks[0];
  const marksOf = (row) => {
    const places = new Map();
    for (const mark of row.marks) {
      const cell = Math.floor(mark.at / row.block);
      places.set(cell, [...(places.get(cell) ?? []), mark]);
    }
    return [...places].map(([cell, marks]) => make("span", { class: `mark ${worstOf(marks).severity.toLowerCase()}`,
      style: `left: ${(100 * (cell + .5)) / row.cells.length}%` }, "▼"));
  };

  const line = (row) => {
    const tick = make("input", { type: "checkbox", tabindex: -1, "aria-label": `Mark ${row.name}`, onchange: () => {
      tick.checked ? box.marked.add(row.name) : box.marked.delete(row.name);
      showBar();
    } });
    tick.checked = box.marked.has(row.name);
    tick.disabled = !row.cells;
    const severity = (row.severity ?? "").toLowerCase();
    const strip = make("div", { class: "strip" });
    if (row.cells?.length) {
      strip.append(make("div", { class: "colours", style: `background: ${colours(row.cells)}` }), make("div", { class: "cursor" }), ...marksOf(row));
    } else {
      strip.className = "empty";
      strip.append(row.missing ?? "");
    }
    const made = make("tr", { "data-run": row.name, tabindex: row.name === box.at ? 0 : -1, "aria-label": row.alt || `${row.name}: ${row.worst}` },
      make("td", { class: "m" }, tick),
      make("th", { scope: "row", class: "r" }, make("span", { class: "name", title: row.name }, row.name),
        make("span", { class: "worst", title: row.worst }, make("span", { class: `sign ${severity}` }, row.sign ? `${row.sign} ` : ""), row.worst,
          row.status ? ` · ${row.status}` : "")),
      make("td", { class: "l" }, row.loss ?? ""), make("td", {}, strip));
    made.setAttribute("aria-current", row.name === box.at);
    const cellAt = (event) => {
      const place = strip.getBoundingClientRect();
      return Math.min(Math.max(Math.floor(((event.clientX - place.left) / place.width) * row.cells.length), 0), row.cells.length - 1);
    };
    if (row.cells?.length) {
      strip.onmousemove = (event) => point(made, row, cellAt(event));
      strip.onmouseleave = () => point(made, row, null);
      strip.onclick = (event) => { event.stopPropagation(); open(row.name, cellAt(event) * row.block); };
    }
    made.onclick = (event) => { if (!event.target.closest("input")) go(row.name, 0); };
    return made;
  };

  const rows = () => [...box.querySelectorAll("tr[data-run]")];
  const rowOf = (run) => data.rows.find((row) => row.name === run);
  const go = (run, wait) => {
    box.at = run;
    box.cell = null;
    for (const each of rows()) {
      const here = each.dataset.run === run;
      each.tabIndex = here ? 0 : -1;
      each.setAttribute("aria-current", here);
      if (here) { each.focus({ preventScroll: true }); each.scrollIntoView({ block: "nearest" }); point(each, rowOf(run), null); }
    }
    tell(run, wait);
    showBar();
  };

  const draw = () => {
    showBar();
    const head = make("tr", {}, make("th", { scope: "col", class: "m" }, make("span", { class: "hidden" }, "Mark")),
      make("th", { scope: "col", class: "r" }, "Run and its worst finding"), make("th", { scope: "col", class: "l" }, "Loss"),
      make("th", { scope: "col" }, make("div", { class: "ends" }, make("span", {}, "embedding"), make("span", { class: "wide" }, "relative depth"), make("span", {}, "last state"))));
    const lines = data.rows.flatMap((row, i) => [
      ...(data.group && row.cells && row.group !== data.rows[i - 1]?.group
        ? [make("tr", {}, make("th", { colspan: 4, scope: "rowgroup", class: "group" }, `${data.group}: ${row.group}`))] : []),
      line(row)]);
    const table = make("table", { class: `${data.rows.length <= 8 ? "few" : data.rows.length > 14 ? "many" : ""} ${data.rows.some((row) => row.loss) ? "" : "lossless"}` }, make("caption", {}, data.caption), make("thead", {}, head), make("tbody", {}, ...lines));
    box.replaceChildren(bar, make("div", { class: "rows", tabindex: -1 }, table), tip);
    box.querySelector(".rows").scrollTop = scrolled;
    if (!rows().some((each) => each.tabIndex === 0) && rows().length) rows()[0].tabIndex = 0;
    if (kept) rows().find((each) => each.dataset.run === kept)?.focus({ preventScroll: true });
  };

  box.onkeydown = (event) => {
    const here = event.target.closest("tr[data-run]");
    if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = rows();
    const at = all.indexOf(here);
    const row = rowOf(here.dataset.run);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1, PageDown: at + 10, PageUp: at - 10 }[event.key];
    const side = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (to !== undefined) go(all[Math.min(Math.max(to, 0), all.length - 1)].dataset.run, WAIT);
    else if (side !== undefined && row?.cells?.length) {
      const first = side > 0 ? -1 : row.cells.length;
      box.cell = Math.min(Math.max((box.cell ?? first) + side, 0), row.cells.length - 1);
      point(here, row, box.cell);
    } else if (event.key === " ") here.querySelector("input").click();
    else if (event.key === "Enter" && row?.cells) open(row.name, box.cell === null || box.cell === undefined ? row.depth : box.cell * row.block);
    else if (event.key === "Escape") point(here, row, null);
    else return;
    event.preventDefault();
  };

  // The same rows are left as they are: a page that refreshes must not take the cursor from its reader.
  const drawn = JSON.stringify({ ...data, at: null });
  if (box.drawn !== drawn) { box.drawn = drawn; draw(); } else showBar();
  return () => clearTimeout(box.waiting);
}
