// The page: draws the data that it has, and reacts to its controls.
const SAVED = byId("data") ? JSON.parse(byId("data").textContent) : null;
let isDue = false;

function draw() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    drawAll();
  });
}

function drawAll() {
  drawChoices();
  drawStatus();
  drawSlider();
  drawWords();
  drawHeat();
  drawReadout();
  drawLayer();
  drawLosses();
  drawEvents();
}

// -- status ---------------------------------------------------------------------------------------------------------

const STATES = { finished: "■ finished", writing: "● still writing", silent: "✕ stopped without an end: killed, or cut off" };

function drawStatus() {
  const { status } = told;
  if (!told.began) return;
  const place = byId("state");
  const ended = status.state === "finished" && status.reason !== "finished" ? `■ ended: ${status.reason}` : STATES[status.state];
  if (place.textContent !== ended) place.textContent = ended;
  place.className = `state ${status.state}`;
  byId("facts").replaceChildren(...facts(status).map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
}

function facts(status) {
  const events = told.totals.event ?? 0;
  return [
    ["step", whole(status.step)],
    ["steps per second", status.rate === null ? MISSING : number(status.rate)],
    ["cost of looking", status.cost === null ? MISSING : `${number(100 * status.cost)} %`],
    ["last update", lastUpdate(status)],
    ...(status.measured_on ? [["measured on", status.measured_on]] : []),
    ["events", events ? `! ${whole(events)}` : "✓ none"],
    ...(looksShown() ? [["looks shown", looksShown()]] : []),
    ...(status.damaged ? [["damaged lines", `! ${whole(status.damaged)}`]] : []),
  ];
}

function lastUpdate({ updated, now }) {
  if (SAVED) return `${new Date(updated * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`;
  const since = source.heard ? (performance.now() - source.heard) / 1000 : 0;
  return ago(now - updated + since);
}

function looksShown() {
  const tier = tierOf(view.quantity);
  const [have, all] = tier === null ? [0, 0] : [told.tiers[tier].length, told.totals[tier] ?? 0];
  return all > have ? `${whole(have)} of ${whole(all)}` : "";
}

// -- choices --------------------------------------------------------------------------------------------------------

function drawChoices() {
  const names = quantitiesThere();
  if (!names.includes(view.quantity)) view.quantity = ["shift", "gap", ...names].find((name) => names.includes(name)) ?? "";
  offer(byId("quantity"), names.map((name) => [name, titled(name)]), view.quantity);
  offer(byId("layer"), told.layers.map((name, i) => [String(i), name]), String(view.layer));
}

// Options are created again only if they changed, so that an open list stays open.
function offer(select, options, chosen) {
  const wanted = JSON.stringify(options);
  if (select.dataset.offered !== wanted) {
    select.replaceChildren(...options.map(([value, text]) => {
      const option = element("option", text);
      option.value = value;
      return option;
    }));
    select.dataset.offered = wanted;
  }
  if (select.value !== chosen) select.value = chosen;
}

function drawWords() {
  const { unit, reads, misleads, floor, formula, source: from } = words(view.quantity);
  byId("reads").textContent = reads;
  const rows = [["unit", unit], ["computed as", formula], ["where there is nothing to see", floor], ["misleads", misleads], ["source", from]];
  byId("about").replaceChildren(...rows.filter(([, text]) => text).flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
}

// -- time -----------------------------------------------------------------------------------------------------------

function drawSlider() {
  const steps = allSteps();
  const slider = byId("step");
  slider.max = Math.max(0, steps.length - 1);
  slider.disabled = steps.length < 2;
  const back = view.upTo === null ? -1 : steps.findLastIndex((step) => step <= view.upTo);
  slider.value = back < 0 ? slider.max : back;
  const text = view.upTo !== null ? whole(view.upTo) : steps.length ? `${whole(steps[steps.length - 1])} (latest)` : MISSING;
  byId("step-shown").textContent = text;
  slider.setAttribute("aria-valuetext", `step ${text}`);
  byId("now").disabled = view.upTo === null;
}

function lookBack() {
  const steps = allSteps();
  const place = Number(byId("step").value);
  view.upTo = place >= steps.length - 1 ? null : steps[place];
  draw();
}

function togglePause() {
  view.paused = !view.paused;
  byId("pause").setAttribute("aria-pressed", String(view.paused));
  byId("pause").textContent = view.paused ? "Resume" : "Pause";
  if (!view.paused) listen();
}

// -- the heat map's cursor ------------------------------------------------------------------------------------------

function moveCursor(columns, rows) {
  if (!heat.looks.length) return;
  const at = cursorCell() ?? { look: lastShown(), layer: view.layer };
  const look = Math.min(Math.max(at.look + (view.cursor ? columns : 0), 0), Math.max(0, lastShown()));
  const layer = Math.min(Math.max(at.layer + (view.cursor ? rows : 0), 0), told.layers.length - 1);
  view.cursor = { step: heat.looks[look].step, layer };
  showCursor();
}

function showCursor() {
  drawHeat();
  drawReadout();
}

function drawReadout() {
  const cell = cursorCell();
  const { title, unit } = words(view.quantity);
  const row = heat.looks[cell === null ? lastShown() : cell.look];
  const text = cell === null ? "No cell chosen." : `${told.layers[cell.layer]}, step ${whole(row.step)}: ${title} ${withUnit(row.values[view.quantity][cell.layer], unit)}`;
  if (byId("readout").textContent !== text) byId("readout").textContent = text;
  if (byId("column").open) drawColumn(row);
}

function drawColumn(row) {
  byId("column-title").textContent = row ? `${titled(view.quantity)} at step ${whole(row.step)}` : "Value";
  const cells = told.layers.map((name, i) => {
    const line = element("tr");
    line.append(element("td", name), element("td", withUnit(row?.values[view.quantity][i], words(view.quantity).unit)));
    return line;
  });
  byId("column-table").tBodies[0].replaceChildren(...cells);
}

const KEYS = {
  ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
  PageUp: [-10, 0], PageDown: [10, 0], Home: [-Infinity, 0], End: [Infinity, 0],
};

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (Object.hasOwn(KEYS, event.key)) moveCursor(...KEYS[event.key]);
  else if (event.key === "Enter" || event.key === " ") chooseLayer(cursorCell()?.layer ?? view.layer);
  else return;
  event.preventDefault();
}

function pointed(event) {
  const box = byId("heat").getBoundingClientRect();
  const layer = Math.floor((event.clientY - box.top - heat.plot.top) / heat.row);
  const look = lookAt(stepAt(event.clientX - box.left));
  if (layer < 0 || layer >= told.layers.length || event.clientX - box.left < heat.plot.left) return null;
  if (look >= 0) {
    view.cursor = { step: heat.looks[look].step, layer };
    showCursor();
  }
  return layer;
}

function chooseLayer(layer) {
  view.layer = layer;
  askPercentiles(true);
  draw();
}

// -- events ---------------------------------------------------------------------------------------------------------

function drawEvents() {
  const rows = shown(told.events);
  const hidden = (told.totals.event ?? 0) - told.events.length;
  byId("events-note").textContent = rows.length ? (hidden > 0 ? `The last ${told.events.length}; ${whole(hidden)} earlier ones are in the log.` : "") : "✓ Nothing to report up to this step.";
  byId("events").replaceChildren(...[...rows].reverse().map(eventItem));
}

function eventItem({ step, code, layer, message }) {
  const item = element("li");
  const rule = element("div");
  const slug = code && Object.hasOwn(WORDS.rules, code) ? WORDS.rules[code] : "";
  rule.append(element("div", code ? `! ${code} ${slug}` : "· note", code ? "rule" : ""));
  if (slug) rule.append(element("code", `batchnorm explain ${code}`));
  const said = element("div");
  if (layer !== null) said.append(layerButton(layer), ": ");
  said.append(message ?? "");
  item.append(element("div", `step ${whole(step)}`), rule, said);
  return item;
}

function layerButton(name) {
  const index = told.layers.indexOf(name);
  if (index < 0) return element("span", name);
  const button = element("button", name, "plain");
  button.type = "button";
  button.addEventListener("click", () => chooseLayer(index));
  return button;
}

// -- theme ----------------------------------------------------------------------------------------------------------

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;

function applyTheme() {
  const isDark = (chosenTheme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(isDark));
  if (told.began) drawHeat();
}

function toggleTheme() {
  chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  applyTheme();
}

// -- the beginning --------------------------------------------------------------------------------------------------

function connect() {
  const on = (id, kind, act) => byId(id).addEventListener(kind, act);
  on("pause", "click", togglePause);
  on("step", "input", lookBack);
  on("now", "click", () => { view.upTo = null; draw(); });
  on("theme", "click", toggleTheme);
  on("quantity", "change", () => { view.quantity = byId("quantity").value; draw(); });
  on("layer", "change", () => chooseLayer(Number(byId("layer").value)));
  on("column", "toggle", drawReadout);
  on("rest", "toggle", drawLayer);
  on("heat", "keydown", pressed);
  on("heat", "focus", () => { if (view.cursor === null && byId("heat").matches(":focus-visible")) moveCursor(0, 0); });
  on("heat", "pointermove", pointed);
  on("heat", "click", (event) => { const layer = pointed(event); if (layer !== null) chooseLayer(layer); });
  prefersDark.addEventListener("change", applyTheme);
  matchMedia("print").addEventListener("change", () => { if (told.began) drawAll(); });
  window.addEventListener("resize", () => { if (told.began) draw(); });
}

function begin() {
  connect();
  applyTheme();
  if (SAVED) {
    for (const id of ["pause", "save"]) byId(id).hidden = true;
    receive("log", SAVED);
    return;
  }
  byId("save").href = address("/page.html");
  listen();
  setInterval(() => { watchConnection(); drawStatus(); }, 1000);
}

begin();
