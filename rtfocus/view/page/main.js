// Main: the socket, what is looked at, and the controls around the image.

import { unpack, RAW, RESTORED, DEFOCUS, EXPECTED_ERROR, ABSENT, DETAIL, LIVE, UNREADABLE } from "./codec.js";
import { openDrawing } from "./drawing.js";
import { Histogram, sample, statistics } from "./histogram.js";
import { MAPS, duration, quantile, short, tileInWords } from "./maps.js";
import { Stage } from "./stage.js";
import { Traces } from "./traces.js";

const $ = (id) => document.getElementById(id);
const NAMES = { [RAW]: "raw", [RESTORED]: "restored" };
const AXES = ["t", "p", "c", "z"];
const WORDS = { gone: "no processor", waiting: "waiting for a series", running: "live", recording: "recording", finished: "finished" };
const STEPS = { capture_to_estimate: "defocus known after", arrival_to_result: "restored after", arrival_to_durable: "saved after" };
const MOST_DETAIL = 4096 * 2048;

const state = { series: null, picture: null, told: null, follow: true, place: { t: 0, p: null, c: null, z: null }, windows: new Map(), map: DEFOCUS, pictures: 0, connected: false, answer: "" };
let socket = null, detailTimer = 0, drawWanted = false;

const drawing = openDrawing($("pixels"), new URLSearchParams(location.search).get("renderer"), () => { showLost(); wantDraw(); });
const stage = new Stage($("stage"), drawing.canvas, $("overlay"), () => { wantDraw(); wantDetail(); });
const histogram = new Histogram($("histogram"), (window) => setWindow("hand", window));
const traces = new Traces({ focus: $("focus-plot"), stage: $("stage-plot"), loop: $("loop-plot") }, (place) => scrub(place));

// ---- the socket -------------------------------------------------------------

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/socket`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => { state.connected = true; select(); };
  socket.onclose = () => { state.connected = false; showState(); setTimeout(connect, 1000); };
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") return takeText(JSON.parse(data));
    try { takePicture(unpack(data)); } finally { send({ type: "ack", number: new DataView(data).getUint32(8, true) }); }
  };
}

function send(message) { if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); }

function takeText(message) {
  if (message.type === "series") takeSeries(message);
  else if (message.type === "traces") traces.add(message.rows, message.marks);
  else if (message.type === "state") takeState(message);
  else if (message.type === "refused") say(message.why);
  else if (message.type === "answer") $("answer").textContent = message.why || `${message.what.replace("_", " ")}: passed on to the microscope`;
  wantDraw();
}

function takeSeries(series) {
  state.series = series; state.picture = null; state.place = { t: 0, p: null, c: null, z: null }; state.follow = true;
  traces.clear(); state.windows.clear();
  const place = series.folder ? `${series.folder}` : "";
  $("name").textContent = series.name; $("name").title = place + (series.host ? ` on ${series.host}` : "");
  const fill = (select, names, any) => select.replaceChildren(...(any ? [new Option("any", "")] : []), ...names.map((name, i) => new Option(name, i)));
  fill($("p"), series.positions, series.positions.length > 1);
  fill($("c"), series.channels, series.channels.length > 1);
  for (const axis of ["p", "c"]) $(axis).parentElement.hidden = $(axis).options.length < 2;
  $("z").parentElement.hidden = (series.sizes.z ?? 1) < 2;
  stage.setFrame(series.shape[1], series.shape[0]);
  const size = `${series.shape[1]} × ${series.shape[0]} px, ${short(series.pixel_size_um, 4)} µm/px, ${series.bit_depth ?? 8 * Number(series.dtype.slice(2))} bit`;
  $("facts").textContent = size;
  $("contrast-of").textContent = "";
  select();
}

function takeState(told) {
  state.told = told;
  if (told.state === "running" && state.series) traces.addLoop(told.numbers);
  if (told.state === "finished") traces.setTotals(told.numbers);
  const series = state.series;
  if (series) {
    const newest = told.newest?.[0] ?? state.picture?.t ?? 0;
    $("t").max = Math.max(series.sizes.t ? Math.min(series.sizes.t - 1, Math.max(newest, Number($("t").value))) : newest, 0);
    $("z").max = Math.max((series.sizes.z ?? 1) - 1, 0);
    for (const axis of ["t", "z"]) $(axis).disabled = !told.browse;
  }
  showState();
}

function takePicture(picture) {
  state.pictures++;
  if (picture.flags & DETAIL) {
    if (!state.picture || !samePlace(picture, state.picture)) return;
    for (const kind of [RAW, RESTORED]) if (picture.planes[kind] && Math.max(picture.planes[kind].width, picture.planes[kind].height) <= drawing.most) drawing.put(`${kind}detail`, picture.planes[kind]);
    wantDraw();
    return;
  }
  if (!state.follow && !samePlace(picture, resolved())) return;
  state.picture = picture;
  stage.setFrame(picture.width, picture.height);
  for (const kind of [RAW, RESTORED]) {
    drawing.drop(`${kind}detail`);
    if (picture.planes[kind]) drawing.put(kind, picture.planes[kind]); else drawing.drop(kind);
  }
  if (!(picture.flags & ABSENT)) offerMaps(picture);
  const count = [RAW, RESTORED].filter((kind) => picture.planes[kind]).length;
  if (count !== stage.count) { stage.count = count; if (stage.fitted) stage.fit(); }
  const where = `t ${picture.t}, position ${state.series?.positions[picture.p] ?? picture.p}, z ${picture.z}`;
  const unread = picture.flags & UNREADABLE ? `cannot be read, rtfocus check names the files: ${where}` : "";
  say(picture.flags & ABSENT ? `no frame here: ${where}` : unread);
  findWindows(picture);
  if (state.follow) { $("t").max = Math.max($("t").max, picture.t); $("t").value = picture.t; if (state.place.z === null) $("z").value = picture.z; }
  traces.setChannel(picture.c); traces.setCursor(picture.seconds);
  wantDraw(); wantDetail();
}

// What is stated of this picture alone can be chosen; what was chosen comes back with it.
function offerMaps(picture) {
  const kinds = [...MAPS.keys()].filter((kind) => picture.planes[kind]), select = $("map-of");
  if (select.dataset.kinds !== kinds.join()) {
    select.dataset.kinds = kinds.join();
    select.replaceChildren(...kinds.map((kind) => new Option(MAPS.get(kind).name, kind)));
    $("map-row").hidden = !kinds.length;
  }
  if (!kinds.length) return;
  select.value = String(kinds.includes(state.map) ? state.map : kinds[0]);
  stage.setMap(shownMap());
}

function shownMap() { return state.picture?.planes[Number($("map-of").value || NaN)]; }

function chooseMap(kind) {
  state.map = kind;
  if (state.picture) offerMaps(state.picture);
  wantDraw();
}

function nextMap() {
  const kinds = [...$("map-of").options].map((option) => Number(option.value));
  if (kinds.length) chooseMap(kinds[(kinds.indexOf(Number($("map-of").value)) + 1) % kinds.length]);
}

function samePlace(a, b) { return AXES.every((axis) => a[axis] === b[axis]); }

function resolved() { const { t, p, c, z } = state.place; return { t, p: p ?? 0, c: c ?? 0, z: z ?? 0 }; }

// ---- what is looked at ------------------------------------------------------

function select() { send({ type: "select", follow: state.follow, ...(state.follow ? { ...state.place, t: null } : resolved()) }); }

function follow() { state.follow = true; state.place.z = null; select(); wantDraw(); }

function scrub(change) {
  if (!state.told?.browse) { say("the run folder is not on this machine: the newest frames alone can be shown"); return; }
  const now = state.picture ?? { t: 0, p: 0, c: 0, z: 0 }, series = state.series;
  const place = state.follow ? { t: now.t, p: now.p, c: now.c, z: now.z } : resolved();
  Object.assign(place, change);
  place.t = Math.min(Math.max(place.t, 0), Number($("t").max));
  place.z = Math.min(Math.max(place.z, 0), (series?.sizes.z ?? 1) - 1);
  state.follow = false; state.place = place;
  $("t").value = place.t; $("z").value = place.z;
  for (const axis of ["p", "c"]) $(axis).value = String(place[axis]);
  select(); wantDraw();
}

function pick(axis) {
  const value = $(axis).value === "" ? null : Number($(axis).value);
  if (!state.follow) { scrub({ [axis]: value ?? 0 }); return; }
  state.place[axis] = value; select();
}

// All pixels of what is seen, where the picture has fewer than the screen could show.
function wantDetail() {
  clearTimeout(detailTimer);
  detailTimer = setTimeout(() => {
    const picture = state.picture, plane = picture?.planes[RAW] ?? picture?.planes[RESTORED];
    if (!plane || plane.step <= 1 || !state.told?.browse || stage.view.zoom * plane.step < 1.2) return;
    const part = stage.visible(), width = part.x1 - part.x0, height = part.y1 - part.y0;
    if (width < 1 || height < 1 || width * height > MOST_DETAIL) return;
    send({ type: "detail", ...part, t: picture.t, p: picture.p, c: picture.c, z: picture.z });
  }, 150);
}

// ---- contrast ---------------------------------------------------------------

function shownKind() { return Number($("kind").value); }

function windowOf(kind, channel) {
  const key = `${$("linked").checked ? RAW : kind} ${channel}`;
  if (!state.windows.has(key)) state.windows.set(key, { mode: "percentile", window: null, low: 0.1, high: 99.8 });
  return state.windows.get(key);
}

function found(sorted, held) {
  if (held.mode === "minmax") return [sorted[0], sorted[sorted.length - 1]];
  return [quantile(sorted, held.low / 100), quantile(sorted, held.high / 100)];
}

function findWindows(picture) {
  for (const kind of [RAW, RESTORED]) {
    const plane = picture.planes[kind];
    if (!plane || ($("linked").checked && kind === RESTORED && picture.planes[RAW])) continue;
    const held = windowOf(kind, picture.c);
    if (held.mode === "hand" && held.window) continue;
    const [low, high] = found(sample(plane, stage.roi), held), before = held.window;
    // Noise must not make the picture flicker: a window that nearly fits stays.
    const slack = before ? 0.04 * (before[1] - before[0]) : 0;
    if (!before || held.mode === "minmax" || Math.abs(low - before[0]) > slack || Math.abs(high - before[1]) > slack) held.window = [low, high > low ? high : low + 1];
  }
}

function setWindow(mode, window) {
  if (!state.picture) return;
  const held = windowOf(shownKind(), state.picture.c);
  held.mode = mode; held.window = window;
  findWindows(state.picture); showContrast(true); wantDraw();
}

function showContrast(now) {
  const picture = state.picture, plane = picture?.planes[shownKind()] ?? picture?.planes[RAW];
  if (!plane || (!now && performance.now() - (showContrast.last ?? 0) < 250)) return;
  showContrast.last = performance.now();
  const sorted = sample(plane, stage.roi), held = windowOf(shownKind(), picture.c);
  histogram.show(sorted, held.window ?? [0, 1], state.series?.saturation);
  if (document.activeElement !== $("low")) $("low").value = Number((held.window?.[0] ?? 0).toPrecision(5));
  if (document.activeElement !== $("high")) $("high").value = Number((held.window?.[1] ?? 1).toPrecision(5));
  $("contrast-mode").value = held.mode;
  $("percentiles").hidden = held.mode !== "percentile";
  $("percent-low").value = held.low; $("percent-high").value = held.high;
  if (state.series?.channels.length > 1) $("contrast-of").textContent = `of ${state.series.channels[picture.c]}`;
  const { mean, sd, min, max } = statistics(sorted), roi = stage.roi;
  const size = roi ? `region ${roi.x1 - roi.x0} × ${roi.y1 - roi.y0} px` : "whole frame";
  $("statistics").textContent = `${size}: mean ${short(mean, 4)}, sd ${short(sd)}, min ${short(min, 4)}, max ${short(max, 4)} counts`;
}

// ---- drawing ----------------------------------------------------------------

function wantDraw() {
  if (drawWanted) return;
  drawWanted = true;
  requestAnimationFrame(draw);
}

function draw() {
  drawWanted = false;
  const picture = state.picture, planes = picture?.planes ?? {};
  const panes = stage.panes(planes).map((pane) => ({
    ...pane, view: stage.view, window: windowOf(pane.kind, picture.c).window ?? [0, 1],
    saturation: pane.kind === RAW ? state.series?.saturation : null, mark: $("mark").checked,
  }));
  drawing.draw(panes, stage.frame);
  stage.drawOverlay(panes, { planes, map: $("map").checked ? shownMap() : null, alpha: Number($("alpha").value) / 100, mark: $("mark").checked, pixelUm: state.series?.pixel_size_um });
  showContrast(false); showFrame(); traces.show(); showKeys();
}

function list(box, rows) {
  box.replaceChildren(...rows.filter(Boolean).flatMap(([name, value, bad]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name; dd.textContent = value; if (bad) dd.className = "bad";
    return [dt, dd];
  }));
}

function showFrame() {
  const picture = state.picture, series = state.series;
  $("follow").setAttribute("aria-pressed", String(state.follow));
  $("split-box").hidden = stage.mode !== "split";
  $("saturated").textContent = ""; $("saturated").className = "";
  for (const kind of [RAW, RESTORED]) {
    const link = $(`tiff-${NAMES[kind]}`), there = picture?.planes[kind];
    link.classList.toggle("off", !there);
    if (there) link.href = `/snapshot.tif?kind=${NAMES[kind]}${AXES.map((axis) => `&${axis}=${picture[axis]}`).join("")}${stage.roi ? `&region=${stage.roi.y0},${stage.roi.x0},${stage.roi.y1},${stage.roi.x1}` : ""}`;
  }
  if (!picture || !series) return list($("frame-facts"), [["", "no frame yet"]]);
  $("t-text").textContent = `${Number($("t").value) + 1} / ${Number($("t").max) + 1}`;
  $("z-text").textContent = `${Number($("z").value) + 1} / ${Number($("z").max) + 1}`;
  if (picture.saturated !== null && !(picture.flags & ABSENT)) {
    const part = (100 * picture.saturated) / (picture.width * picture.height);
    $("saturated").textContent = picture.saturated ? `${picture.saturated} px = ${short(part, 2)} % of the frame` : "none in the frame";
    $("saturated").className = picture.saturated ? "some" : "";
  }
  const sign = picture.defocusUm === null ? "no specimen seen" : `${picture.signed ? (picture.defocusUm > 0 ? "+" : "") : "|dz| "}${picture.defocusUm.toFixed(2)} µm (${Math.round(100 * picture.confidence)} %)`;
  const step = picture.planes[RAW]?.step ?? 1;
  list($("frame-facts"), [
    ["place", `t ${picture.t + 1}, ${series.positions[picture.p] ?? picture.p}, ${series.channels[picture.c]}, z ${picture.z + 1}`],
    ["time", picture.seconds === null ? "not known" : `${picture.seconds.toFixed(2)} s after the start`],
    ["stage z", picture.zUm === null ? "not known" : `${picture.zUm.toFixed(2)} µm`],
    ["defocus", sign], errorRow(picture), ["exposure", `${short(picture.exposureMs)} ms`],
    ["shown", `${picture.flags & LIVE ? "live" : "from the run folder"}${step > 1 ? `, every ${step}. pixel` : ""}, ${(100 * stage.view.zoom / stage.ratio).toFixed(0)} %`],
    ...underPointer(picture),
  ]);
}

// Also when another picture comes while the pointer rests.
function underPointer({ planes }) {
  const at = state.pointer, plane = planes[at?.kind];
  if (!plane) return [];
  const x = Math.floor(at.frameX), y = Math.floor(at.frameY);
  if (x < 0 || y < 0 || x >= stage.frame.width || y >= stage.frame.height) return [];
  // Of a reduced picture the nearest pixel that it has, where that lies in the frame.
  const column = Math.min(Math.floor(x / plane.step), plane.width - 1), row = Math.min(Math.floor(y / plane.step), plane.height - 1);
  const i = plane.samples * (row * plane.width + column);
  const counts = [...Array(plane.samples).keys()].map((s) => short(plane.pixels[i + s] * plane.scale + plane.offset, 5));
  const tile = tileInWords(planes, at.frameX, at.frameY);
  return [["pointer", `x ${column * plane.step}, y ${row * plane.step}: ${counts.join(", ")} counts`], tile ? ["tile", tile] : null];
}

function errorRow({ planes }) {
  // Of tiles without a number none is stated.
  const pixels = planes[EXPECTED_ERROR]?.pixels.filter((value) => !Number.isNaN(value));
  return pixels?.length ? ["expected error", `${short(Math.sqrt(pixels.reduce((sum, one) => sum + one * one, 0) / pixels.length))} counts rms`] : null;
}

function showState() {
  const told = state.told, word = state.connected ? WORDS[told?.state] ?? "connecting" : "the view has ended";
  $("state").textContent = word;
  $("state").dataset.state = state.connected ? told?.state ?? "gone" : "gone";
  if (!told) return;
  $("control-card").hidden = !told.control;
  for (const button of document.querySelectorAll("[data-ask]")) button.disabled = button.dataset.ask in told.cannot;
  $("cannot").textContent = [...new Set(Object.values(told.cannot))].join("; ");
  const n = told.numbers, lost = { ...n.dropped, ...n.in_error }, number = Object.values(lost).reduce((a, b) => a + b, 0);
  const latency = Object.entries(n.latency_ms ?? {}).filter(([, [half]]) => half !== null).map(([step, [half, most]]) => [STEPS[step] ?? step, `median ${short(half)} ms, 99 % within ${short(most)} ms`]);
  list($("loop-facts"), [
    ["frames", `${n.written ?? told.written ?? "–"} written${n.acquired ? ` of ${n.acquired} acquired` : ""}${n.planned ? `, ${n.planned} planned` : ""}`],
    n.focus ? ["probes", `${n.focus} images of autofocus`] : null,
    n.frames_per_s === undefined ? null : ["speed", `${short(n.frames_per_s)} frames/s`],
    ...latency,
    n.free_slots === undefined ? (n.slots ? ["slots", `${n.slots}`] : null) : ["slots", `${n.free_slots} of ${n.slots} free`],
    n.queues ? ["queues", Object.entries(n.queues).map(([name, [held, most]]) => `${name} ${held}/${most}`).join(", ")] : null,
    ["lost", number ? `${number}: ${Object.entries(lost).map(([place, count]) => `${place} ${count}`).join(", ")}` : "0", number > 0],
    n.camera_lost ? ["by camera", String(n.camera_lost), true] : null,
    n.flagged ? ["flagged", `${n.flagged} frames with saturated pixels, pixels that are no number, or counts below camera.offset_counts`] : null,
    n.time_to_full_s === undefined ? null : ["disk full in", duration(n.time_to_full_s)],
    n.backends && Object.keys(n.backends).length ? ["engines", Object.entries(n.backends).map(([name, what]) => `${name}: ${what}`).join("; ")] : null,
    ["viewers", `${told.viewers}; pictures passed over: ${(n.preview_dropped ?? 0) + told.skipped}`],
    Object.keys(told.refused).length ? ["refused", Object.entries(told.refused).map(([why, count]) => `${why} ${count}`).join(", ")] : null,
    ["drawn by", drawing.name],
  ]);
}

function showKeys() {
  const marks = traces.counts(), text = marks.map(({ symbol, text, number }) => `${{ triangle: "▲", diamond: "◆", dot: "●", cross: "✕" }[symbol]} ${text} ${number}`);
  const box = $("mark-keys");
  if (box.dataset.text === text.join()) return;
  box.dataset.text = text.join();
  box.replaceChildren(...marks.map(({ colour }, i) => { const key = document.createElement("span"); key.className = "key"; key.style.color = colour; key.textContent = text[i]; return key; }));
}

// Kept apart from what is said of pictures, which come all the time.
function showLost() { $("lost").hidden = !drawing.lost; }

function say(text) { $("message").textContent = text; $("message").hidden = !text; }

// ---- what people do ---------------------------------------------------------

function setMode(mode) { document.querySelector(`input[name=mode][value=${mode}]`).checked = true; stage.setMode(mode); }

function toggle(id) { $(id).checked = !$(id).checked; wantDraw(); }

function png() {
  const canvas = document.createElement("canvas");
  draw();
  canvas.width = drawing.canvas.width; canvas.height = drawing.canvas.height;
  const context = canvas.getContext("2d");
  context.drawImage(drawing.canvas, 0, 0); context.drawImage($("overlay"), 0, 0);
  canvas.toBlob((blob) => {
    const link = document.createElement("a"), picture = state.picture;
    link.href = URL.createObjectURL(blob);
    link.download = `${state.series?.name ?? "rtfocus"}_t${picture?.t ?? 0}_p${picture?.p ?? 0}_c${picture?.c ?? 0}_z${picture?.z ?? 0}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

function zoomMiddle(factor) { const [width, height] = stage.paneSize(); stage.zoomAt(factor, width / 2, height / 2); }

function next(axis) { const count = state.series?.[axis === "p" ? "positions" : "channels"].length ?? 1, now = state.picture?.[axis] ?? 0; if (count > 1) { $(axis).value = String((now + 1) % count); pick(axis); } }

const now = () => (state.follow ? state.picture ?? { t: 0, z: 0 } : resolved());
const KEYS = {
  Home: follow, ArrowLeft: () => scrub({ t: now().t - 1 }), ArrowRight: () => scrub({ t: now().t + 1 }),
  ArrowUp: () => scrub({ z: now().z + 1 }), ArrowDown: () => scrub({ z: now().z - 1 }),
  p: () => next("p"), c: () => next("c"),
  1: () => setMode("raw"), 2: () => setMode("restored"), 3: () => setMode("side"), 4: () => setMode("split"),
  "[": () => stage.setSplit(stage.split - 0.05), "]": () => stage.setSplit(stage.split + 0.05),
  m: () => toggle("map"), n: nextMap, s: () => toggle("mark"), a: () => setWindow("percentile", null),
  "+": () => zoomMiddle(1.25), "-": () => zoomMiddle(0.8), f: () => stage.fit(), r: () => $("roi").click(), "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches?.("input:not([type=checkbox]):not([type=radio]), select");
  if (event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== "Home") || $("help").open) return;
  const act = KEYS[event.key];
  if (act) { event.preventDefault(); act(); }
});
$("follow").onclick = () => (state.follow ? scrub({}) : follow());
$("t").oninput = () => scrub({ t: Number($("t").value) });
$("z").oninput = () => { if (state.follow) { state.place.z = Number($("z").value); select(); } else scrub({ z: Number($("z").value) }); };
for (const axis of ["p", "c"]) $(axis).onchange = () => pick(axis);
for (const radio of document.querySelectorAll("input[name=mode]")) radio.onchange = () => setMode(radio.value);
for (const id of ["map", "alpha", "mark"]) $(id).oninput = wantDraw;
$("map-of").onchange = () => chooseMap(Number($("map-of").value));
$("fit").onclick = () => stage.fit();
$("zoom-in").onclick = () => zoomMiddle(1.25);
$("zoom-out").onclick = () => zoomMiddle(0.8);
$("roi").onclick = () => { stage.drawsRoi = !stage.drawsRoi; $("roi").setAttribute("aria-pressed", String(stage.drawsRoi)); };
$("roi-clear").onclick = () => { stage.roi = null; refit(); };
stage.onRoi = () => { stage.drawsRoi = false; $("roi").setAttribute("aria-pressed", "false"); refit(); };
stage.onSplit = (part) => { $("split").value = Math.round(1000 * part); };
stage.onHover = (at) => { state.pointer = at; showFrame(); };
function refit() { if (state.picture) findWindows(state.picture); showContrast(true); wantDraw(); }
$("split").oninput = () => stage.setSplit(Number($("split").value) / 1000);
$("kind").onchange = () => showContrast(true);
$("linked").onchange = refit;
$("contrast-mode").onchange = () => { const held = state.picture && windowOf(shownKind(), state.picture.c); setWindow($("contrast-mode").value, $("contrast-mode").value === "hand" ? held?.window : null); };
for (const id of ["low", "high"]) $(id).onchange = () => { const window = [Number($("low").value), Number($("high").value)]; if (window[1] > window[0]) setWindow("hand", window); };
for (const id of ["percent-low", "percent-high"]) $(id).onchange = () => {
  const held = state.picture && windowOf(shownKind(), state.picture.c);
  if (!held) return;
  held.low = Number($("percent-low").value); held.high = Number($("percent-high").value); setWindow("percentile", null);
};
$("png").onclick = png;
$("help-button").onclick = () => $("help").showModal();
for (const button of document.querySelectorAll("[data-ask]")) button.onclick = () => { $("answer").textContent = "asking …"; send({ type: "ask", what: button.dataset.ask }); };

// For people with a console, and tests: what is shown, and the colours on the canvas.
window.rtfocusView = {
  state, stage, drawing, draw, setWindow, scrub, follow,
  // Colours at pixels [y, x] of the frame.
  coloursAt(kind, places) {
    draw();
    const pane = stage.lastPanes.find((one) => one.kind === kind), { x, y, zoom } = stage.view;
    const screen = (n, from, origin) => Math.floor(origin + (n + 0.5 - from) * zoom);
    return pane && places.map(([row, column]) => drawing.read(screen(column, x, pane.origin[0]), screen(row, y, pane.origin[1])));
  },
};

setInterval(() => { traces.show(); }, 500);
connect();
