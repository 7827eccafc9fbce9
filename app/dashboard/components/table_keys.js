// Streamlit tells that a cell of a table was selected, and not how. A click opens what is selected; keys only move, and Enter opens.

const WAIT = 300;  // milliseconds until the table has told of the last move
const MOVES = /^(Arrow|Page|Home$|End$| $)/;

export default function ({ parentElement, data, setStateValue, setTriggerValue }) {
  const isInside = (event) => event.target.closest?.(`.st-key-${data.table}`) != null;
  const note = (how) => {
    if (how === (parentElement.selectsBy ?? "pointer")) return;
    parentElement.selectsBy = how;
    setStateValue("by", how);  // at once, where the table waits a moment before it tells of its selection
  };
  // This runs again whenever the page does.
  parentElement.listening?.abort();
  parentElement.listening = new AbortController();
  const options = { capture: true, signal: parentElement.listening.signal };
  document.addEventListener("pointerdown", (event) => { if (isInside(event)) note("pointer"); }, options);
  document.addEventListener("keydown", (event) => {
    if (!isInside(event) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") {
      event.preventDefault();
      event.stopPropagation();  // the table would show the cell's text in a box over it
      setTimeout(() => setTriggerValue("opened", true), WAIT);
    } else if (MOVES.test(event.key)) note("keys");
  }, options);
  return () => parentElement.listening?.abort();
}
