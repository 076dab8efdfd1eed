// Patches: pieces of a frame that are restored one by one, several at once
// (rtfocus.processing.gpu.patches).

// One thread per tile: those with a level, in order. `found` holds their number and then
// their places in the grid; `rank` the position of each tile among them, or -1. Every
// `step`-th row and column takes part.
extern "C" __global__ void tiles_of_level(
    const short* levels,
    int tile_rows,
    int tile_columns,
    int step,
    int level,
    int* found,
    int* rank) {
  int tile = element(), tiles = tile_rows * tile_columns;
  if (tile >= tiles) return;
  int before = 0;
  bool is_one = false;
  for (int other = 0; other <= tile; ++other) {
    bool takes_part = other / tile_columns % step == 0 && other % tile_columns % step == 0;
    is_one = takes_part && levels[other] == level;
    if (is_one && other < tile) ++before;
  }
  rank[tile] = is_one ? before : -1;
  if (is_one) found[1 + before] = tile;
  if (tile == tiles - 1) found[0] = before + (is_one ? 1 : 0);
}

// One thread per pixel, a row of blocks per patch: the light of the found tiles from
// `first` on with `halo` around, 0 beyond patch and frame. The tables hold first pixel
// and length of every row and column of tiles.
extern "C" __global__ void cut_patches(
    const float* signal,
    int height,
    int width,
    int channels,
    int channel,
    const int* found,
    int first,
    int tile_columns,
    const int* tops,
    const int* heights,
    const int* lefts,
    const int* widths,
    int halo,
    int patch_height,
    int patch_width,
    float* patches) {
  int i = element();
  if (i >= patch_height * patch_width) return;
  int number = first + (int)blockIdx.y;
  float value = 0.0f;
  if (number < found[0]) {
    int row = found[1 + number] / tile_columns, column = found[1 + number] % tile_columns;
    int y = i / patch_width, x = i % patch_width;
    bool inside = y < heights[row] + 2 * halo && x < widths[column] + 2 * halo;
    y += tops[row] - halo;
    x += lefts[column] - halo;
    inside = inside && y >= 0 && y < height && x >= 0 && x < width;
    if (inside)
      value = fmaxf(signal[((long long)y * width + x) * channels + channel], 0.0f);
  }
  patches[(long long)blockIdx.y * patch_height * patch_width + i] = value;
}

// One thread per pixel of the frame: out += weight * (patch - signal) for those of its
// tiles that are among the patches, of which the first has the rank `first`.
extern "C" __global__ void join_patches(
    const float* signal,
    int height,
    int width,
    int channels,
    int channel,
    const float* patches,
    const int* rank,
    int first,
    int count,
    const int* tops,
    const int* lefts,
    int halo,
    int patch_height,
    int patch_width,
    const short* levels,
    int tile_columns,
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
  long long at = (long long)i * channels + channel;
  float change = 0.0f;
  for (int corner = 0; corner < 4; ++corner) {
    if (around.weight[corner] <= 0.0f) continue;
    int row = corner / 2 ? row_next[y] : row_tile[y];
    int column = corner % 2 ? column_next[x] : column_tile[x];
    int patch = rank[row * tile_columns + column] - first;
    if (patch < 0 || patch >= count) continue;
    long long line = (long long)patch * patch_height + y - tops[row] + halo;
    float value = patches[line * patch_width + x - lefts[column] + halo];
    change += around.weight[corner] * (value - signal[at]);
  }
  if (change != 0.0f) out[at] += change;
}

// One thread per pixel, a row of blocks per tile: tiles of a rectangle of the frame,
// `stride` apart, `columns` in a row, with `halo` around and mirrored beyond the frame,
// normalised by `range`. Those behind the last one repeat it.
extern "C" __global__ void cut_lattice(
    const float* signal,
    int height,
    int width,
    int channels,
    int channel,
    int top,
    int left,
    int stride,
    int halo,
    int first,
    int count,
    int columns,
    int side,
    const float* range,
    float* tiles) {
  int i = element();
  if (i >= side * side) return;
  int number = min(first + (int)blockIdx.y, count - 1);
  int y = mirror(top + number / columns * stride - halo + i / side, height);
  int x = mirror(left + number % columns * stride - halo + i % side, width);
  float value = signal[((long long)y * width + x) * channels + channel];
  tiles[(long long)blockIdx.y * side * side + i] = (value - range[0]) / range[1];
}

// One block per tile: its mean.
extern "C" __global__ void tile_means(const float* tiles, int pixels, float* means) {
  const float* tile = tiles + (long long)blockIdx.x * pixels;
  double sum = 0.0;
  for (int i = (int)threadIdx.x; i < pixels; i += (int)blockDim.x) sum += tile[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) means[blockIdx.x] = (float)(sum / pixels);
}

// One thread per pixel, a row of blocks per tile: faded to the mean, which is taken off.
extern "C" __global__ void taper_tiles(
    const float* tiles, int pixels, const float* means, const float* taper,
    float* tapered) {
  int i = element();
  if (i >= pixels) return;
  long long at = (long long)blockIdx.y * pixels + i;
  tapered[at] = (tiles[at] - means[blockIdx.y]) * taper[i];
}

// One thread per bin, a row of blocks per tile: the Wiener filter of the signal over
// the noise that a network told per band.
extern "C" __global__ void wiener_bands(
    float* spectrum,
    const float* transfer,
    int bins,
    const float* log_snr,
    const float* band_weights,
    int bands,
    float scale) {
  int i = element();
  if (i >= bins) return;
  spectrum += 2LL * bins * blockIdx.y;
  log_snr += (long long)bands * blockIdx.y;
  float told = 0.0f;
  for (int band = 0; band < bands; ++band)
    told += log_snr[band] * band_weights[(long long)band * bins + i];
  float real = transfer[2 * i], imaginary = -transfer[2 * i + 1];
  float factor = 1.0f / (real * real + imaginary * imaginary + expf(-told));
  real = i ? real * factor : 1.0f;
  imaginary = i ? imaginary * factor : 0.0f;
  float a = spectrum[2 * i] * scale, b = spectrum[2 * i + 1] * scale;
  spectrum[2 * i] = a * real - b * imaginary;
  spectrum[2 * i + 1] = a * imaginary + b * real;
}

// One thread per pixel of a rectangle: joined += what the tiles from `first` on say of
// it in the signal's unit, neighbours blended linearly between their centres.
extern "C" __global__ void join_lattice(
    const float* tiles,
    const float* means,
    const float* range,
    int height,
    int width,
    int stride,
    int halo,
    int first,
    int batch,
    int rows,
    int columns,
    int side,
    float* joined) {
  int i = element();
  if (i >= height * width) return;
  int y = i / width, x = i % width;
  float centre = (side - 2 * halo - 1) * 0.5f;
  Between down = between((y - centre) / stride, rows);
  Between across = between((x - centre) / stride, columns);
  float total = 0.0f;
  for (int corner = 0; corner < 4; ++corner) {
    int row = corner / 2 ? down.second : down.first;
    int column = corner % 2 ? across.second : across.first;
    float weight = (corner / 2 ? down.share : 1.0f - down.share) *
                   (corner % 2 ? across.share : 1.0f - across.share);
    int tile = row * columns + column - first;
    if (weight <= 0.0f || tile < 0 || tile >= batch) continue;
    long long line = (long long)tile * side + y - row * stride + halo;
    float value = tiles[line * side + x - column * stride + halo] + means[tile];
    total += weight * (value * range[1] + range[0]);
  }
  joined[i] += total;
}
