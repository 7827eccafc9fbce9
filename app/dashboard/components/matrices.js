// A matrix of streams as people read it: coloured numbers with their sums at the edges, and its eigenvalues by the unit circle.

function make(tag, attributes = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made[name] = value;
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...inside);
  return made;
}

const sum = (values) => (values.includes(null) ? null : values.reduce((all, value) => all + value, 0));

function matrixTable(matrix) {
  const n = matrix.h.length;
  const known = matrix.h.flat().filter((value) => value !== null).map(Math.abs);
  const reach = Math.max(...known, 1e-12);
  // Blue below zero, red above it, as on the pictures; half transparent, so that the numbers keep their contrast.
  const cell = (value) => make("td", value === null ? {} : {
    style: `background: rgba(${value < 0 ? "63,144,218" : "189,31,1"}, ${(0.55 * Math.abs(value)) / reach})` }, digits(value));
  const weights = [["H_post", matrix.post], ["H_pre", matrix.pre]].filter(([, values]) => values);
  const head = ["", ...Array.from({ length: n }, (_, j) => `from ${j}`), "row sum", ...weights.map(([name]) => name)];
  const columns = Array.from({ length: n }, (_, j) => sum(matrix.h.map((row) => row[j])));
  return make("table", { class: "matrix" },
    make("caption", { class: "hidden" }, `H_res, ${matrix.of}`),
    make("thead", {}, make("tr", {}, ...head.map((name) => (name ? make("th", { scope: "col" }, name) : make("td"))))),
    make("tbody", {},
      ...matrix.h.map((row, i) => make("tr", {}, make("th", { scope: "row" }, `to ${i}`), ...row.map(cell),
        make("td", { class: "sum" }, digits(sum(row))), ...weights.map(([, values]) => make("td", { class: "sum" }, digits(values[i]))))),
      make("tr", {}, make("th", { scope: "row" }, "column sum"), ...columns.map((value) => make("td", { class: "sum" }, digits(value))),
        make("td"), ...weights.map(() => make("td")))));
}

function eigenvaluePlane(matrix) {
  const values = matrix.eigenvalues.filter(([real, imaginary]) => real !== null && imaginary !== null);
  const reach = Math.max(1, ...values.flat().map(Math.abs)) * 1.15;
  const words = values.map(([real, imaginary]) => digits(real) + (imaginary ? ` ${imaginary < 0 ? "−" : "+"} ${digits(Math.abs(imaginary))} i` : ""));
  const space = "http://www.w3.org/2000/svg";
  const shape = (tag, attributes) => {
    const made = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const svg = shape("svg", { viewBox: `${-reach} ${-reach} ${2 * reach} ${2 * reach}`, width: 130, height: 130, role: "img",
                             class: "plane", "aria-label": `Eigenvalues of H_res, ${matrix.of}: ${words.join(", ")}` });
  const thin = reach / 90;
  svg.append(shape("line", { x1: -reach, x2: reach, y1: 0, y2: 0, "stroke-width": thin }),
    shape("line", { y1: -reach, y2: reach, x1: 0, x2: 0, "stroke-width": thin }),
    shape("circle", { r: 1, class: "unit", "stroke-width": 1.5 * thin, "stroke-dasharray": 4 * thin }),
    ...values.map(([real, imaginary]) => shape("circle", { cx: real, cy: -imaginary, r: reach / 22, class: "value" })));
  return make("figure", { class: "eigenvalues" }, svg,
    make("figcaption", {}, `Eigenvalues: ${words.join(", ") || "undefined"}`));
}

const matrixView = (matrix, heading) => make("div", { class: "matrix-view" }, heading, matrixTable(matrix), eigenvaluePlane(matrix));
