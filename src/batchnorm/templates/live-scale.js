// Scales: colours of numbers, and round numbers as labels of axes.

// Nine colours of viridis (Smith and van der Walt 2015): lightness rises evenly, so every kind of colour vision sees the
// same order.
const RAMP = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"].map((hex) => [
  parseInt(hex.slice(0, 2), 16), parseInt(hex.slice(2, 4), 16), parseInt(hex.slice(4), 16),
]);
const WIDE = 30; // if high / low is above this, the scale is logarithmic
const SAMPLE = 5000; // the most values from which a colour scale is computed

// The colour of a share from 0 to 1. High values contrast with the background: dark on light, light on dark.
function colourAt(share, isDark) {
  const place = (isDark ? share : 1 - share) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((from, i) => Math.round(from + (RAMP[low + 1][i] - from) * (place - low)));
}

// The colour scale of these looks, from the 2nd to the 98th percentile of their values; null without values.
function colourScale(looks, quantity) {
  const values = sampled(looks, quantity).sort((a, b) => a - b);
  if (!values.length) return null;
  const at = (share) => values[Math.round(share * (values.length - 1))];
  let [low, high] = [at(0.02), at(0.98)];
  if (low === high) [low, high] = [values[0], values[values.length - 1]];
  const isLog = low > 0 && high / low > WIDE;
  const warp = isLog ? Math.log : (v) => v;
  const span = warp(high) - warp(low);
  const share = (v) => (span > 0 ? Math.min(1, Math.max(0, (warp(Math.max(v, isLog ? low : v)) - warp(low)) / span)) : 0.5);
  const value = (s) => (isLog ? Math.exp(warp(low) + s * span) : low + s * span);
  return { low, high, isLog, share, value, beyond: values[0] < low || values[values.length - 1] > high };
}

function sampled(looks, quantity) {
  const stride = Math.max(1, Math.ceil((looks.length * told.layers.length) / SAMPLE));
  const values = [];
  let count = 0;
  for (const row of looks) for (const v of row.values[quantity]) if (v !== null && count++ % stride === 0) values.push(v);
  return values;
}

// About `count` round numbers within [low, high].
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  if (!(raw > 0) || !Number.isFinite(raw)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let i = first; i * step <= high + step * 1e-6; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Steps with their tick labels; thousands are written short.
function stepTicks(low, high, count) {
  return ticks(low, high, count).filter((step) => Number.isInteger(step) && step >= 0).map((step) => [step, shortStep(step, high)]);
}

// A step as label; all labels of an axis have the same unit, which `high` decides.
function shortStep(step, high) {
  if (step && high >= 1e6 && step % 1e4 === 0) return `${step / 1e6}M`;
  return step && high >= 1e4 && step % 100 === 0 ? `${step / 1e3}k` : whole(step);
}

// The index of the first row whose step is at least `step`; rows are in order of steps.
function firstFrom(rows, step) {
  let [low, high] = [0, rows.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rows[middle].step < step) low = middle + 1;
    else high = middle;
  }
  return low;
}
