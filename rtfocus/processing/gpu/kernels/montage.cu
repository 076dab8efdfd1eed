// Montage: what was restored, laid over the signal by the tiles it belongs to
// (rtfocus.processing.montage, rtfocus.processing.gpu.depth_variant).

// The four tiles that a pixel lies between, and what each weighs; together 1.
struct Corners {
  short level[4];
  float weight[4];
};

// Each axis mixes two neighbouring tiles: the tables hold both and the share of the
// second.
__device__ static inline Corners corners(
    const short* levels, int tile_columns, int y, int x, const int* row_tile,
    const int* row_next, const float* row_share, const int* column_tile,
    const int* column_next, const float* column_share) {
  const short* upper = levels + row_tile[y] * tile_columns;
  const short* lower = levels + row_next[y] * tile_columns;
  int left = column_tile[x], right = column_next[x];
  float down = row_share[y], across = column_share[x];
  return {
      {upper[left], upper[right], lower[left], lower[right]},
      {(1.0f - down) * (1.0f - across), (1.0f - down) * across,
       down * (1.0f - across), down * across}};
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
    const int* row_tile,
    const int* row_next,
    const float* row_share,
    const int* column_tile,
    const int* column_next,
    const float* column_share,
    float* out) {
  int i = element();
  if (i >= rows * columns) return;
  int y = top + i / columns, x = left + i % columns;
  Corners around = corners(
      levels, tile_columns, y, x, row_tile, row_next, row_share, column_tile,
      column_next, column_share);
  float weight = 0.0f;
  for (int corner = 0; corner < 4; ++corner)
    if (around.level[corner] == level) weight += around.weight[corner];
  if (weight <= 0.0f) return;
  long long at = ((long long)y * width + x) * channels + channel;
  long long from = (long long)(y - top) * padded_width + x - left;
  out[at] += weight * (fmaxf(restored[from], 0.0f) - signal[at]);
}

// One thread per pixel: out = signal + share * (restored - signal), the share that
// of the tiles out of focus.
extern "C" __global__ void blend_share(
    const float* signal,
    int height,
    int width,
    int channels,
    const float* restored,
    const short* levels,
    int tile_columns,
    int background,
    const int* row_tile,
    const int* row_next,
    const float* row_share,
    const int* column_tile,
    const int* column_next,
    const float* column_share,
    float* out) {
  int i = element();
  if (i >= height * width) return;
  int y = i / width, x = i % width;
  Corners around = corners(
      levels, tile_columns, y, x, row_tile, row_next, row_share, column_tile,
      column_next, column_share);
  float share = 0.0f;
  for (int corner = 0; corner < 4; ++corner)
    if (around.level[corner] != 0 && around.level[corner] != background)
      share += around.weight[corner];
  for (int channel = 0; channel < channels; ++channel) {
    long long at = (long long)i * channels + channel;
    out[at] = signal[at] + share * (fmaxf(restored[at], 0.0f) - signal[at]);
  }
}
