// Cells: statistics of cells of 12 x 12 px of a padded frame, the background rule
// and the local standardisation (rtfocus.optics.normalisation).

// One thread per cell. `steps`: squared differences between horizontal neighbours,
// summed; behind the last column of cells there is none. A padded frame that is no
// whole cells is itself mirrored up to them.
extern "C" __global__ void cell_statistics(
    const float* signal,
    int height,
    int width,
    int channels,
    int padded_height,
    int padded_width,
    int rows,
    int columns,
    float* mean,
    float* lowest,
    float* peak,
    float* steps,
    double* sum,
    double* squares) {
  int cell = element();
  if (cell >= rows * columns) return;
  int top = cell / columns * CELL_PX, left = cell % columns * CELL_PX;
  double total = 0.0, power = 0.0;
  float low = 3.4e38f, high = -3.4e38f, differences = 0.0f;
  for (int row = top; row < top + CELL_PX; ++row) {
    int y = mirror(row, padded_height);
    float value =
        grey(signal, height, width, channels, y, mirror(left, padded_width));
    for (int x = left; x < left + CELL_PX; ++x) {
      int right = mirror(x + 1, padded_width);
      float next = x + 1 < columns * CELL_PX
                       ? grey(signal, height, width, channels, y, right)
                       : value;
      total += value;
      power += (double)value * value;
      low = fminf(low, value);
      high = fmaxf(high, value);
      differences += (next - value) * (next - value);
      value = next;
    }
  }
  mean[cell] = (float)(total / (CELL_PX * CELL_PX));
  lowest[cell] = low;
  peak[cell] = high;
  steps[cell] = differences;
  sum[cell] = total;
  squares[cell] = power;
}

// Mean square distance of a cell's pixels from the frame's median, which lies
// half-way between two order statistics.
extern "C" __global__ void cell_power(
    const double* sum,
    const double* squares,
    int cells,
    const float* middles,
    float* middle,
    double* power) {
  int cell = element();
  if (cell >= cells) return;
  float centre = (float)(0.5 * ((double)middles[0] + (double)middles[1]));
  if (cell == 0) middle[0] = centre;
  double size = CELL_PX * CELL_PX, about = centre;
  double spread = squares[cell] - 2.0 * about * sum[cell] + size * about * about;
  power[cell] = fmax(spread, 0.0) / size;
}

// One block.
extern "C" __global__ void mean_of(const double* values, int count, double* mean) {
  double total = sum_of_parts(values, count);
  if (threadIdx.x == 0) mean[0] = total / count;
}

// One thread per cell: 1 / local deviation, a window of `window` x `window` cells
// whose weights fall linearly and end at the frame's edge.
extern "C" __global__ void cell_inverse_deviation(
    const double* power,
    int rows,
    int columns,
    int window,
    float floor_share,
    const double* mean_power,
    float* inverse) {
  int cell = element();
  if (cell >= rows * columns) return;
  int row = cell / columns, column = cell % columns, reach = window / 2;
  double total = 0.0, weights = 0.0;
  for (int y = max(row - reach, 0); y <= min(row + reach, rows - 1); ++y) {
    double down = 1.0 - abs(y - row) / (reach + 1.0);
    for (int x = max(column - reach, 0); x <= min(column + reach, columns - 1); ++x) {
      double weight = down * (1.0 - abs(x - column) / (reach + 1.0));
      total += weight * power[y * columns + x];
      weights += weight;
    }
  }
  double least = (double)floor_share * sqrt(mean_power[0]);
  // A constant frame has no deviation at all: any divisor leaves its zeros.
  if (least <= 0.0) least = 1.0;
  inverse[cell] = (float)(1.0 / fmax(sqrt(total / weights), least));
}

// Which two cells a pixel lies between.
__device__ static inline Between cells_around(int pixel, int count) {
  int from = pixel + CELL_PX / 2, next = from / CELL_PX;
  return {
      max(next - 1, 0), min(next, count - 1), (from % CELL_PX + 0.5f) / CELL_PX};
}

// One thread per padded pixel: the network's view, interpolated between cells.
extern "C" __global__ void standardise(
    const float* signal,
    int height,
    int width,
    int channels,
    int rows,
    int columns,
    const float* middle,
    const float* inverse,
    void* out,
    int kind) {
  int i = element();
  int padded_width = columns * CELL_PX;
  if (i >= rows * CELL_PX * padded_width) return;
  int y = i / padded_width, x = i % padded_width;
  float value = grey(signal, height, width, channels, y, x) - middle[0];
  Between down = cells_around(y, rows), across = cells_around(x, columns);
  store(out, kind, i, value * linear(inverse, columns, 1, down, across));
}

// Standard deviation of the noise in the quietest tenth of the cells, one thread.
// `quietest`: the two order statistics around the quantile, `part` the way between
// them; `extremes`: lowest and highest pixel, for frames without a quantum.
extern "C" __global__ void background_noise(
    const float* quietest,
    float part,
    const float* lowest,
    const float* highest,
    float quantum,
    float* noise) {
  if (element() != 0) return;
  float power = quietest[0] + (quietest[1] - quietest[0]) * part;
  float step = quantum;
  if (step <= 0.0f) step = fmaxf(1e-4f * (highest[0] - lowest[0]), 1.17549435e-38f);
  double variance = (double)power / (2 * CELL_PX * CELL_PX);
  noise[0] = (float)sqrt(fmax(variance, (double)step * step / 12.0));
}

// One thread per tile: nothing in it stands out of the noise. Parts of a tile that
// lie outside the frame are not looked at. Lengths in cells.
extern "C" __global__ void background(
    const float* mean,
    const float* peak,
    int rows,
    int columns,
    int tile_rows,
    int tile_columns,
    int size,
    int stride,
    int start,
    float contrast,
    float peak_height,
    const float* noise,
    unsigned char* empty) {
  int tile = element();
  if (tile >= tile_rows * tile_columns) return;
  int top = start + tile / tile_columns * stride;
  int left = start + tile % tile_columns * stride;
  float darkest = 3.4e38f, brightest = -3.4e38f, highest = -3.4e38f;
  for (int y = max(top, 0); y < min(top + size, rows); ++y)
    for (int x = max(left, 0); x < min(left + size, columns); ++x) {
      darkest = fminf(darkest, mean[y * columns + x]);
      brightest = fmaxf(brightest, mean[y * columns + x]);
      highest = fmaxf(highest, peak[y * columns + x]);
    }
  empty[tile] = brightest - darkest < contrast * noise[0] &&
                highest - darkest < peak_height * noise[0];
}
