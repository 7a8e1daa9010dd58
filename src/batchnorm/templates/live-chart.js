// Line charts over steps: lines and bands on common axes, with gaps where nothing was measured.
const CHART = { height: 180, left: 56, right: 12, top: 8, bottom: 34 };

// A figure of series {name, style, dash, points: [[step, value]]} or {name, style, bands: [[step, five percentiles]]}.
function chart({ title, unit, series, domain = null }) {
  const figure = element("figure");
  const caption = element("figcaption", title);
  caption.append(element("span", unit || "no unit", "unit"));
  const there = series.filter((one) => valuesOf(one).length);
  if (!there.length) {
    figure.append(caption, element("p", "Not measured up to this step.", "note"));
    return figure;
  }
  figure.append(caption, chartLegend(there), picture(title, there, domain ?? extent(there)));
  return figure;
}

function valuesOf({ points = [], bands = [], isOneOfTwo = false }) {
  const inBands = bands.flatMap((b) => (isOneOfTwo ? b[1]?.slice(1, 4) : b[1]) ?? []);
  return [...points.map((p) => p[1]), ...inBands].filter((v) => v !== null);
}

// The lowest and the highest value of all series, with a margin.
function extent(series) {
  let [low, high] = [Infinity, -Infinity];
  for (const one of series) for (const v of valuesOf(one)) [low, high] = [Math.min(low, v), Math.max(high, v)];
  if (low > high) return null;
  if (low === 0 && high === 0) return [0, 1];
  const room = high > low ? 0.04 * (high - low) : Math.abs(low) * 0.1 || 1;
  return [low >= 0 && low < 0.25 * high ? 0 : low - room, high + room];
}

function chartLegend(series) {
  const list = element("ul", "", "legend");
  for (const one of series) {
    const item = element("li");
    const swatch = drawn("svg", { width: 22, height: 10, "aria-hidden": "true" });
    if (one.bands) swatch.append(drawn("rect", { width: 22, height: 10, class: `band inner ${one.style}` }));
    swatch.append(drawn("line", { x1: 1, x2: 21, y1: 5, y2: 5, class: `line ${one.style} ${one.dash ?? ""}` }));
    item.append(swatch, `${one.name}: ${number(lastOf(one))}`);
    list.append(item);
  }
  return list;
}

// The last value up to the step that is shown; null if it was not measured.
function lastOf({ points, bands }) {
  const row = (points ?? bands)[(points ?? bands).length - 1];
  return bands ? row[1]?.[2] ?? null : row[1];
}

function picture(title, series, [low, high]) {
  const width = chartWidth();
  const [x0, x1] = stepRange();
  const inner = { width: width - CHART.left - CHART.right, height: CHART.height - CHART.top - CHART.bottom };
  const x = (step) => round(CHART.left + ((step - x0) / (x1 - x0)) * inner.width);
  const y = (value) => round(CHART.top + (1 - (value - low) / (high - low)) * inner.height);
  const latest = series.map((one) => `${one.name} ${number(lastOf(one))}`).join(", ");
  const svg = drawn("svg", { class: "chart", viewBox: `0 0 ${width} ${CHART.height}`, role: "img", "aria-label": `${title}: ${latest}` });
  svg.append(...axes(x, y, [x0, x1], [low, high], inner));
  for (const one of series) svg.append(...bandMarks(one, x, y));
  for (const one of series) svg.append(lineMark(one, x, y));
  if (view.upTo !== null) svg.append(drawn("line", { x1: x(view.upTo), x2: x(view.upTo), y1: CHART.top, y2: CHART.top + inner.height, class: "here" }));
  return svg;
}

const round = (v) => Math.round(v * 10) / 10;

// The width of a chart on the page; it is drawn at this width, so that letters keep their size.
function chartWidth() {
  const grid = byId("layer-charts");
  const columns = getComputedStyle(grid).gridTemplateColumns.split(" ").map(parseFloat);
  return Math.max(220, Math.round(columns[0] || grid.clientWidth || 360));
}

function* axes(x, y, [x0, x1], [low, high], inner) {
  const [bottom, right] = [CHART.top + inner.height, CHART.left + inner.width];
  for (const value of ticks(low, high, 4)) {
    yield drawn("line", { x1: CHART.left, x2: right, y1: y(value), y2: y(value), class: "grid" });
    yield drawn("text", { x: CHART.left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value));
  }
  yield drawn("path", { d: `M${CHART.left} ${CHART.top}V${bottom}H${right}`, class: "frame" });
  for (const [step, label] of stepTicks(x0, x1, Math.max(2, Math.min(5, inner.width / 80)))) {
    yield drawn("line", { x1: x(step), x2: x(step), y1: bottom, y2: bottom + 4, class: "frame" });
    yield drawn("text", { x: x(step), y: bottom + 15, "text-anchor": "middle" }, label);
  }
  yield drawn("text", { x: right, y: bottom + 30, "text-anchor": "end" }, "optimizer step");
}

// Of two series only the inner bands, or four colours would lie on each other.
function* bandMarks({ style, bands, isOneOfTwo }, x, y) {
  if (!bands) return;
  if (!isOneOfTwo) yield drawn("path", { d: bandPath(bands, 0, 4, x, y), class: `band ${style}` });
  yield drawn("path", { d: bandPath(bands, 1, 3, x, y), class: `band inner ${style}` });
}

function lineMark({ style, dash = "", points, bands }, x, y) {
  const line = points ?? bands.map(([step, five]) => [step, five?.[2] ?? null]);
  return drawn("path", { d: linePath(line, x, y), class: `line ${style} ${dash}` });
}

// A value between two gaps is a dot: a line of no length with round ends.
function linePath(points, x, y) {
  let [path, isOn] = ["", false];
  for (const [step, value] of points) {
    if (value !== null) path += isOn ? `L${x(step)} ${y(value)}` : `M${x(step)} ${y(value)}h0`;
    isOn = value !== null;
  }
  return path;
}

function bandPath(bands, low, high, x, y) {
  return runs(bands).map((run) => {
    const wide = run.length > 1 ? run : [[run[0][0], run[0][1]], [run[0][0], run[0][1]]];
    const there = wide.map(([step, five]) => `${x(step)} ${y(five[high])}`);
    const back = wide.map(([step, five]) => `${x(step)} ${y(five[low])}`).reverse();
    return `M${there.join("L")}L${back.join("L")}Z`;
  }).join("");
}

// Groups of successive bands without a gap.
function runs(bands) {
  const found = [[]];
  for (const band of bands) {
    if (band[1] !== null) found[found.length - 1].push(band);
    else if (found[found.length - 1].length) found.push([]);
  }
  return found.filter((run) => run.length);
}
