// Traces: defocus, z and the loop over time; moves, probes and refusals as symbols.

const AXIS = "#aab2bd", GRID = "rgba(170,178,189,.16)";
const BLUE = "#56b4e9", ORANGE = "#e69f00", GREEN = "#2fc39b", PINK = "#cc79a7";
const MARKS = {
  move: { colour: ORANGE, symbol: "triangle", text: "move" },
  probe: { colour: PINK, symbol: "diamond", text: "probe" },
  verdict: { colour: GREEN, symbol: "dot", text: "found" },
  refusal: { colour: "#ff6b35", symbol: "cross", text: "refused" },
  request: { colour: BLUE, symbol: "diamond", text: "asked" },
};
const MOST_STATES = 2400;

const axis = (label, side) => ({ label, side, stroke: AXIS, grid: { stroke: GRID }, ticks: { stroke: GRID }, size: side === 2 ? 34 : side === 1 ? 58 : 48, labelSize: 16, labelFont: "11px system-ui", font: "11px system-ui", labelGap: 0 });

export class Traces {
  constructor(boxes, onPick) {
    this.boxes = boxes; this.onPick = onPick; this.clear();
    new ResizeObserver(() => this.resize()).observe(boxes.focus);
  }

  clear() {
    this.rows = []; this.marks = []; this.loop = [[], [], [], []]; this.cursor = null; this.channel = 0; this.totals = [null, null]; this.newest = null; this.stale = true;
  }

  add(rows, marks) {
    // The socket may be ahead of the folder: rows are shown in order of time.
    for (const row of rows) this.rows.push(row);
    const n = this.rows.length;
    if (rows.length && n > rows.length && rows[0][0] < this.rows[n - rows.length - 1][0]) this.rows.sort((a, b) => a[0] - b[0]);
    else if (rows.some((row, i) => i && row[0] < rows[i - 1][0])) this.rows.sort((a, b) => a[0] - b[0]);
    const seconds = this.rows.at(-1)?.[0];
    if (seconds !== undefined && seconds !== this.newest?.seconds) this.newest = { seconds, came: performance.now() };
    this.marks.push(...marks.map(([kind, seconds, text, z]) => ({ kind, seconds, text, z })));
    this.stale = true;
  }

  // On the run's time: this computer's clock may be another's, and may be set.
  addLoop(numbers) {
    if (!this.newest) return;
    const seconds = this.newest.seconds + (performance.now() - this.newest.came) / 1000;
    const latency = numbers.latency_ms?.capture_to_estimate ?? numbers.latency_ms?.arrival_to_durable ?? [null, null];
    [seconds, numbers.frames_per_s ?? null, latency[0], latency[1]].forEach((value, i) => {
      this.loop[i].push(value);
      if (this.loop[i].length > MOST_STATES) this.loop[i].shift();
    });
    this.stale = true;
  }

  // Latency over a whole run that is over.
  setTotals(numbers) {
    const totals = numbers.latency_ms?.capture_to_estimate ?? numbers.latency_ms?.arrival_to_durable ?? [null, null];
    if (totals.join() !== this.totals.join()) { this.totals = totals; this.stale = true; }
  }

  setChannel(channel) { if (channel !== this.channel) { this.channel = channel; this.stale = true; } }

  setCursor(seconds) { if (seconds !== this.cursor) { this.cursor = seconds; this.stale = true; } }

  sizeOf(box) { return { width: Math.max(box.clientWidth, 100), height: Math.max(box.clientHeight, 80) }; }

  resize() { for (const key of ["focus", "stage", "loop"]) this[key + "Plot"]?.setSize(this.sizeOf(this.boxes[key])); }

  plot(key, series, axes, scales) {
    const box = this.boxes[key];
    const plot = new uPlot({
      ...this.sizeOf(box), series: [{ label: "s" }, ...series], axes, scales: { x: { time: false }, ...scales },
      legend: { show: false }, cursor: { drag: { x: true, y: false } },
      hooks: { draw: [(u) => this.drawMarks(u, key)] },
    }, [[], ...series.map(() => [])], box);
    plot.over.addEventListener("click", () => {
      const seconds = plot.posToVal(plot.cursor.left, "x");
      if (Number.isFinite(seconds) && key !== "loop") this.pick(seconds);
    });
    return plot;
  }

  pick(seconds) {
    let best = null;
    for (const row of this.rows) if (!row[4] && row[7] === this.channel && (!best || Math.abs(row[0] - seconds) < Math.abs(best[0] - seconds))) best = row;
    if (best) this.onPick({ t: best[5], p: best[6], c: best[7], z: best[8] });
  }

  show() {
    if (!this.stale || !this.boxes.focus.clientWidth) return;
    this.stale = false;
    const point = (colour, size = 4) => ({ show: true, size, stroke: colour, fill: colour });
    this.focusPlot ??= this.plot("focus", [
      { label: "defocus", stroke: BLUE, width: 1, points: point(BLUE) },
      { label: "probe", stroke: PINK, paths: () => null, points: point(PINK, 6) },
    ], [axis("time (s)", 2), axis("defocus (µm)", 3)], {});
    this.stagePlot ??= this.plot("stage", [{ label: "z", stroke: GREEN, width: 1.5, points: point(GREEN, 3) }],
      [axis("time (s)", 2), axis("z (µm)", 3)], {});
    this.loopPlot ??= this.plot("loop", [
      { label: "frames/s", stroke: BLUE, width: 1.5, points: { show: false } },
      { label: "median", stroke: ORANGE, width: 1, scale: "ms", points: { show: false } },
      { label: "99 %", stroke: ORANGE, width: 1, dash: [4, 3], scale: "ms", points: { show: false } },
    ], [axis("time (s)", 2), axis("frames/s", 3), { ...axis("delay (ms)", 1), scale: "ms", grid: { show: false } }], { y: { range: (u, low, high) => [0, (high || 1) * 1.1] }, ms: { range: (u, low, high) => [0, (high || 1) * 1.1] } });
    const mine = this.rows.filter((row) => row[4] || row[7] === this.channel);
    const seconds = mine.map((row) => row[0]);
    this.focusPlot.setData([seconds, mine.map((row) => (row[4] ? null : row[2])), mine.map((row) => (row[4] ? row[2] : null))]);
    this.stagePlot.setData([seconds, mine.map((row) => row[1])]);
    this.loopPlot.setData(this.loop[0].length ? this.loop : this.binned());
    this.resize();
  }

  // Frames/s of a run that is over: how many were exposed in each second.
  binned() {
    const bins = new Map(), first = this.rows[0]?.[0] ?? 0, last = this.rows[this.rows.length - 1]?.[0] ?? 0;
    const wide = Math.max((last - first) / 200, 1);
    for (const row of this.rows) { const bin = Math.floor((row[0] - first) / wide); bins.set(bin, (bins.get(bin) ?? 0) + 1); }
    const keys = [...bins.keys()].sort((a, b) => a - b);
    return [keys.map((key) => first + (key + 0.5) * wide), keys.map((key) => bins.get(key) / wide), ...this.totals.map((total) => keys.map(() => total))];
  }

  zAt(seconds) {
    let low = 0, high = this.rows.length - 1;
    while (low < high) { const mid = (low + high + 1) >> 1; if (this.rows[mid][0] <= seconds) low = mid; else high = mid - 1; }
    return this.rows[low]?.[1] ?? null;
  }

  drawMarks(u, key) {
    const context = u.ctx, r = window.devicePixelRatio || 1;
    context.save();
    if (this.cursor !== null && key !== "loop") {
      const x = u.valToPos(this.cursor, "x", true);
      context.strokeStyle = "#f0e442"; context.lineWidth = r; context.setLineDash([3 * r, 3 * r]);
      context.beginPath(); context.moveTo(x, u.bbox.top); context.lineTo(x, u.bbox.top + u.bbox.height); context.stroke(); context.setLineDash([]);
    }
    if (key === "stage") {
      for (const mark of this.marks) {
        const look = MARKS[mark.kind], x = u.valToPos(mark.seconds, "x", true);
        if (!look || x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
        const z = mark.z ?? this.zAt(mark.seconds), y = z === null ? u.bbox.top + 8 * r : u.valToPos(z, "y", true);
        symbol(context, look.symbol, x, Math.min(Math.max(y, u.bbox.top), u.bbox.top + u.bbox.height), 4 * r, look.colour);
      }
    }
    context.restore();
  }

  counts() {
    const counts = {};
    for (const mark of this.marks) counts[mark.kind] = (counts[mark.kind] ?? 0) + 1;
    return Object.entries(MARKS).map(([kind, look]) => ({ ...look, number: counts[kind] ?? 0 }));
  }
}

function symbol(context, kind, x, y, s, colour) {
  context.fillStyle = context.strokeStyle = colour; context.lineWidth = s / 2; context.beginPath();
  if (kind === "triangle") { context.moveTo(x, y - s); context.lineTo(x + s, y + s); context.lineTo(x - s, y + s); context.closePath(); context.fill(); }
  else if (kind === "diamond") { context.moveTo(x, y - s * 1.2); context.lineTo(x + s, y); context.lineTo(x, y + s * 1.2); context.lineTo(x - s, y); context.closePath(); context.fill(); }
  else if (kind === "cross") { context.moveTo(x - s, y - s); context.lineTo(x + s, y + s); context.moveTo(x + s, y - s); context.lineTo(x - s, y + s); context.stroke(); }
  else { context.arc(x, y, s, 0, 7); context.fill(); }
}

