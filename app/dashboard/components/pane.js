// Everything about the depth under the cursor, or else the pinned one: it is all here, and asks the server nothing.
// Text from a run arrives as data only, never as part of this script.

export default function ({ parentElement, data, setStateValue }) {
  let box = parentElement.querySelector(".depthscope-facts");
  if (!box) {
    box = make("div", { class: "depthscope-facts depthscope-pane" });
    parentElement.appendChild(box);
  }
  box.place = { at: null, pin: data.pin };
  const isMarked = (sequence, position) => data.token && data.token[0] === sequence && data.token[1] === position;

  const finding = (each) => {
    const parts = [["Where", each.where], ["Why", each.why], ["Next", each.next]].filter(([, text]) => text)
      .map(([name, text]) => make("p", {}, make("b", {}, `${name}: `), text));
    if (each.experiment) parts.push(make("p", {}, make("code", {}, each.experiment)));
    return make("details", { class: `finding ${each.severity.toLowerCase()}`, ...(each.severity === "INFO" ? {} : { open: "" }) },
      make("summary", {}, `${each.sign} ${each.title}`), ...parts);
  };

  const numbers = (depth) => {
    const places = [depth - 1, depth, depth + 1].filter((i) => data.names[i] !== undefined);
    const rows = data.numbers.map((row) => make("tr", {}, make("th", { scope: "row", title: row.help }, row.name),
      ...places.map((i) => make("td", {}, row.values[i])), make("td", {}, row.noise[depth])));
    return make("div", { class: "scroll" }, make("table", {}, make("caption", { class: "hidden" }, "Metrics at this depth and around it"),
      make("thead", {}, make("tr", {}, make("td"), ...places.map((i) => make("th", { scope: "col" }, `depth ${i}`)),
        make("th", { scope: "col", title: "What independent noise of the same shape would give" }, "noise baseline"))),
      make("tbody", {}, ...rows)));
  };

  // A click on a token marks it in the map, in the tables and on the matrices.
  const tokens = (heading, columns, rows) => make("div", { class: "scroll" }, make("table", {},
    make("caption", { class: "hidden" }, heading),
    make("thead", {}, make("tr", {}, ...[heading, "sequence", "position", ...columns].map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows.map(([text, sequence, position, ...values]) => make("tr", isMarked(sequence, position) ? { class: "marked" } : {},
      make("td", {}, make("button", { type: "button", "aria-label": `Mark token ${position} of sequence ${sequence}, “${text}”`,
        onclick: () => setStateValue("token", isMarked(sequence, position) ? null : [sequence, position]) }, text)),
      ...[sequence, position, ...values].map((value) => make("td", {}, value)))))));

  const matrix = (heading, each) => [make("h3", {}, heading), matrixView(each, make("p", { class: "of" }, each.of))];
  const matrices = (depth) => (data.connections[depth] ?? []).flatMap((i) => [
    ...matrix(`H_res of ${data.matrices[i].name}`, data.matrices[i]),
    ...(i > 0 ? matrix(`Product of H_res from the embedding (${i + 1} connections)`, data.products[i]) : []),
  ]);

  const draw = () => {
    box.scheduled = null;
    const depth = box.place.at ?? box.place.pin;
    if (depth === null || data.names[depth] === undefined) return;
    if (box.shown === depth && box.of === data) return;
    box.shown = depth;
    box.of = data;
    const touching = data.findings.filter((each) => each.first <= depth && depth <= each.last).slice(0, data.most);
    const at = data.tokens?.[depth];
    box.replaceChildren(
      make("h2", {}, `Depth ${depth}: ${data.names[depth]}`),
      ...touching.map(finding), ...matrices(depth), numbers(depth),
      ...(at ? [tokens("largest tokens", ["norm", "× median"], at.tokens),
        tokens("largest entries", ["feature", "value", "× median"], at.entries)] : []),
    );
  };
  box.listening?.abort();
  box.listening = new AbortController();
  document.addEventListener("depthscope-place", (event) => {
    if (event.detail.name !== data.name) return;
    box.place = event.detail;
    box.scheduled ??= requestAnimationFrame(draw);
  }, { signal: box.listening.signal });
  draw();
  return () => box.listening?.abort();
}
