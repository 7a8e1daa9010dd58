// Numbers and texts for people. Every text of a log is set by textContent, never as markup.
const MISSING = "–";
const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";

const byId = (id) => document.getElementById(id);
const WORDS = JSON.parse(byId("words").textContent);

function whole(n) {
  return n.toLocaleString("en-US");
}

// A number with three significant digits; very small and very large numbers with a power of ten.
function number(value) {
  if (value === null || value === undefined) return MISSING;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) {
    const [digits, power] = value.toExponential(1).split("e");
    const raised = [...String(Math.abs(power))].map((digit) => SUPERSCRIPT[digit]).join("");
    return minus(`${digits}\u00a0×\u00a010${power < 0 ? "⁻" : ""}${raised}`);
  }
  return minus(size >= 1000 ? whole(Math.round(value)) : String(Number(value.toPrecision(3))));
}

function minus(text) {
  return text.replace(/-/g, "−");
}

// A time span such as "12 s ago", in the largest unit that fits.
function ago(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

// The words about a quantity; a quantity that this version does not know has its name as title.
function words(quantity) {
  const known = Object.hasOwn(WORDS.quantities, quantity) ? WORDS.quantities[quantity] : null;
  return known ?? { title: quantity, unit: "", reads: "", misleads: "", floor: "", formula: "", source: "" };
}

function withUnit(value, unit) {
  return value === null || value === undefined ? "not measured" : number(value) + (unit ? ` ${unit}` : "");
}

function element(tag, text = "", classes = "") {
  const made = document.createElement(tag);
  if (text !== "") made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

function drawn(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== "") made.textContent = text;
  return made;
}
