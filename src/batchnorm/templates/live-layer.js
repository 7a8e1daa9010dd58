// Charts of the chosen layer: its input and output, its statistics, gamma and beta, noise and gap, and other quantities.
const percentiles = { layer: -1, count: 0, steps: [], names: {}, problem: "" };
// quantities that are in one of the main charts
const GROUPED = ["gamma", "beta", "noise", "gap", "shift", "shift_floor", "drift"];
const OVER_CHANNELS = "median and 16 to 84 % of channels";

function drawLayer() {
  const note = [view.upTo === null ? "" : `As of step ${whole(view.upTo)}.`, percentiles.problem];
  byId("layer-note").textContent = note.filter(Boolean).join(" ");
  byId("layer-charts").replaceChildren(...(told.layers.length ? mainCharts(view.layer) : []));
  const rest = quantitiesThere().filter((name) => !GROUPED.includes(name));
  byId("rest").hidden = !rest.length;
  byId("rest-title").textContent = `What else was measured of it: ${rest.length} more`;
  const isShown = byId("rest").open || matchMedia("print").matches;
  byId("rest-charts").replaceChildren(...(isShown ? rest.map((name) => plainChart(name, view.layer)) : []));
}

function mainCharts(layer) {
  return [...ribbons(), statistics("mean"), statistics("var"), noiseChart(layer), affineChart(layer), shiftChart(layer)]
    .concat(tierOf("drift") ? [plainChart("drift", layer)] : []);
}

function bandsOf(name) {
  const rows = percentiles.names[name] ?? [];
  return rows.map((five, i) => [percentiles.steps[i], five]).filter(([step]) => view.upTo === null || step <= view.upTo);
}

// Both charts have the same scale; otherwise a layer that shrinks its values would look like one that does not.
function ribbons() {
  const received = { name: "median", style: "neutral", bands: bandsOf("quantiles_input") };
  const given = { name: "median", style: "with", bands: bandsOf("quantiles_output") };
  const domain = extent([received, given]);
  const unit = "value; median, 16 to 84 % and 2 to 98 %, same scale in both";
  return [
    chart({ title: "What the layer receives", unit, series: [received], domain }),
    chart({ title: "What it gives, in eval mode", unit, series: [given], domain }),
  ];
}

function statistics(name) {
  const series = [
    { name: "stored", style: "without", isOneOfTwo: true, bands: bandsOf(`running_${name}`) },
    { name: "batch", style: "with", dash: "dashed", isOneOfTwo: true, bands: bandsOf(`batch_${name}`) },
  ];
  const title = name === "mean" ? "Mean: stored against the probe batch's" : "Variance: stored against the probe batch's";
  return chart({ title, unit: `${name === "mean" ? "value" : "square of a value"}; ${OVER_CHANNELS}`, series });
}

// The gap that noise explains is the root of the noise; so both lines have the gap's unit.
function noiseChart(layer) {
  const root = points("noise", layer).map(([step, v]) => [step, v === null || v < 0 ? null : Math.sqrt(v)]);
  const series = [
    { name: "gap", style: "strong", points: points("gap", layer) },
    { name: "√noise, what noise explains", style: "neutral", dash: "dashed", points: root },
  ];
  return chart({ title: "Gap between train and eval mode, against noise", unit: words("gap").unit, series });
}

function affineChart(layer) {
  const series = [
    { name: "gamma, median of |γ|", style: "with", points: points("gamma", layer) },
    { name: "beta, median", style: "strong", dash: "dashed", points: points("beta", layer) },
  ];
  return chart({ title: "Gamma and beta", unit: "sd and mean of the output in train mode", series });
}

function shiftChart(layer) {
  const series = [
    { name: "shift", style: "strong", points: points("shift", layer) },
    { name: "noise floor", style: "neutral", dash: "dashed", points: points("shift_floor", layer) },
  ];
  return chart({ title: titled("shift"), unit: words("shift").unit, series });
}

function plainChart(name, layer) {
  return chart({ title: titled(name), unit: words(name).unit, series: [{ name, style: "strong", points: points(name, layer) }] });
}

function titled(name) {
  const { title } = words(name);
  return title[0] === undefined ? name : title[0].toUpperCase() + title.slice(1);
}

// Losses of the user and of the probe in one chart; every other logged number in a chart of its own.
function drawLosses() {
  const names = new Set(told.progress.flatMap((row) => Object.keys(row.values)));
  const isLoss = (name) => /loss/i.test(name);
  const own = [...names].filter(isLoss).slice(0, 6).map((name, i) => loggedSeries(name, i));
  const others = [...names].filter((name) => !isLoss(name)).slice(0, 12);
  const all = [...own, modelSeries("loss_train", "probe, train mode", "with"), modelSeries("loss_eval", "probe, eval mode", "without", "dashed")];
  const charts = [chart({ title: "Loss", unit: "as the loss is defined", series: all })];
  charts.push(...others.map((name) => chart({ title: name, unit: "as it was logged", series: [{ ...loggedSeries(name, 0), style: "strong" }] })));
  const gap = modelSeries("output_gap", "gap", "strong");
  if (gap.points.length) charts.push(chart({ title: titled("output_gap"), unit: words("output_gap").unit, series: [gap] }));
  byId("loss-charts").replaceChildren(...charts);
}

function loggedSeries(name, place) {
  const rows = shown(told.progress).filter((row) => Object.hasOwn(row.values, name));
  const dash = ["", "dashed", "dotted"][place % 3];
  return { name, style: place < 3 ? "neutral" : "strong", dash, points: rows.map((row) => [row.step, row.values[name]]) };
}

function modelSeries(name, label, style, dash = "") {
  const rows = shown(told.tiers.probe ?? []).filter((row) => Object.hasOwn(row.model, name));
  return { name: label, style, dash, points: rows.map((row) => [row.step, row.model[name]]) };
}
