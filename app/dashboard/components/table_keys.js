// Streamlit tells that a cell of a table was selected, and not how. A click opens what is selected; keys only move, and Enter opens.

const MOVES = /^(Arrow|Page|Home$|End$| $)/;

export default function ({ data, setStateValue, setTriggerValue }) {
  const isInside = (event) => event.target.closest?.(`.st-key-${data.table}`) != null;
  let by = data.by;
  const note = (how) => {
    if (how === by) return;
    by = how;
    setStateValue("by", how);  // at once, where the table waits a moment before it tells of its selection
  };
  const listening = new AbortController();
  const options = { capture: true, signal: listening.signal };
  document.addEventListener("pointerdown", (event) => { if (isInside(event)) note("pointer"); }, options);
  document.addEventListener("keydown", (event) => {
    if (!isInside(event) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") {
      event.preventDefault();
      event.stopPropagation();  // the table would show the cell's text in a box over it
      setTriggerValue("opened", true);
    } else if (MOVES.test(event.key)) note("keys");
  }, options);
  return () => listening.abort();
}
