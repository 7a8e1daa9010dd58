// The heat map: a row for each layer, a column for each look, as wide as the steps that the look covers. A look is one
// measurement of all layers. Cells without a measurement are hatched.
const LABEL = 11; // pixels of a letter's height
const UNSEEN = 3; // a look covers at most this many times the usual distance between looks
const heat = { plot: { left: 0, top: 6, width: 1, height: 1 }, looks: [], widths: [], scale: null, range: [0, 1], row: 10 };

const themeIsDark = () => document.documentElement.dataset.theme === "dark" && !matchMedia("print").matches;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function drawHeat() {
  const canvas = byId("heat");
  heat.looks = looksOf(view.quantity);
  heat.scale = colourScale(heat.looks, view.quantity);
  heat.range = stepRange();
  heat.widths = columnWidths(heat.looks);
  if (heat.looks.length) heat.range[0] = Math.min(heat.range[0], heat.looks[0].step - heat.widths[0]); // with its whole column
  const context = sized(canvas);
  drawMissing(context);
  drawCells(context);
  drawAxes(context);
  drawCursor(context);
  drawLegend();
  canvas.dataset.columns = heat.looks.length;
  canvas.setAttribute("aria-label", heatLabel());
  if (heat.looks.length && !performance.getEntriesByName("heat map drawn").length) performance.mark("heat map drawn");
}

function heatLabel() {
  const last = heat.looks.length ? `, up to step ${whole(heat.looks[heat.looks.length - 1].step)}` : ", nothing measured yet";
  return `${words(view.quantity).title}: ${told.layers.length} layers by ${heat.looks.length} looks${last}`;
}

// The number of steps that each look covers: back to the look before, but not across a hole in the log.
function columnWidths(looks) {
  const apart = looks.slice(1).map((row, i) => row.step - looks[i].step);
  const usual = [...apart].sort((a, b) => a - b)[apart.length >> 1] || Math.max(1, (heat.range[1] - heat.range[0]) / 50);
  return looks.map((_, i) => (i ? Math.min(apart[i - 1], UNSEEN * usual) : usual));
}

function sized(canvas) {
  const width = canvas.clientWidth || canvas.parentElement.clientWidth || 600;
  const layers = Math.max(1, told.layers.length);
  heat.row = Math.min(22, Math.max(480 / layers, layers > 80 ? 1 : 8, 2));
  const height = Math.min(heat.row * layers, 900);
  heat.row = height / layers;
  const context = canvas.getContext("2d");
  context.font = `${LABEL}px ${getComputedStyle(canvas).fontFamily}`;
  const widest = Math.max(30, ...told.layers.map((name) => context.measureText(name.slice(-60)).width));
  const left = Math.ceil(Math.min(widest + 18, width * 0.34, 220));
  heat.plot = { left, top: 6, width: Math.max(10, width - left - 14), height };
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round((height + 42) * ratio);
  canvas.style.height = `${height + 42}px`;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.font = `${LABEL}px ${getComputedStyle(canvas).fontFamily}`;
  return context;
}

const xOf = (step) => heat.plot.left + ((step - heat.range[0]) / (heat.range[1] - heat.range[0])) * heat.plot.width;
const stepAt = (x) => heat.range[0] + ((x - heat.plot.left) / heat.plot.width) * (heat.range[1] - heat.range[0]);

function drawMissing(context) {
  const { left, top, height } = heat.plot;
  const right = view.upTo === null ? left + heat.plot.width : xOf(view.upTo);
  context.save();
  context.beginPath();
  context.rect(left, top, Math.max(0, right - left), height);
  context.clip();
  context.strokeStyle = colour("rule");
  context.lineWidth = 1.5;
  context.beginPath();
  for (let x = left - height; x < right; x += 7) {
    context.moveTo(x, top + height);
    context.lineTo(x + height, top);
  }
  context.stroke();
  context.restore();
}

// Cells are drawn one pixel high and then stretched to the rows, so the time does not depend on the window's height.
function drawCells(context) {
  if (!heat.looks.length) return;
  const [width, layers] = [Math.max(1, Math.round(heat.plot.width * (window.devicePixelRatio || 1))), told.layers.length];
  const image = new ImageData(width, Math.max(1, layers));
  const [isDark, paint] = [themeIsDark(), new Map()];
  for (let x = 0; x < width; x++) {
    const i = lookAt(heat.range[0] + ((x + 0.5) / width) * (heat.range[1] - heat.range[0]));
    if (i < 0) continue;
    const values = heat.looks[i].values[view.quantity];
    for (let layer = 0; layer < layers; layer++) {
      if (values[layer] === null) continue;
      const share = Math.round(heat.scale.share(values[layer]) * 255);
      if (!paint.has(share)) paint.set(share, colourAt(share / 255, isDark));
      image.data.set([...paint.get(share), 255], 4 * (layer * width + x));
    }
  }
  const stage = new OffscreenCanvas(width, Math.max(1, layers));
  stage.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(stage, heat.plot.left, heat.plot.top, heat.plot.width, heat.plot.height);
}

// The index of the look that covers a step; -1 if no look does.
function lookAt(step) {
  const i = firstFrom(heat.looks, step);
  if (i >= heat.looks.length || (view.upTo !== null && heat.looks[i].step > view.upTo)) return -1;
  return step > heat.looks[i].step - heat.widths[i] ? i : -1;
}

function drawAxes(context) {
  const { left, top, width, height } = heat.plot;
  context.strokeStyle = colour("axis");
  context.lineWidth = 1;
  context.strokeRect(left - 0.5, top - 0.5, width + 1, height + 1);
  context.textBaseline = "middle";
  drawLayerNames(context);
  context.fillStyle = colour("muted");
  context.textAlign = "center";
  for (const [step, label] of stepTicks(...heat.range, Math.max(2, Math.min(8, width / 90)))) {
    context.fillRect(xOf(step), top + height, 1, 4);
    context.fillText(label, xOf(step), top + height + 13);
  }
  context.textAlign = "right";
  context.fillText("optimizer step", left + width, top + height + 30);
}

function drawLayerNames(context) {
  const every = Math.max(1, Math.ceil((LABEL + 2) / heat.row));
  context.textAlign = "right";
  told.layers.forEach((name, i) => {
    const isChosen = i === view.layer;
    const isNear = Math.abs(i - view.layer) < every;
    if (!isChosen && (i % every || isNear)) return;
    context.fillStyle = colour(isChosen ? "ink" : "muted");
    const y = heat.plot.top + (i + 0.5) * heat.row;
    context.fillText(fitted(context, name, heat.plot.left - 18) + (isChosen ? " ▸" : ""), heat.plot.left - (isChosen ? 3 : 12), y);
  });
}

// The name, cut at its beginning if it is too wide: the end of a layer's name distinguishes it best.
function fitted(context, name, width) {
  let kept = name.slice(-60);
  if (kept.length === name.length && context.measureText(kept).width <= width) return kept;
  while (kept.length > 1 && context.measureText(`…${kept}`).width > width) kept = kept.slice(1);
  return `…${kept}`;
}

function drawCursor(context) {
  const cell = cursorCell();
  if (cell === null) return;
  const right = xOf(heat.looks[cell.look].step);
  const left = Math.min(right - 3, xOf(heat.looks[cell.look].step - heat.widths[cell.look]));
  const box = [left - 1, heat.plot.top + cell.layer * heat.row - 1, right - left + 2, heat.row + 2];
  for (const [name, width] of [["ground", 4], ["ink", 2]]) {
    context.strokeStyle = colour(name);
    context.lineWidth = width;
    context.strokeRect(...box);
  }
}

// The cell under the cursor. The cursor keeps its step when columns are added or thinned out.
function cursorCell() {
  if (view.cursor === null || !heat.looks.length) return null;
  const last = lastShown();
  const look = Math.min(firstFrom(heat.looks, view.cursor.step), last);
  return look < 0 ? null : { look, layer: Math.min(view.cursor.layer, told.layers.length - 1) };
}

function lastShown() {
  return view.upTo === null ? heat.looks.length - 1 : firstFrom(heat.looks, view.upTo + 1) - 1;
}

function drawLegend() {
  const { scale } = heat;
  const [canvas, list, unit] = [byId("ramp"), byId("ramp-numbers"), words(view.quantity).unit];
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${colourAt(x / (canvas.width - 1), themeIsDark()).join(",")})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
  canvas.hidden = scale === null;
  list.replaceChildren(...(scale === null ? [element("li", "nothing measured yet")] : legendItems(scale, unit)));
}

function legendItems(scale, unit) {
  const items = [["left", scale.low], ["middle", scale.value(0.5)], ["right", scale.high]].map(([place, value]) => {
    const item = element("li", `${place} `);
    item.append(element("strong", number(value)));
    return item;
  });
  if (scale.low === scale.high) items.splice(0, 2);
  const notes = [unit || "no unit", scale.isLog ? "logarithmic" : "", scale.beyond ? "what is beyond has the colour of the end" : ""];
  return [...items, ...[...notes, "hatched: not measured"].filter(Boolean).map((note) => element("li", note))];
}
