// What the page was told, and which part of it is looked at. A tier's looks are in the order of their steps.
const KEPT = 1200; // looks of a tier: twice what is sent at once, so that thinning is rare

const told = { layers: [], tiers: {}, progress: [], events: [], totals: {}, status: {}, arrays: 0, began: false };
const view = { quantity: "", layer: 0, cursor: null, upTo: null, paused: false };

function beginAnew(data) {
  const layer = told.layers[view.layer];
  Object.assign(told, { tiers: {}, progress: [], events: [], arrays: 0, began: true });
  for (const tier of WORDS.tiers) told.tiers[tier] = [];
  view.cursor = null;
  take(data);
  view.layer = Math.max(0, told.layers.indexOf(layer));
}

function take(data) {
  told.layers = data.layers;
  for (const tier of WORDS.tiers) told.tiers[tier] = joined(told.tiers[tier], data.tiers[tier]);
  told.progress = joined(told.progress, data.progress);
  told.events = [...told.events, ...data.events].slice(-200);
  told.totals = data.totals;
  told.arrays = data.totals.arrays;
  told.status = data.status;
}

// Appended, in order, and thinned by halves when there are too many; the last one stays.
function joined(rows, more) {
  if (!more.length) return rows;
  const isLater = !rows.length || rows[rows.length - 1].step <= more[0].step;
  let all = rows.concat(more);
  if (!isLater || more.some((row, i) => i && row.step < more[i - 1].step)) all.sort((a, b) => a.step - b.step);
  if (all.length > KEPT) all = all.filter((_, i) => (all.length - 1 - i) % 2 === 0);
  return all;
}

// The rows up to the step that is looked back to.
function shown(rows) {
  return view.upTo === null ? rows : rows.filter((row) => row.step <= view.upTo);
}

// The tier that has a quantity, the one with most looks if there are several.
function tierOf(quantity) {
  const having = WORDS.tiers.filter((tier) => (told.tiers[tier] ?? []).some((row) => quantity in row.values));
  return having.sort((a, b) => told.tiers[b].length - told.tiers[a].length)[0] ?? null;
}

function looksOf(quantity) {
  const tier = tierOf(quantity);
  return tier === null ? [] : told.tiers[tier].filter((row) => Object.hasOwn(row.values, quantity));
}

// Quantities that the log has, in the order in which they are explained.
function quantitiesThere() {
  const there = new Set();
  for (const tier of WORDS.tiers) for (const row of told.tiers[tier]) Object.keys(row.values).forEach((q) => there.add(q));
  const known = Object.keys(WORDS.quantities).filter((name) => there.has(name));
  return [...known, ...[...there].filter((name) => !known.includes(name)).sort()];
}

// Every step that was looked at; those of the progress where none was.
function allSteps() {
  const looks = WORDS.tiers.flatMap((tier) => told.tiers[tier] ?? []);
  const steps = new Set((looks.length ? looks : told.progress).map((row) => row.step));
  return [...steps].sort((a, b) => a - b);
}

// First and last step of all time axes.
function stepRange() {
  const rows = [...WORDS.tiers.map((tier) => told.tiers[tier] ?? []), told.progress].filter((list) => list.length);
  if (!rows.length) return [0, 1];
  const low = Math.min(...rows.map((list) => list[0].step));
  const high = Math.max(...rows.map((list) => list[list.length - 1].step));
  return high > low ? [low, high] : [Math.max(0, low - 1), high + (low ? 0 : 1)];
}

// A layer's values of one quantity as points of a chart.
function points(quantity, layer) {
  return shown(looksOf(quantity)).map((row) => [row.step, row.values[quantity][layer] ?? null]);
}
