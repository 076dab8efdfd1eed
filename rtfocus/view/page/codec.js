// Codec: unpacks the pictures of rtfocus/view/codec.py.

const HEADER_BYTES = 80;
const PLANE_BYTES = 40;
const UNKNOWN = 0xffffffff;

export const RAW = 0, RESTORED = 1, DEFOCUS = 2, SATURATION = 3, DEVIATION = 4, EXPECTED_ERROR = 5;
export const LIVE = 1, DETAIL = 2, ABSENT = 4, UNREADABLE = 8;

// One LZ4 block (https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md).
export function unpackLz4(source, size) {
  const out = new Uint8Array(size);
  let from = 0, to = 0;
  const length = (start) => {
    let total = start, byte = 255;
    while (start === 15 && byte === 255) { byte = source[from++]; total += byte; }
    return total;
  };
  while (from < source.length) {
    const token = source[from++];
    const literals = length(token >> 4);
    if (from + literals > source.length || to + literals > size) throw new Error("LZ4 block is damaged");
    out.set(source.subarray(from, from + literals), to);
    from += literals; to += literals;
    if (from >= source.length) break;
    const back = source[from] | (source[from + 1] << 8);
    from += 2;
    const matched = length(token & 15) + 4;
    if (back === 0 || back > to || to + matched > size) throw new Error("LZ4 block is damaged");
    if (back >= matched) out.copyWithin(to, to - back, to - back + matched);
    else for (let i = 0; i < matched; i++) out[to + i] = out[to + i - back];
    to += matched;
  }
  if (to !== size) throw new Error("LZ4 block is too short");
  return out;
}

function values(bytes, dtype, packing, number) {
  if (dtype === 2) return bytes.slice(0, number);
  if (dtype === 1) return new Float32Array(bytes.slice().buffer, 0, number);
  if (packing === 0) return new Uint16Array(bytes.slice().buffer, 0, number);
  const split = unpackLz4(bytes, 2 * number);
  const joined = new Uint16Array(number);
  for (let i = 0; i < number; i++) joined[i] = split[i] | (split[number + i] << 8);
  return joined;
}

export function unpack(buffer) {
  const view = new DataView(buffer);
  const i32 = (at) => view.getInt32(at, true), u32 = (at) => view.getUint32(at, true);
  const f32 = (at) => view.getFloat32(at, true), f64 = (at) => view.getFloat64(at, true);
  if (u32(0) !== 0x50465452 || view.getUint8(4) !== 1) throw new Error("no picture of this version; reload the page");
  const known = (value) => (Number.isNaN(value) ? null : value);
  const picture = {
    flags: view.getUint8(5), number: u32(8), sequence: i32(12),
    t: i32(16), p: i32(20), c: i32(24), z: i32(28),
    zUm: known(f64(32)), seconds: known(f64(40)),
    saturated: u32(48) === UNKNOWN ? null : u32(48), exposureMs: f32(52),
    height: u32(56), width: u32(60), defocusUm: known(f64(64)),
    confidence: f32(72), signed: view.getUint8(76) === 1, planes: {},
  };
  let at = HEADER_BYTES;
  for (let i = 0; i < view.getUint8(6); i++) {
    const samples = view.getUint8(at + 3), width = u32(at + 4), height = u32(at + 8), size = u32(at + 12);
    const bytes = new Uint8Array(buffer, at + PLANE_BYTES, size);
    picture.planes[view.getUint8(at)] = {
      kind: view.getUint8(at), samples, width, height,
      scale: f32(at + 16), offset: f32(at + 20), x0: f32(at + 24), y0: f32(at + 28), step: f32(at + 32), signed: view.getUint8(at + 36) === 1,
      pixels: values(bytes, view.getUint8(at + 1), view.getUint8(at + 2), width * height * samples),
    };
    at += PLANE_BYTES + size;
  }
  return picture;
}
