// The table of all runs: rows are walked by keys, several are marked for a comparison, a verdict opens the microscope there.
// Text from a run arrives as data only, never as part of this script.

const WAIT = 250;  // milliseconds without another key before the page hears of a row: held arrow keys move the mark only

export default function ({ parentElement, data, setStateValue, setTriggerValue }) {
  let box = parentElement.querySelector(".depthscope-board");
  if (!box) {
    box = document.createElement("div");
    box.className = "depthscope-board";
    box.marked = new Set();
    box.chosen = new Set();
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
  // What is chosen in the sidebar is marked, also when it was judged only after the page was opened.
  for (const name of data.chosen) if (!box.chosen.has(name)) box.marked.add(name);
  for (const name of box.chosen) if (!data.chosen.includes(name)) box.marked.delete(name);
  box.chosen = new Set(data.chosen);
  const kept = box.contains(document.activeElement) ? document.activeElement.closest("tr")?.dataset.run : null;
  const scrolled = box.querySelector(".rows")?.scrollTop ?? 0;
  if (box.at === undefined || box.sentAt !== data.at) box.at = box.sentAt = data.at;
  const tell = (name, wait) => {
    clearTimeout(box.waiting);
    box.waiting = setTimeout(() => { box.sentAt = name; setStateValue("at", name); }, wait);
  };
  const open = (run, depth) => setTriggerValue("open", { run, depth: depth ?? null });

  const actions = make("div", { class: "actions" });
  const showActions = () => {
    const names = [...box.marked].filter((name) => data.runs.includes(name));
    // The row of the cursor counts where too few are marked: it is open below the table.
    const here = data.rows.find((row) => row.name === box.at && row.judged)?.runs ?? [];
    const to = (page, words, least) => {
      const meant = names.length < least ? [...new Set([...here, ...names])] : names;
      const button = make("button", { type: "button", onclick: () => setTriggerValue("together", { page, names: meant }) },
        words + (least > 1 && names.length === 1 && meant.length > 1 ? ` with ${here[0]}` : ""));
      button.disabled = meant.length < least;
      return button;
    };
    actions.replaceChildren(make("span", {}, names.length ? `${names.length} marked:` : "Mark runs to see them together."),
      to("compare", "Compare", 2), to("training", "Training", 1), to("", "Show here", 1),
      ...(names.length ? [make("button", { type: "button", onclick: () => { box.marked.clear(); draw(); } }, "Clear")] : []));
  };

  const cell = (row, each, i) => {
    const name = data.columns[i];
    if (!each.state) return make("td", {}, each.text);
    const text = each.text.replace(" ", "\u00a0");  // a sign and its place are one word
    const words = `${name}: ${data.states[each.state]}${each.place ? `, ${each.place}` : ""}`;
    if (!row.judged || each.mild) return make("td", { class: each.state.toLowerCase(), title: words }, text);
    return make("td", { class: each.state.toLowerCase() },
      make("button", { type: "button", tabindex: -1, title: words, "aria-label": `${words}. Open the microscope there`,
                       onclick: () => open(row.name, each.depth) }, text));
  };

  const curve = (row) => {
    if (!row.curve) return "";
    const parsed = new DOMParser().parseFromString(row.curve, "image/svg+xml").documentElement;
    parsed.setAttribute("aria-hidden", "true");
    return document.importNode(parsed, true);
  };

  const line = (row) => {
    const mark = make("input", { type: "checkbox", tabindex: -1, "aria-label": `Mark ${row.name}`, onchange: () => {
      for (const name of row.runs) mark.checked ? box.marked.add(name) : box.marked.delete(name);
      showActions();
    } });
    mark.checked = row.runs.every((name) => box.marked.has(name));
    mark.disabled = !row.judged;
    const made = make("tr", { "data-run": row.name, tabindex: row.name === box.at ? 0 : -1 },
      make("td", {}, mark),
      make("th", { scope: "row" }, make("span", { class: "name", title: row.name }, row.name),
        ...(row.status ? [make("span", { class: "status" }, row.status)] : [])),
      ...data.groups.map((name) => make("td", {}, row.group)),
      make("td", { class: "worst" }, ...(row.judged && row.sentence
        ? [make("button", { type: "button", tabindex: -1, title: row.why, onclick: () => open(row.name, row.depth) },
            make("span", { class: `sign ${row.severity.toLowerCase()}` }, `${row.sign} `), row.sentence), curve(row)]
        : [row.sentence])),
      ...row.cells.map((each, i) => cell(row, each, i)));
    made.setAttribute("aria-current", row.name === box.at);
    made.onclick = (event) => { if (!event.target.closest("button, input")) go(row.name, 0); };
    return made;
  };

  const rows = () => [...box.querySelectorAll("tbody tr")];
  const go = (name, wait) => {
    box.at = name;
    for (const each of rows()) {
      const here = each.dataset.run === name;
      each.tabIndex = here ? 0 : -1;
      each.setAttribute("aria-current", here);
      if (here) { each.focus({ preventScroll: true }); each.scrollIntoView({ block: "nearest" }); }
    }
    tell(name, wait);
    showActions();
  };

  const draw = () => {
    showActions();
    const heads = ["Mark", "Run", ...data.groups, "Worst finding", ...data.columns].map((name, i) =>
      make("th", { scope: "col" }, i ? name : make("span", { class: "hidden" }, name)));
    const table = make("table", {}, make("caption", {}, data.caption), make("thead", {}, make("tr", {}, ...heads)),
      make("tbody", {}, ...data.rows.map(line)));
    box.replaceChildren(actions, make("div", { class: "rows", tabindex: -1, style: `max-height: ${data.height}px` }, table));
    box.querySelector(".rows").scrollTop = scrolled;
    if (!rows().some((each) => each.tabIndex === 0) && rows().length) rows()[0].tabIndex = 0;
    if (kept) rows().find((each) => each.dataset.run === kept)?.focus({ preventScroll: true });
  };

  box.onkeydown = (event) => {
    const here = event.target.closest("tr[data-run]");
    if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = rows();
    const at = all.indexOf(here);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1, PageDown: at + 10, PageUp: at - 10 }[event.key];
    const stops = [here, ...here.querySelectorAll("button")];
    const side = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (to !== undefined) go(all[Math.min(Math.max(to, 0), all.length - 1)].dataset.run, WAIT);
    else if (side !== undefined) stops[Math.min(Math.max(stops.indexOf(event.target) + side, 0), stops.length - 1)].focus();
    else if (event.key === " " && event.target === here) here.querySelector("input").click();
    else if (event.key === "Enter" && event.target === here) (here.querySelector(".worst button") ?? here.querySelector("th")).click();
    else return;
    event.preventDefault();
  };

  // The same rows are left as they are: a page that refreshes must not take the cursor from its reader.
  const drawn = JSON.stringify({ ...data, at: null });
  if (box.drawn !== drawn) { box.drawn = drawn; draw(); } else showActions();
  return () => clearTimeout(box.waiting);
}
