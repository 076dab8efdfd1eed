// Patches: pieces of a frame that are restored one by one, several at once
// (rtfocus.processing.gpu.depth_variant, network_restorer).

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
// `first` on with `halo` around, 0 beyond patch and frame. The tables hold the pixels
// of every row and column of tiles.
extern "C" __global__ void cut_patches(
    const float* signal,
    int height,
    int width,
    int channels,
    int channel,
    const int* found,
    int first,
    int tile_columns,
    const Span* rows,
    const Span* columns,
    int halo,
    int patch_height,
    int patch_width,
    float* patches) {
  int i = element();
  if (i >= patch_height * patch_width) return;
  int number = first + (int)blockIdx.y;
  float value = 0.0f;
  if (number < found[0]) {
    int tile = found[1 + number];
    Span down = rows[tile / tile_columns], across = columns[tile % tile_columns];
    int y = i / patch_width + down.first - halo, x = i % patch_width + across.first - halo;
    bool inside = y >= 0 && y < height && x >= 0 && x < width;
    if (inside && y <= down.last + halo && x <= across.last + halo)
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
    const Span* rows,
    const Span* columns,
    int halo,
    int patch_height,
    int patch_width,
    int tile_columns,
    const Between* rows_around,
    const Between* columns_around,
    float* out) {
  int i = element();
  if (i >= height * width) return;
  int y = i / width, x = i % width;
  long long at = (long long)i * channels + channel;
  float change = 0.0f;
  for (int corner = 0; corner < 4; ++corner) {
    Corner near = corner_of(rows_around[y], columns_around[x], corner);
    int patch = rank[near.row * tile_columns + near.column] - first;
    if (near.weight <= 0.0f || patch < 0 || patch >= count) continue;
    long long line = (long long)patch * patch_height + y - rows[near.row].first + halo;
    float value = patches[line * patch_width + x - columns[near.column].first + halo];
    change += near.weight * (value - signal[at]);
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
  int y = top + number / columns * stride - halo + i / side;
  int x = left + number % columns * stride - halo + i % side;
  float value = plane_value(signal, height, width, channels, channels, channel, y, x);
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
  factor *= scale;
  multiply(
      spectrum, i, i ? real * factor : scale, i ? imaginary * factor : 0.0f, spectrum);
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
    Corner near = corner_of(down, across, corner);
    int tile = near.row * columns + near.column - first;
    if (near.weight <= 0.0f || tile < 0 || tile >= batch) continue;
    long long line = (long long)tile * side + y - near.row * stride + halo;
    float value = tiles[line * side + x - near.column * stride + halo] + means[tile];
    total += near.weight * (value * range[1] + range[0]);
  }
  joined[i] += total;
}
