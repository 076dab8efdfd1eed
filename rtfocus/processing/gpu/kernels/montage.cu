// Montage: what was restored, laid over the signal by the tiles it belongs to
// (rtfocus.processing.montage, rtfocus.processing.gpu.depth_variant). The tables say for
// every row and column of pixels which two tiles it lies between.

// No light is negative. fmaxf would make 0 of NaN and of minus infinity, and hide that a
// network is damaged: 0 times either is NaN.
__device__ static inline float light(float value) {
  return value > 0.0f ? value : 0.0f * value;
}

// One thread per pixel of a rectangle of the frame: out += weight of the level there *
// (restored - signal); `restored` begins with the rectangle, a margin lies behind.
extern "C" __global__ void blend_level(
    const float* signal,
    int width,
    int channels,
    int channel,
    int top,
    int left,
    int rows,
    int columns,
    const float* restored,
    int padded_width,
    const short* levels,
    int tile_columns,
    int level,
    const Between* rows_around,
    const Between* columns_around,
    float* out) {
  int i = element();
  if (i >= rows * columns) return;
  int y = top + i / columns, x = left + i % columns;
  float weight = 0.0f;
  for (int corner = 0; corner < 4; ++corner) {
    Corner near = corner_of(rows_around[y], columns_around[x], corner);
    if (levels[near.row * tile_columns + near.column] == level) weight += near.weight;
  }
  if (weight <= 0.0f) return;
  long long at = ((long long)y * width + x) * channels + channel;
  long long from = (long long)(y - top) * padded_width + x - left;
  out[at] += weight * (light(restored[from]) - signal[at]);
}

// One thread per pixel: out = signal + share * (out - signal), the share that of
// the tiles out of focus.
extern "C" __global__ void blend_share(
    const float* signal,
    int height,
    int width,
    int channels,
    const short* levels,
    int tile_columns,
    int background,
    const Between* rows_around,
    const Between* columns_around,
    float* out) {
  int i = element();
  if (i >= height * width) return;
  float share = 0.0f;
  for (int corner = 0; corner < 4; ++corner) {
    Corner near = corner_of(rows_around[i / width], columns_around[i % width], corner);
    short level = levels[near.row * tile_columns + near.column];
    if (level != 0 && level != background) share += near.weight;
  }
  for (int channel = 0; channel < channels; ++channel) {
    long long at = (long long)i * channels + channel;
    out[at] = signal[at] + share * (light(out[at]) - signal[at]);
  }
}
