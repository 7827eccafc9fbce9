// The text of a sequence, each token coloured by its number at one depth; under the mouse, its path over all depths.
// Text from a run arrives as data only, never as part of this script.

const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37]];

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = VIRIDIS[Math.floor(at)];
  const high = VIRIDIS[Math.ceil(at)];
  return low.map((value, i) => Math.round(value + (high[i] - value) * (at % 1)));
}

// Black or white, whichever has more contrast: at least 4.5 to 1 on any colour.
function ink([red, green, blue]) {
  const [r, g, b] = [red, green, blue].map((value) => (value / 255 <= 0.03928 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

export default function ({ parentElement, data }) {
  let box = parentElement.querySelector(".depthscope-text");
  if (!box) {
    box = make("div", { class: "depthscope-text" });
    parentElement.appendChild(box);
  }
  box.depth = data.depth;
  const scale = make("span", { class: "scale" });
  const said = make("p", { class: "said", "aria-live": "polite" });
  const path = make("div", { class: "path" });
  const tokens = data.texts.map((text, i) => make("button", { type: "button", tabindex: i ? -1 : 0, title: `position ${i}`,
    onmouseenter: () => tell(i), onfocus: () => tell(i) }, text));
  const known = (values) => values.filter((value) => value !== null && (!data.log || value > 0));
  const along = (value, low, high) => {
    const by = data.log ? Math.log : (x) => x;
    return value === null || (data.log && value <= 0) ? null : high > low ? (by(value) - by(low)) / (by(high) - by(low)) : 0.5;
  };

  const paint = () => {
    const values = data.values.map((row) => row[box.depth]);
    // The ends are those of 96 % of the tokens: one massive token would leave a single colour to all others.
    const sorted = known(values).sort((a, b) => a - b);
    const [low, high] = [0.02, 0.98].map((share) => sorted[Math.round(share * (sorted.length - 1))]);
    tokens.forEach((token, i) => {
      const share = along(values[i], low, high);
      token.style.background = share === null ? "transparent" : `rgb(${colour(share)})`;
      token.style.color = share === null ? "inherit" : ink(colour(share));
    });
    scale.textContent = `depth ${box.depth} (${data.names[box.depth]}): ${data.measure}, colours from ${digits(low)} to ${digits(high)}${data.log ? ", logarithmic" : ""}; largest ${digits(sorted.at(-1))}`;
    if (box.at !== undefined) tell(box.at);
  };

  const tell = (i) => {
    box.at = i;
    const row = data.values[i];
    const [low, high] = [Math.min(...known(row)), Math.max(...known(row))];
    const text = data.texts[i] === `token ${i}` ? "" : ` “${data.texts[i]}”`;
    said.textContent = `Token ${i}${text}: ${digits(row[box.depth])} at depth ${box.depth}; over depth from ${digits(low)} to ${digits(high)}.`;
    const [width, height] = [320, 60];
    const x = (depth) => 4 + (depth * (width - 8)) / Math.max(row.length - 1, 1);
    const points = row.map((value, depth) => [depth, along(value, low, high)]).filter(([, share]) => share !== null)
      .map(([depth, share]) => `${x(depth).toFixed(1)},${(height - 6 - share * (height - 12)).toFixed(1)}`);
    path.innerHTML = `<svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" aria-hidden="true"><line x1="${x(box.depth)}" `
      + `x2="${x(box.depth)}" y1="0" y2="${height}"/><polyline points="${points.join(" ")}"/></svg>`;
  };

  const text = make("div", { class: "text", role: "group", "aria-label": `Text of sequence ${data.sequence}; arrow keys go from token to token`,
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -data.texts.length, End: data.texts.length }[event.key];
      if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const next = Math.min(Math.max(tokens.indexOf(document.activeElement) + step, 0), tokens.length - 1);
      tokens.forEach((token, i) => { token.tabIndex = i === next ? 0 : -1; });
      tokens[next].focus();
    } });
  // A line break is one in the text too.
  tokens.forEach((token, i) => text.append(token, ...(data.texts[i].includes("⏎") ? [make("br")] : [])));
  box.replaceChildren(make("div", { class: "bar" }, scale), text, make("div", { class: "detail" }, path, said));
  paint();
  if (box.at === undefined || box.at >= tokens.length) tell(data.first);
  box.listening?.abort();
  box.listening = new AbortController();
  document.addEventListener("depthscope-place", ({ detail }) => {
    const depth = detail.name === data.name ? detail.at ?? detail.pin : null;
    if (depth === null || depth === box.depth || depth >= data.names.length) return;
    box.depth = depth;
    paint();
  }, { signal: box.listening.signal });
  return () => box.listening?.abort();
}
