// The button back leads to the view before. Streamlit opens a page under its bare address and then writes the page's parameters there,
// one after another: what the visitor did not do since a page was opened is no step of theirs.
window.depthscopeBack ??= (() => {
  const push = history.pushState.bind(history);
  let isTouched = false;
  for (const event of ["pointerdown", "keydown"]) document.addEventListener(event, () => { isTouched = true; }, true);
  window.addEventListener("popstate", () => { isTouched = false; });
  history.pushState = (state, title, url) => {
    const isSamePage = new URL(url ?? location.href, location.href).pathname === location.pathname;
    if (isSamePage && !isTouched) {
      history.replaceState(state, title, url);
    } else {
      push(state, title, url);
      isTouched = isTouched && isSamePage;
    }
  };
  return true;
})();
