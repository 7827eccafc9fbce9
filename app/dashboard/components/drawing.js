// A small drawing by Python, in the colour of the page's text.

export default function ({ parentElement, data }) {
  let box = parentElement.querySelector(".drawing");
  if (!box) {
    box = document.createElement("div");
    box.className = "drawing";
    parentElement.appendChild(box);
  }
  box.style.color = "var(--st-text-color)";
  const parsed = new DOMParser().parseFromString(data.svg, "image/svg+xml");
  box.replaceChildren(document.importNode(parsed.documentElement, true));
}
