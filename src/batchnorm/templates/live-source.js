// The source of the data: a stream, which reconnects by itself, or the data that were saved in the page.
const source = { stream: null, lastId: "", heard: 0, isLost: false, problem: "" };
const QUIET = 4000; // ms without a message after which the connection counts as lost; the server sends one every second
const RETRY = 1000;

const address = (path, more = {}) => {
  const given = new URLSearchParams({ token: new URLSearchParams(location.search).get("token") ?? "", ...more });
  return `${path}?${given}`;
};

function listen() {
  source.stream?.close();
  source.stream = new EventSource(address("/events", { since: source.lastId }));
  for (const kind of ["log", "more", "beat"]) source.stream.addEventListener(kind, (event) => hear(kind, event));
  source.stream.onerror = () => {
    lose();
    // the server refused, for example because it has another token: then the browser does not try again
    if (source.stream.readyState === EventSource.CLOSED) setTimeout(listen, RETRY);
  };
}

// A paused page reads only the status, and requests the other data when it resumes, which may be days later.
function hear(kind, event) {
  source.heard = performance.now();
  source.isLost = false;
  const data = JSON.parse(event.data);
  source.problem = data.problem ?? "";
  drawTrouble();
  if (view.paused) return receive("beat", data);
  if (event.lastEventId) source.lastId = event.lastEventId;
  receive(kind, data);
}

function receive(kind, data) {
  if (kind === "log") beginAnew(data);
  else if (kind === "more") take(data);
  else told.status = data.status ?? told.status;
  if (kind === "beat") drawStatus();
  else draw();
  if (told.arrays > percentiles.count || kind === "log") askPercentiles(kind === "log");
}

function lose() {
  source.isLost = true;
  drawTrouble();
}

function drawTrouble() {
  const lost = "Connection lost, trying again. If batchnorm watch was started again, open the address that it printed.";
  const words = source.isLost ? lost : source.problem;
  const place = byId("trouble");
  if (place.textContent !== words) place.textContent = words;
  place.hidden = !words;
}

function watchConnection() {
  if (!source.isLost && source.heard && performance.now() - source.heard > QUIET) lose();
}

// Requests percentiles of the chosen layer: only the new ones, or all if another layer was chosen.
async function askPercentiles(fromStart = false) {
  const layer = view.layer;
  if (fromStart || percentiles.layer !== layer) Object.assign(percentiles, { layer, count: 0, steps: [], names: {}, problem: "" });
  const first = percentiles.count;
  let found;
  try {
    found = SAVED ? SAVED.percentiles[layer] : await (await fetch(address("/layer", { index: layer, first }))).json();
  } catch {
    return; // the connection is lost; the next message asks again
  }
  if (!found || percentiles.layer !== layer || percentiles.count !== first) return;
  addPercentiles(found);
  draw();
}

function addPercentiles(found) {
  percentiles.problem = found.problem ?? "";
  if (found.problem) return;
  percentiles.count = found.count;
  percentiles.steps.push(...found.steps);
  for (const [name, rows] of Object.entries(found.names)) percentiles.names[name] = [...(percentiles.names[name] ?? []), ...rows];
}
