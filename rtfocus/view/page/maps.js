// Maps: what is told of tiles, colours that everybody can tell apart, and numbers that fit a scale.

import { DEFOCUS, DEVIATION, EXPECTED_ERROR } from "./codec.js";

// In the order of the choice: name there, and over the colour bar.
export const MAPS = new Map([
  [DEFOCUS, { name: "defocus", bar: (signed) => (signed ? "dz (µm)" : "|dz| (µm)") }],
  [DEVIATION, { name: "deviation", bar: () => "sd (µm)" }],
  [EXPECTED_ERROR, { name: "expected error", bar: () => "rms (counts)" }],
]);

// Value of the tile at a place of the frame; null: there is none.
export function valueAt(plane, x, y) {
  if (!plane) return null;
  const column = Math.floor((x - plane.x0) / plane.step), row = Math.floor((y - plane.y0) / plane.step);
  if (column < 0 || row < 0 || column >= plane.width || row >= plane.height) return null;
  const value = plane.pixels[row * plane.width + column];
  return Number.isNaN(value) ? null : value;
}

// What is told of the tile at a place of the frame; empty: nothing is.
export function tileInWords(planes, x, y) {
  const [defocus, deviation, error] = [...MAPS.keys()].map((kind) => valueAt(planes[kind], x, y));
  const said = [];
  if (defocus !== null) {
    const sign = planes[DEFOCUS].signed ? (defocus > 0 ? "+" : "") : "|dz| ";
    said.push(`${sign}${defocus.toFixed(2)}${deviation === null ? "" : ` ± ${deviation.toFixed(2)}`} µm`);
  } else if (planes[DEFOCUS]) said.push("no specimen seen");
  if (error !== null) said.push(`expected error ${short(error)} counts`);
  return said.join(", ");
}

// Cividis at nine places, for distances without a sign.
const CIVIDIS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "fee838"];
// Blue over white to orange, for a sign: too near, in focus, too far.
const DIVERGING = ["0a3a78", "1f6db5", "56a5dc", "a9d3ee", "f4f4f4", "f7cf9b", "eb9a3d", "c0650f", "7a3a00"];

const parse = (hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
const TABLES = { true: DIVERGING.map(parse), false: CIVIDIS.map(parse) };

// Colour of a value from 0 to 1.
export function colour(signed, share) {
  const table = TABLES[signed];
  const at = Math.min(Math.max(share, 0), 1) * (table.length - 1);
  const low = Math.min(Math.floor(at), table.length - 2), rest = at - low;
  return [0, 1, 2].map((i) => Math.round(table[low][i] + rest * (table[low + 1][i] - table[low][i])));
}

// Next larger 1, 2 or 5 times a power of ten.
export function nice(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.9999);
}

export function share(signed, value, range) {
  return signed ? (value + range) / (2 * range) : value / range;
}

export function quantile(sorted, part) {
  return sorted.length ? sorted[Math.min(Math.floor(part * sorted.length), sorted.length - 1)] : 0;
}

export function short(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(1);
  return String(Number(value.toPrecision(Math.max(digits, Math.floor(Math.log10(size || 1)) + 1))));
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds > 172800) return `${Math.round(seconds / 86400)} days`;
  if (seconds > 3600) return `${(seconds / 3600).toFixed(1)} h`;
  return seconds > 60 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds)} s`;
}
