// Tiles: a frame cut into overlapping tiles for a network, and put together again.

// One thread per pixel of the sample: every `step`-th pixel of a frame.
extern "C" __global__ void sample(
    const float* signal,
    int height,
    int width,
    int channels,
    int step,
    int columns,
    int count,
    float* values) {
  int i = element();
  if (i >= count) return;
  int y = i / columns * step, x = i % columns * step;
  values[i] = grey(signal, height, width, channels, y, x);
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

// One thread per element of the tiles (tile, channel, y, x), from tile `first` on;
// pixels beyond the frame are mirrored.
extern "C" __global__ void gather_tiles(
    const float* signal,
    int height,
    int width,
    int channels,
    const int* tops,
    const int* lefts,
    int tile_columns,
    int tile_height,
    int tile_width,
    int first,
    int elements,
    const float* range,
    void* tiles,
    int kind) {
  int i = element();
  if (i >= elements) return;
  int x = i % tile_width, rest = i / tile_width;
  int y = rest % tile_height;
  rest /= tile_height;
  int channel = rest % channels, tile = first + rest / channels;
  int row = mirror(tops[tile / tile_columns] + y, height);
  int column = mirror(lefts[tile % tile_columns] + x, width);
  float value = signal[((long long)row * width + column) * channels + channel];
  store(tiles, kind, i, (value - range[0]) / range[1]);
}

// One thread per element of the frame (y, x, channel): the weighted sum of all
// tiles that cover it. Weights per axis have axes (tile, pixel of the frame), each
// pixel's add up to 1; the tiles with a weight are `first` to `last`.
extern "C" __global__ void blend_tiles(
    const void* tiles,
    int kind,
    int height,
    int width,
    int channels,
    const int* tops,
    const int* lefts,
    int tile_columns,
    int tile_height,
    int tile_width,
    const int* first_row,
    const int* last_row,
    const float* row_weights,
    const int* first_column,
    const int* last_column,
    const float* column_weights,
    const float* range,
    float* out) {
  int i = element();
  if (i >= height * width * channels) return;
  int channel = i % channels, pixel = i / channels;
  int y = pixel / width, x = pixel % width;
  float total = 0.0f;
  for (int row = first_row[y]; row <= last_row[y]; ++row) {
    float down = row_weights[row * height + y];
    for (int column = first_column[x]; column <= last_column[x]; ++column) {
      float weight = down * column_weights[column * width + x];
      long long tile = (long long)row * tile_columns + column;
      long long line = (tile * channels + channel) * tile_height + y - tops[row];
      total += weight * load(tiles, kind, line * tile_width + x - lefts[column]);
    }
  }
  out[i] = total * range[1] + range[0];
}
