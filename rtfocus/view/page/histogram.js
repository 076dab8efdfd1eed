// Histogram: how the counts of a plane are spread, and the window on it, to be dragged.

import { short } from "./maps.js";

const BINS = 256;

// Sorted sample of the values of a plane within a region of the frame (null: all of it).
export function sample(plane, roi, most = 60000) {
  let x0 = 0, y0 = 0, x1 = plane.width, y1 = plane.height;
  if (roi) {
    const clip = (value, top) => Math.min(Math.max(value, 0), top);
    x0 = clip(Math.floor((roi.x0 - plane.x0) / plane.step), plane.width - 1);
    y0 = clip(Math.floor((roi.y0 - plane.y0) / plane.step), plane.height - 1);
    x1 = clip(Math.ceil((roi.x1 - plane.x0) / plane.step), plane.width);
    y1 = clip(Math.ceil((roi.y1 - plane.y0) / plane.step), plane.height);
  }
  const width = Math.max(x1 - x0, 1), height = Math.max(y1 - y0, 1), n = width * height;
  const stride = Math.max(1, Math.floor(n / most)), samples = plane.samples;
  const found = new Float32Array(Math.ceil(n / stride) * samples);
  let at = 0;
  for (let i = 0; i < n; i += stride) {
    const pixel = (y0 + Math.floor(i / width)) * plane.width + x0 + (i % width);
    for (let s = 0; s < samples; s++) found[at++] = plane.pixels[samples * pixel + s] * plane.scale + plane.offset;
  }
  return found.subarray(0, at).sort();
}

export function statistics(sorted) {
  let sum = 0, squares = 0;
  for (const value of sorted) { sum += value; squares += value * value; }
  const n = sorted.length || 1, mean = sum / n;
  return { mean, sd: Math.sqrt(Math.max(squares / n - mean * mean, 0)), min: sorted[0] ?? 0, max: sorted[sorted.length - 1] ?? 0 };
}

export class Histogram {
  constructor(canvas, onWindow) {
    this.canvas = canvas; this.context = canvas.getContext("2d");
    this.range = [0, 1]; this.window = [0, 1]; this.counts = new Float32Array(BINS);
    let dragged = -1;
    const valueAt = (event) => {
      const box = canvas.getBoundingClientRect();
      const part = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
      return this.range[0] + part * (this.range[1] - this.range[0]);
    };
    canvas.addEventListener("pointerdown", (event) => {
      const value = valueAt(event), [low, high] = this.window;
      dragged = Math.abs(value - low) < Math.abs(value - high) ? 0 : 1;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (dragged < 0) return;
      const window = [...this.window];
      window[dragged] = valueAt(event);
      if (window[1] > window[0]) onWindow(window);
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { dragged = -1; });
  }

  show(sorted, window, saturation) {
    this.window = window;
    const low = Math.min(sorted[0] ?? 0, window[0]), high = Math.max(sorted[sorted.length - 1] ?? 1, window[1]);
    this.range = [low, high > low ? high : low + 1];
    this.counts.fill(0);
    const scale = (BINS - 1) / (this.range[1] - this.range[0]);
    for (const value of sorted) this.counts[Math.floor((value - low) * scale)]++;
    this.saturation = saturation;
    this.draw();
  }

  draw() {
    const { canvas, context } = this, ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = width * ratio; canvas.height = height * ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const most = Math.log1p(Math.max(...this.counts)) || 1, base = height - 14;
    context.fillStyle = "#8fb7d6";
    for (let i = 0; i < BINS; i++) {
      const size = (Math.log1p(this.counts[i]) / most) * (base - 4);
      context.fillRect((i * width) / BINS, base - size, width / BINS + 0.5, size);
    }
    const at = (value) => ((value - this.range[0]) / (this.range[1] - this.range[0])) * width;
    const [low, high] = this.window.map(at);
    context.fillStyle = "rgba(10,12,15,.6)";
    context.fillRect(0, 0, low, base);
    context.fillRect(high, 0, width - high, base);
    context.strokeStyle = "#f0e442"; context.lineWidth = 2;
    for (const x of [low, high]) { context.beginPath(); context.moveTo(x, 0); context.lineTo(x, base); context.stroke(); }
    if (this.saturation && this.saturation <= this.range[1]) {
      context.strokeStyle = "#ff2bd6"; context.lineWidth = 1;
      context.beginPath(); context.moveTo(at(this.saturation) - 0.5, 0); context.lineTo(at(this.saturation) - 0.5, base); context.stroke();
    }
    context.fillStyle = "#aab2bd"; context.font = "11px system-ui, sans-serif";
    context.textAlign = "left"; context.fillText(short(this.range[0], 4), 0, height - 2);
    context.textAlign = "right"; context.fillText(short(this.range[1], 4), width, height - 2);
    context.textAlign = "center"; context.fillText("counts, log", width / 2, height - 2);
  }
}
