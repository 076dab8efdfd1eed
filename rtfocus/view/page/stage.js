// Stage: panes with linked pan and zoom, and what is drawn over the pixels: a map of the
// tiles, colour bar, scale bar, saturation, region, labels.

import { RAW, RESTORED, SATURATION } from "./codec.js";
import { MAPS, colour, nice, share, short } from "./maps.js";

const LABELS = { [RAW]: "raw", [RESTORED]: "restored" };
const INK = "#e6e8eb", SHADE = "rgba(10,12,15,.72)", SATURATED = "#ff2bd6", REGION = "#f0e442";

export class Stage {
  constructor(box, canvas, overlay, onChange) {
    this.box = box; this.canvas = canvas; this.overlay = overlay; this.onChange = onChange;
    this.mode = "side"; this.split = 0.5; this.view = { x: 0, y: 0, zoom: 1 };
    this.frame = { width: 1, height: 1 }; this.fitted = true;
    this.roi = null; this.drawsRoi = false; this.mapRanges = new Map();
    this.map = document.createElement("canvas");
    this.listen();
    new ResizeObserver(() => this.resize()).observe(box);
    this.resize();
  }

  get ratio() { return window.devicePixelRatio || 1; }

  resize() {
    const width = Math.max(Math.round(this.box.clientWidth * this.ratio), 1);
    const height = Math.max(Math.round(this.box.clientHeight * this.ratio), 1);
    for (const canvas of [this.canvas, this.overlay]) { canvas.width = width; canvas.height = height; }
    if (this.fitted) this.fit(); else this.onChange();
  }

  setFrame(width, height) {
    if (width === this.frame.width && height === this.frame.height) return;
    this.frame = { width, height };
    this.roi = null;
    this.fit();
  }

  // Kinds shown now, by what there is.
  kinds(planes) {
    const there = [RAW, RESTORED].filter((kind) => planes[kind]);
    if (this.mode === "raw") return there.filter((kind) => kind === RAW);
    if (this.mode === "restored") return there.filter((kind) => kind === RESTORED);
    return there;
  }

  // Panes in device pixels: {kind, rect, origin}.
  panes(planes) {
    const kinds = this.kinds(planes), { width, height } = this.canvas;
    if (this.mode === "split" && kinds.length === 2) {
      const at = Math.round(width * this.split);
      return [
        { kind: kinds[0], rect: [0, 0, at, height], origin: [0, 0] },
        { kind: kinds[1], rect: [at, 0, width - at, height], origin: [0, 0] },
      ];
    }
    const gap = kinds.length > 1 ? Math.round(4 * this.ratio) : 0, part = Math.floor((width - gap) / Math.max(kinds.length, 1));
    return kinds.map((kind, i) => ({ kind, rect: [i * (part + gap), 0, part, height], origin: [i * (part + gap), 0] }));
  }

  paneSize() {
    const two = this.mode === "side" && this.count !== 1;
    return [two ? (this.canvas.width - 4 * this.ratio) / 2 : this.canvas.width, this.canvas.height];
  }

  fit() {
    const [width, height] = this.paneSize(), frame = this.frame;
    const zoom = Math.min(width / frame.width, height / frame.height);
    this.view = { zoom, x: (frame.width - width / zoom) / 2, y: (frame.height - height / zoom) / 2 };
    this.fitted = true;
    this.onChange();
  }

  setMode(mode) { this.mode = mode; if (this.fitted) this.fit(); else this.onChange(); }

  // Zoom by a factor about a point of a pane in device pixels.
  zoomAt(factor, x, y) {
    const view = this.view, zoom = Math.min(Math.max(view.zoom * factor, 0.02), 80);
    const fx = view.x + x / view.zoom, fy = view.y + y / view.zoom;
    this.view = { zoom, x: fx - x / zoom, y: fy - y / zoom };
    this.fitted = false;
    this.onChange();
  }

  panBy(x, y) {
    this.view = { ...this.view, x: this.view.x - x / this.view.zoom, y: this.view.y - y / this.view.zoom };
    this.fitted = false;
    this.onChange();
  }

  // Place in a pane of a pointer, and in the frame.
  at(event) {
    const box = this.box.getBoundingClientRect();
    const x = (event.clientX - box.left) * this.ratio, y = (event.clientY - box.top) * this.ratio;
    const panes = this.lastPanes ?? [];
    const pane = panes.find((one) => x >= one.rect[0] && x < one.rect[0] + one.rect[2]) ?? panes[0];
    const inX = x - (pane?.origin[0] ?? 0);
    return { x: inX, y, all: x, kind: pane?.kind ?? RAW, frameX: this.view.x + inX / this.view.zoom, frameY: this.view.y + y / this.view.zoom };
  }

  listen() {
    const held = new Map();
    let what = "", start = null;
    this.overlay.addEventListener("pointerdown", (event) => {
      this.overlay.setPointerCapture(event.pointerId);
      held.set(event.pointerId, event);
      // A second finger zooms, whatever the first one began.
      if (held.size > 1) { if (what === "roi") this.setRoi(start, start); what = "pan"; return; }
      start = this.at(event);
      const nearSplit = this.mode === "split" && Math.abs(start.all - this.split * this.canvas.width) < 14 * this.ratio;
      what = nearSplit ? "split" : this.drawsRoi || event.shiftKey ? "roi" : "pan";
    });
    this.overlay.addEventListener("pointermove", (event) => {
      this.onHover?.(this.at(event));
      const before = held.get(event.pointerId);
      if (!before) return;
      if (held.size === 2) this.pinch(held, event);
      held.set(event.pointerId, event);
      if (held.size > 1) return;
      const now = this.at(event);
      if (what === "split") this.setSplit(now.all / this.canvas.width);
      else if (what === "roi") this.setRoi(start, now);
      else this.panBy((event.clientX - before.clientX) * this.ratio, (event.clientY - before.clientY) * this.ratio);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      this.overlay.addEventListener(end, (event) => { held.delete(event.pointerId); if (what === "roi") this.onRoi?.(); what = ""; });
    }
    this.overlay.addEventListener("wheel", (event) => {
      event.preventDefault();
      const at = this.at(event);
      this.zoomAt(Math.exp(-event.deltaY / 400), at.x, at.y);
    }, { passive: false });
    this.overlay.addEventListener("dblclick", () => this.fit());
  }

  pinch(held, event) {
    const [other] = [...held.values()].filter((one) => one.pointerId !== event.pointerId);
    const before = held.get(event.pointerId), far = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    const at = this.at({ clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 });
    this.zoomAt(far(event, other) / Math.max(far(before, other), 1), at.x, at.y);
  }

  setSplit(part) { this.split = Math.min(Math.max(part, 0), 1); this.onSplit?.(this.split); this.onChange(); }

  setRoi(a, b) {
    const { width, height } = this.frame, clip = (value, top) => Math.min(Math.max(Math.round(value), 0), top);
    const roi = {
      x0: clip(Math.min(a.frameX, b.frameX), width), x1: clip(Math.max(a.frameX, b.frameX), width),
      y0: clip(Math.min(a.frameY, b.frameY), height), y1: clip(Math.max(a.frameY, b.frameY), height),
    };
    this.roi = roi.x1 - roi.x0 > 1 && roi.y1 - roi.y0 > 1 ? roi : null;
    this.onChange();
  }

  // What is seen of the frame in whole pixels.
  visible() {
    const [width, height] = this.paneSize(), { x, y, zoom } = this.view, frame = this.frame;
    const clip = (value, top) => Math.min(Math.max(value, 0), top);
    return {
      x0: clip(Math.floor(x), frame.width), y0: clip(Math.floor(y), frame.height),
      x1: clip(Math.ceil(x + width / zoom), frame.width), y1: clip(Math.ceil(y + height / zoom), frame.height),
    };
  }

  setMap(plane) {
    const { signed, kind } = plane;
    const known = [...plane.pixels].filter((value) => !Number.isNaN(value)).map(Math.abs).sort((a, b) => a - b);
    const most = known.length ? known[Math.floor(0.98 * (known.length - 1))] : 0;
    // The scale changes in steps, and stays while it nearly fits: colours keep their meaning.
    const wanted = nice(most || 1), before = this.mapRanges.get(kind) ?? 1;
    const range = wanted > before || wanted < before / 2.4 ? wanted : before;
    this.mapRanges.set(kind, range);
    const canvas = this.map;
    canvas.width = plane.width; canvas.height = plane.height;
    const context = canvas.getContext("2d"), data = context.createImageData(plane.width, plane.height);
    for (let i = 0; i < plane.pixels.length; i++) {
      const value = plane.pixels[i];
      if (Number.isNaN(value)) continue;
      data.data.set([...colour(signed, share(signed, signed ? value : Math.abs(value), range)), 255], 4 * i);
    }
    context.putImageData(data, 0, 0);
  }

  drawOverlay(panes, shown) {
    this.lastPanes = panes;
    const context = this.overlay.getContext("2d"), { width, height } = this.overlay;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    const divided = this.mode === "split" && panes.length === 2;
    panes.forEach((pane, i) => {
      context.save();
      context.beginPath();
      context.rect(...pane.rect);
      context.clip();
      if (shown.map) this.drawMap(context, pane, shown);
      if (shown.mark && shown.planes[SATURATION]) this.drawSaturation(context, pane, shown.planes[SATURATION]);
      if (this.roi) this.drawRoi(context, pane);
      context.restore();
      // On either side of a divider: what is left and right of it, and one scale for both.
      const right = divided && i === 1;
      this.label(context, LABELS[pane.kind], right ? width - 8 * this.ratio : pane.rect[0] + 8 * this.ratio, 8 * this.ratio, right ? "right" : "left");
      if (!right) this.drawScaleBar(context, divided ? [0, 0, width, height] : pane.rect, shown.pixelUm);
    });
    if (divided) this.drawDivider(context, panes[1].rect[0], height);
    if (shown.map && panes.length) this.drawColourBar(context, width, height, shown.map);
  }

  // Screen rectangle of a part of the frame.
  place(pane, x, y, w, h) {
    const { view } = this;
    return [pane.origin[0] + (x - view.x) * view.zoom, pane.origin[1] + (y - view.y) * view.zoom, w * view.zoom, h * view.zoom];
  }

  drawMap(context, pane, shown) {
    const plane = shown.map;
    context.imageSmoothingEnabled = false;
    context.globalAlpha = shown.alpha;
    context.drawImage(this.map, ...this.place(pane, plane.x0, plane.y0, plane.width * plane.step, plane.height * plane.step));
    context.globalAlpha = 1;
  }

  drawSaturation(context, pane, plane) {
    context.strokeStyle = SATURATED;
    context.lineWidth = 1.5 * this.ratio;
    for (let i = 0; i < plane.pixels.length; i++) {
      if (!plane.pixels[i]) continue;
      const x = (i % plane.width) * plane.step, y = Math.floor(i / plane.width) * plane.step;
      context.strokeRect(...this.place(pane, x, y, plane.step, plane.step));
    }
  }

  drawRoi(context, pane) {
    const { x0, y0, x1, y1 } = this.roi;
    context.strokeStyle = REGION; context.lineWidth = 2 * this.ratio; context.setLineDash([6 * this.ratio, 4 * this.ratio]);
    context.strokeRect(...this.place(pane, x0, y0, x1 - x0, y1 - y0));
    context.setLineDash([]);
  }

  drawDivider(context, x, height) {
    const r = this.ratio;
    context.fillStyle = INK;
    context.fillRect(x - r, 0, 2 * r, height);
    context.beginPath(); context.arc(x, height / 2, 11 * r, 0, 7); context.fill();
    context.fillStyle = "#14161a"; context.font = `${13 * r}px system-ui, sans-serif`; context.textAlign = "center"; context.textBaseline = "middle";
    context.fillText("⇔", x, height / 2);
  }

  label(context, text, x, y, align) {
    const r = this.ratio;
    context.font = `600 ${13 * r}px system-ui, sans-serif`; context.textBaseline = "top"; context.textAlign = "left";
    const width = context.measureText(text).width, left = align === "right" ? x - width - 12 * r : x;
    context.fillStyle = SHADE; context.fillRect(left, y, width + 12 * r, 22 * r);
    context.fillStyle = INK; context.fillText(text, left + 6 * r, y + 4 * r);
  }

  drawScaleBar(context, rect, pixelUm) {
    if (!pixelUm) return;
    const r = this.ratio, perUm = this.view.zoom / pixelUm;
    const most = Math.min(rect[2] * 0.25, 160 * r), length = nice(most / perUm / 2.2), size = length * perUm;
    const x = rect[0] + 12 * r, y = rect[1] + rect[3] - 18 * r;
    const text = length >= 1000 ? `${length / 1000} mm` : length >= 1 ? `${short(length)} µm` : `${short(length * 1000)} nm`;
    context.font = `600 ${12 * r}px system-ui, sans-serif`; context.textAlign = "left"; context.textBaseline = "bottom";
    context.fillStyle = SHADE;
    context.fillRect(x - 6 * r, y - 20 * r, Math.max(size, context.measureText(text).width) + 12 * r, 30 * r);
    context.fillStyle = INK;
    context.fillRect(x, y, size, 4 * r);
    context.fillText(text, x, y - 2 * r);
  }

  drawColourBar(context, width, height, { kind, signed }) {
    const r = this.ratio, w = 14 * r, h = Math.min(160 * r, height * 0.45), y = height - h - 30 * r;
    const title = MAPS.get(kind).bar(signed), bold = `600 ${11 * r}px system-ui, sans-serif`;
    context.font = bold;
    const wide = Math.max(58 * r, context.measureText(title).width + 4 * r), x = width - wide - 8 * r;
    context.fillStyle = SHADE;
    context.fillRect(x - 8 * r, y - 26 * r, wide + 8 * r, h + 44 * r);
    for (let i = 0; i < h; i++) {
      context.fillStyle = `rgb(${colour(signed, 1 - i / h).join(",")})`;
      context.fillRect(x, y + i, w, 1.5);
    }
    context.fillStyle = INK; context.textAlign = "left"; context.textBaseline = "middle";
    context.font = `${11 * r}px system-ui, sans-serif`;
    const range = this.mapRanges.get(kind), ticks = signed ? [range, range / 2, 0, -range / 2, -range] : [range, range / 2, 0];
    ticks.forEach((tick, i) => {
      const at = y + (i / (ticks.length - 1)) * h;
      context.fillRect(x + w, at - r / 2, 4 * r, r);
      context.fillText(`${signed && tick > 0 ? "+" : ""}${short(tick, 2)}`.replace("-", "−"), x + w + 6 * r, at);
    });
    context.textBaseline = "bottom"; context.font = bold;
    context.fillText(title, x - 4 * r, y - 8 * r);
  }
}
