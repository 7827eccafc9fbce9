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

// Colours and font of Streamlit's theme, light or dark, which Python does not know.
function dress(layout, box) {
  const style = getComputedStyle(box);
  const ink = style.getPropertyValue("--st-text-color").trim() || "#333";
  const paper = style.getPropertyValue("--st-background-color").trim() || "#fff";
  const family = style.getPropertyValue("--st-font").trim() || layout.font.family;
  layout.font = { ...layout.font, color: ink, family };
  layout.hoverlabel = { ...layout.hoverlabel, bgcolor: paper, bordercolor: "rgba(128,128,128,.35)",
                        font: { color: ink, family, size: 12 } };
  return layout;
}

