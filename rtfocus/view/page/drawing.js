// Drawing: 16-bit planes through a window onto a canvas, by WebGL 2 or a 2-D context.
//
// Both draw the same: a pane is {kind, rect, origin, view, window, saturation, mark}, rect
// and origin in device pixels, view = {x, y, zoom}: the frame's pixel at the origin, and
// device pixels per pixel of the frame.

const MARK = [255, 43, 214];

const VERTEX = `#version 300 es
in vec2 corner;
void main() { gl_Position = vec4(corner, 0.0, 1.0); }`;

const FRAGMENT = `#version 300 es
precision highp float; precision highp int; precision highp usampler2D;
uniform usampler2D base, detail;
uniform vec4 baseAt, detailAt;      // x0, y0, step, 1 if there
uniform vec2 baseSize, detailSize, frame, origin, start;
uniform vec2 baseScale, detailScale; // scale, offset
uniform float height, zoom, low, width, saturation;
uniform bool colour, mark;
out vec4 shown;
bool inside(vec2 p, vec2 size) { return all(greaterThanEqual(p, vec2(0.0))) && all(lessThan(p, size)); }
void main() {
  vec2 screen = vec2(gl_FragCoord.x, height - gl_FragCoord.y);
  vec2 at = start + (screen - origin) / zoom;
  if (!inside(at, frame)) { shown = vec4(0.0, 0.0, 0.0, 1.0); return; }
  vec2 fine = floor((at - detailAt.xy) / detailAt.z);
  vec3 value;
  if (detailAt.w > 0.5 && inside(fine, detailSize)) {
    value = vec3(texelFetch(detail, ivec2(fine), 0).rgb) * detailScale.x + detailScale.y;
  } else {
    vec2 coarse = min(floor((at - baseAt.xy) / baseAt.z), baseSize - 1.0);
    value = vec3(texelFetch(base, ivec2(coarse), 0).rgb) * baseScale.x + baseScale.y;
  }
  if (!colour) value = value.rrr;
  bool full = any(greaterThanEqual(value, vec3(saturation)));
  vec3 grey = clamp((value - low) / width, 0.0, 1.0);
  shown = mark && full ? vec4(${MARK.map((c) => (c / 255).toFixed(5)).join(",")}, 1.0) : vec4(grey, 1.0);
}`;

class GlDrawing {
  lost = false;

  constructor(canvas, gl, changed) {
    this.canvas = canvas; this.gl = gl; this.name = "WebGL 2";
    this.most = gl.getParameter(gl.MAX_TEXTURE_SIZE);
    this.textures = new Map();
    this.begin();
    // A graphics driver that restarts, or a tablet that sleeps, takes all of it away.
    canvas.addEventListener("webglcontextlost", (event) => { event.preventDefault(); this.lost = true; changed(); });
    canvas.addEventListener("webglcontextrestored", () => {
      const held = [...this.textures];
      this.lost = false;
      this.begin();
      this.textures.clear();
      for (const [key, { plane }] of held) this.put(key, plane);
      changed();
    });
  }

  begin() {
    const gl = this.gl, program = gl.createProgram();
    for (const [type, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    gl.useProgram(program);
    const corners = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, corners);
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 3, -1, -1, 3]), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(gl.getAttribLocation(program, "corner"));
    gl.vertexAttribPointer(gl.getAttribLocation(program, "corner"), 2, gl.FLOAT, false, 0, 0);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    this.at = (name) => gl.getUniformLocation(program, name);
    gl.uniform1i(this.at("detail"), 1);
  }

  put(key, plane) {
    const gl = this.gl;
    if (!this.textures.has(key)) this.textures.set(key, { texture: gl.createTexture() });
    const held = this.textures.get(key);
    held.plane = plane;
    if (this.lost) return;
    gl.bindTexture(gl.TEXTURE_2D, held.texture);
    const [inner, outer] = plane.samples === 3 ? [gl.RGB16UI, gl.RGB_INTEGER] : [gl.R16UI, gl.RED_INTEGER];
    gl.texImage2D(gl.TEXTURE_2D, 0, inner, plane.width, plane.height, 0, outer, gl.UNSIGNED_SHORT, plane.pixels);
    for (const which of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, which, gl.NEAREST);
    for (const which of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, which, gl.CLAMP_TO_EDGE);
  }

  drop(key) {
    const held = this.textures.get(key);
    if (held) { this.gl.deleteTexture(held.texture); this.textures.delete(key); }
  }

  bind(unit, key, prefix) {
    const gl = this.gl, held = this.textures.get(key);
    if (!held) { gl.uniform4f(this.at(prefix + "At"), 0, 0, 1, 0); return null; }
    const plane = held.plane;
    gl.activeTexture(gl.TEXTURE0 + unit);
    gl.bindTexture(gl.TEXTURE_2D, held.texture);
    gl.uniform4f(this.at(prefix + "At"), plane.x0, plane.y0, plane.step, 1);
    gl.uniform2f(this.at(prefix + "Size"), plane.width, plane.height);
    gl.uniform2f(this.at(prefix + "Scale"), plane.scale, plane.offset);
    return plane;
  }

  draw(panes, frame) {
    if (this.lost) return;
    const gl = this.gl, height = this.canvas.height;
    gl.viewport(0, 0, this.canvas.width, height);
    gl.disable(gl.SCISSOR_TEST);
    gl.clearColor(0, 0, 0, 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.enable(gl.SCISSOR_TEST);
    for (const pane of panes) {
      const plane = this.bind(0, pane.kind, "base");
      if (!plane) continue;
      if (!this.bind(1, pane.kind + "detail", "detail")) {
        // A sampler of integers must never be without a texture of integers.
        gl.activeTexture(gl.TEXTURE1);
        gl.bindTexture(gl.TEXTURE_2D, this.textures.get(pane.kind).texture);
      }
      gl.activeTexture(gl.TEXTURE0);
      const [x, y, w, h] = pane.rect;
      gl.scissor(x, height - y - h, w, h);
      gl.uniform2f(this.at("frame"), frame.width, frame.height);
      gl.uniform2f(this.at("origin"), ...pane.origin);
      gl.uniform2f(this.at("start"), pane.view.x, pane.view.y);
      gl.uniform1f(this.at("height"), height);
      gl.uniform1f(this.at("zoom"), pane.view.zoom);
      gl.uniform1f(this.at("low"), pane.window[0]);
      gl.uniform1f(this.at("width"), pane.window[1] - pane.window[0] || 1);
      gl.uniform1f(this.at("saturation"), pane.saturation ?? 3e38);
      gl.uniform1i(this.at("colour"), plane.samples === 3);
      gl.uniform1i(this.at("mark"), pane.mark);
      gl.drawArrays(gl.TRIANGLES, 0, 3);
    }
  }

  // Colour that stands at a place of the canvas, right after it was drawn.
  read(x, y) {
    const found = new Uint8Array(4), gl = this.gl;
    gl.readPixels(x, this.canvas.height - 1 - y, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, found);
    return [...found];
  }
}

class PlainDrawing {
  constructor(canvas) {
    this.canvas = canvas; this.name = "canvas 2-D"; this.most = 8192;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.planes = new Map();
  }

  put(key, plane) { this.planes.set(key, { plane, image: document.createElement("canvas"), made: "" }); }

  drop(key) { this.planes.delete(key); }

  made(held, pane) {
    const { plane, image } = held, [low, high] = pane.window;
    const made = `${low} ${high} ${pane.saturation} ${pane.mark}`;
    if (held.made === made) return image;
    held.made = made;
    image.width = plane.width; image.height = plane.height;
    const context = image.getContext("2d"), data = context.createImageData(plane.width, plane.height);
    const saturation = pane.mark ? pane.saturation ?? Infinity : Infinity, width = high - low || 1;
    for (let i = 0, n = plane.width * plane.height; i < n; i++) {
      let full = false;
      for (let s = 0; s < 3; s++) {
        const value = plane.pixels[plane.samples === 3 ? 3 * i + s : i] * plane.scale + plane.offset;
        full ||= value >= saturation;
        data.data[4 * i + s] = Math.round((255 * (value - low)) / width);
      }
      if (full) data.data.set(MARK, 4 * i);
      data.data[4 * i + 3] = 255;
    }
    context.putImageData(data, 0, 0);
    return image;
  }

  draw(panes) {
    const context = this.context;
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    context.imageSmoothingEnabled = false;
    for (const pane of panes) {
      context.save();
      context.beginPath();
      context.rect(...pane.rect);
      context.clip();
      for (const key of [pane.kind, pane.kind + "detail"]) {
        const held = this.planes.get(key);
        if (!held) continue;
        const { x, y, zoom } = pane.view, plane = held.plane;
        context.drawImage(this.made(held, pane), pane.origin[0] + (plane.x0 - x) * zoom, pane.origin[1] + (plane.y0 - y) * zoom,
          plane.width * plane.step * zoom, plane.height * plane.step * zoom);
      }
      context.restore();
    }
  }

  read(x, y) { return [...this.context.getImageData(x, y, 1, 1).data]; }
}

// `changed` is called when what draws was taken away, or given back.
export function openDrawing(canvas, wanted, changed) {
  if (wanted !== "2d") {
    const gl = canvas.getContext("webgl2", { antialias: false, alpha: false, preserveDrawingBuffer: true });
    if (gl) {
      try { return new GlDrawing(canvas, gl, changed); } catch (error) { console.warn("WebGL 2 does not work here:", error); }
      const fresh = canvas.cloneNode();
      canvas.replaceWith(fresh);
      return new PlainDrawing(fresh);
    }
  }
  return new PlainDrawing(canvas);
}
