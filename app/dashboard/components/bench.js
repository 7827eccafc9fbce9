// One of some matrices, and the choice of it.

export default function ({ parentElement, data }) {
  let box = parentElement.querySelector(".depthscope-facts");
  if (!box) {
    box = make("div", { class: "depthscope-facts" });
    parentElement.appendChild(box);
    box.chosen = 0;
  }
  box.chosen = Math.min(box.chosen, data.matrices.length - 1);
  const draw = () => {
    const select = make("select", { "aria-label": "Of which token", onchange: () => { box.chosen = select.selectedIndex; draw(); } },
      ...data.matrices.map((matrix) => make("option", {}, matrix.of)));
    select.selectedIndex = box.chosen;
    box.replaceChildren(matrixView(data.matrices[box.chosen], select));
  };
  draw();
}
