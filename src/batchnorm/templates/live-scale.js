// Scales: from numbers to pixels and colours, and round numbers to label them with.

// Viridis (Smith and van der Walt 2015), even in lightness, at nine places: the same order for every kind of colour vision.
const RAMP = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"].map((hex) => [
  parseInt(hex.slice(0, 2), 16), parseInt(hex.slice(2, 4), 16), parseInt(hex.slice(4), 16),
]);
const WIDE = 30; // ratio of high to low from which a logarithm shows more
const SAMPLE = 5000; // values that a colour scale is found from

// High is what stands out from the ground: dark on light, light on dark.
function colourAt(share, isDark) {
  const place = (isDark ? share : 1 - share) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((from, i) => Math.round(from + (RAMP[low + 1][i] - from) * (place - low)));
}

// A scale for the colours of these looks, from the 2nd to the 98th percentile of their values.
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

// Round numbers within [low, high], about so many.
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

// Steps as tick labels: short where they are thousands.
function stepTicks(low, high, count) {
  return ticks(low, high, count).filter((step) => Number.isInteger(step) && step >= 0).map((step) => [step, shortStep(step, high)]);
}

// All labels of an axis in one unit.
function shortStep(step, high) {
  if (step && high >= 1e6 && step % 1e4 === 0) return `${step / 1e6}M`;
  return step && high >= 1e4 && step % 100 === 0 ? `${step / 1e3}k` : whole(step);
}

// The index of the first step that is not below; steps are in order.
function firstFrom(rows, step) {
  let [low, high] = [0, rows.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rows[middle].step < step) low = middle + 1;
    else high = middle;
  }
  return low;
}
