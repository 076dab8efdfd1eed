// Tiles: a frame cut into overlapping tiles for a network, and put together again.
//
// A network has `planes` channels: as many as the frame has colours, or one, which
// sees its brightness, or three, each of which sees the grey frame. `ranges` holds
// offset and scale of every plane. Where colours are seen one after the other, `colour`
// is the one that is meant, and the network has one channel; -1 otherwise.

// One thread per pixel of the sample: every `step`-th pixel of one plane.
extern "C" __global__ void sample(
    const float* signal,
    int height,
    int width,
    int channels,
    int planes,
    int plane,
    int step,
    int columns,
    int count,
    float* values) {
  int i = element();
  if (i >= count) return;
  values[i] = plane_value(
      signal, height, width, channels, planes, plane, i / columns * step,
      i % columns * step);
}

// One thread: offset and scale that map two percentiles to 0 and 1. Each lies
// between two order statistics.
extern "C" __global__ void percentile_range(
    const float* ranked, float low_part, float high_part, float* range) {
  if (element() != 0) return;
  float low = ranked[0] + (ranked[1] - ranked[0]) * low_part;
  float high = ranked[2] + (ranked[3] - ranked[2]) * high_part;
  range[0] = low;
  range[1] = high > low ? high - low : 1.0f;
}

// One thread per element of the tiles (tile, plane, y, x). Each owns what its halo
// surrounds; `tile_columns` lie in a row.
extern "C" __global__ void gather_tiles(
    const float* signal,
    int height,
    int width,
    int channels,
    int planes,
    int colour,
    int tile_columns,
    int tile_height,
    int tile_width,
    int halo,
    int elements,
    const float* ranges,
    void* tiles,
    int kind) {
  int i = element();
  if (i >= elements) return;
  int x = i % tile_width, rest = i / tile_width;
  int y = rest % tile_height;
  rest /= tile_height;
  int plane = rest % planes, tile = rest / planes;
  y += tile / tile_columns * (tile_height - 2 * halo) - halo;
  x += tile % tile_columns * (tile_width - 2 * halo) - halo;
  float value = colour < 0
      ? plane_value(signal, height, width, channels, planes, plane, y, x)
      : plane_value(signal, height, width, channels, channels, colour, y, x);
  store(tiles, kind, i, (value - ranges[2 * plane]) / ranges[2 * plane + 1]);
}

// One thread per element of the frame (y, x, channel). The tables say for every row and
// column of pixels which two tiles it lies between. A grey frame is the mean of what its
// planes became.
extern "C" __global__ void blend_tiles(
    const void* tiles,
    int kind,
    int height,
    int width,
    int channels,
    int planes,
    int colour,
    int tile_columns,
    int tile_height,
    int tile_width,
    int halo,
    const Between* rows_around,
    const Between* columns_around,
    const float* ranges,
    float* out) {
  int i = element();
  if (i >= height * width * channels) return;
  int channel = i % channels, pixel = i / channels;
  if (colour >= 0 && channel != colour) return;
  int y = pixel / width, x = pixel % width;
  int from = planes == channels ? channel : 0;
  int to = planes == channels ? channel + 1 : planes;
  float total = 0.0f;
  for (int plane = from; plane < to; ++plane) {
    float joined = 0.0f;
    for (int corner = 0; corner < 4; ++corner) {
      Corner near = corner_of(rows_around[y], columns_around[x], corner);
      if (near.weight <= 0.0f) continue;  // it need not reach this far
      int down = y + halo - near.row * (tile_height - 2 * halo);
      int across = x + halo - near.column * (tile_width - 2 * halo);
      long long tile = (long long)near.row * tile_columns + near.column;
      long long line = (tile * planes + plane) * tile_height + down;
      joined += near.weight * load(tiles, kind, line * tile_width + across);
    }
    total += ranges[2 * plane] + ranges[2 * plane + 1] * joined;
  }
  out[i] = total / (float)(to - from);
}
