// Draws each figure over its printed form once it is seen: a folded one costs nothing until it is opened.
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });

function draw(box) {
  const figure = JSON.parse(box.querySelector("script").textContent);
  const ink = getComputedStyle(document.body).color;
  const paper = getComputedStyle(document.body).backgroundColor;
  figure.layout.font = { ...figure.layout.font, color: ink };
  figure.layout.hoverlabel = { ...figure.layout.hoverlabel, bgcolor: paper, font: { color: ink, size: 12 } };
  const config = { displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
                   modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]] };
  const place = document.createElement("div");
  box.appendChild(place);
  Plotly.newPlot(place, figure.data, { ...figure.layout, height: 380, autosize: true }, config)
    .then(() => {
      box.closest("figure").classList.add("drawn");
      return Plotly.Plots.resize(place);  // the printed form made room
    });
}

for (const box of document.querySelectorAll(".interactive")) seen.observe(box);
