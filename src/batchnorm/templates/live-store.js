// The data that the server sent, and the part of them that is shown. The looks of a tier are in the order of their steps.
const KEPT = 1200; // most looks of a tier: twice as many as the server sends at once, so that thinning is rare

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

// Both lists of rows in order of steps. If there are too many rows, every second one is left out, but not the last.
function joined(rows, more) {
  if (!more.length) return rows;
  const isLater = !rows.length || rows[rows.length - 1].step <= more[0].step;
  let all = rows.concat(more);
  if (!isLater || more.some((row, i) => i && row.step < more[i - 1].step)) all.sort((a, b) => a.step - b.step);
  if (all.length > KEPT) all = all.filter((_, i) => (all.length - 1 - i) % 2 === 0);
  return all;
}

// The rows up to the step that is shown.
function shown(rows) {
  return view.upTo === null ? rows : rows.filter((row) => row.step <= view.upTo);
}

// The tier that has a quantity; of several, the tier with the most looks; null if no tier has it.
function tierOf(quantity) {
  const having = WORDS.tiers.filter((tier) => (told.tiers[tier] ?? []).some((row) => quantity in row.values));
  return having.sort((a, b) => told.tiers[b].length - told.tiers[a].length)[0] ?? null;
}

function looksOf(quantity) {
  const tier = tierOf(quantity);
  return tier === null ? [] : told.tiers[tier].filter((row) => Object.hasOwn(row.values, quantity));
}

// The quantities in the log, in the order of WORDS.quantities; unknown quantities come last, by name.
function quantitiesThere() {
  const there = new Set();
  for (const tier of WORDS.tiers) for (const row of told.tiers[tier]) Object.keys(row.values).forEach((q) => there.add(q));
  const known = Object.keys(WORDS.quantities).filter((name) => there.has(name));
  return [...known, ...[...there].filter((name) => !known.includes(name)).sort()];
}

// The steps of all looks; if there are no looks, the steps of the progress.
function allSteps() {
  const looks = WORDS.tiers.flatMap((tier) => told.tiers[tier] ?? []);
  const steps = new Set((looks.length ? looks : told.progress).map((row) => row.step));
  return [...steps].sort((a, b) => a - b);
}

// The first and last step, which all time axes share.
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
