// A number as Python's `app/text/numbers.py` writes it: three significant digits, in plain notation where that is short; null is
// undefined.

function digits(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size === Infinity) return value > 0 ? "∞" : "−∞";
  const [mantissa, exponent] = size.toExponential(2).split("e");
  const text = size >= 1e-3 && size < 1e5
    ? size.toFixed(Math.max(2 - Number(exponent), 0))
    : `${Number(mantissa)}e${Number(exponent)}`;
  return value < 0 ? `−${text}` : text;
}
