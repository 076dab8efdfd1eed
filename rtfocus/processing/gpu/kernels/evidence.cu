// Evidence: how much of a correction the image itself supports
// (rtfocus.engines.fitted, whose constants these are).

#define EVIDENCE_PX 16
#define BLOCK_PX (2 * EVIDENCE_PX)
#define OCTAVES 4
#define NOISE_OCTAVES 3
#define RATIOS 21
#define MEASURES (RATIOS + 4)
#define LEAST 1e-7f
#define LEAST_SPREAD 0.1f
#define FARTHEST 3.0f
#define WIDEST_LAYER 64

// Power of the frame's details, what it and the correction have in common, power of
// the correction's details; power of the diagonal details before and after.
#define SUMS 5
// Pixels of a cell that are left after its first octave.
#define LEFT (EVIDENCE_PX * EVIDENCE_PX / 4)

// Splits 2 x 2 pixels, row by row, into their mean, which is returned, and details:
// differences down, across and along the diagonals.
__device__ static inline float haar(const float* pixels, float* details) {
  float top = pixels[0] + pixels[1], bottom = pixels[2] + pixels[3];
  float left = pixels[0] - pixels[1], right = pixels[2] - pixels[3];
  details[0] = (top - bottom) * 0.25f;
  details[1] = (left + right) * 0.25f;
  details[2] = (left - right) * 0.25f;
  return (top + bottom) * 0.25f;
}

// One thread per cell of 16 px: its means of products, axes (sum, octave, cell), and
// the mean square of the correction. Each octave halves both images; only what the first
// leaves is held, for what a thread indexes lies in memory.
extern "C" __global__ void evidence_cells(
    const float* signal,
    const float* restored,
    int height,
    int width,
    int channels,
    int rows,
    int columns,
    const float* range,
    float* sums,
    float* powers) {
  int cell = element();
  if (cell >= rows * columns) return;
  int top = cell / columns * EVIDENCE_PX, left = cell % columns * EVIDENCE_PX;
  float seen[LEFT], raised[LEFT], power = 0.0f;
  for (int octave = 0; octave < OCTAVES; ++octave) {
    int side = EVIDENCE_PX >> octave, half = side / 2;
    float found[SUMS] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (int y = 0; y < half; ++y)
      for (int x = 0; x < half; ++x) {
        float was[4], change[4], details[3], changes[3];
        for (int corner = 0; corner < 4; ++corner) {
          int row = 2 * y + corner / 2, column = 2 * x + corner % 2;
          if (octave > 0) {
            was[corner] = seen[row * side + column];
            change[corner] = raised[row * side + column];
            continue;
          }
          int down = top + row, across = left + column;
          float before = grey(signal, height, width, channels, down, across);
          float after = grey(restored, height, width, channels, down, across);
          was[corner] = (before - range[0]) / range[1];
          change[corner] = (after - before) / range[1];
          power += change[corner] * change[corner];
        }
        // What lies here was read before: the result is packed from the front.
        seen[y * half + x] = haar(was, details);
        raised[y * half + x] = haar(change, changes);
        for (int detail = 0; detail < 3; ++detail) {
          found[0] += details[detail] * details[detail];
          found[1] += details[detail] * changes[detail];
          found[2] += changes[detail] * changes[detail];
        }
        float after = details[2] + changes[2];
        found[3] += details[2] * details[2];
        found[4] += after * after;
      }
    for (int sum = 0; sum < SUMS; ++sum)
      sums[(sum * OCTAVES + octave) * rows * columns + cell] =
          found[sum] / (half * half);
  }
  powers[cell] = power / (EVIDENCE_PX * EVIDENCE_PX);
}

__device__ static inline float log_ratio(float above, float below) {
  return logf((fmaxf(above, 0.0f) + LEAST) / (below + LEAST));
}

// What the labels say of themselves: confidence, deviation and distance in levels,
// share of background.
__device__ static inline void certainty(
    const float* defocus_um, const float* confidence, const float* uncertainty_um,
    const short* level, int background, float step_um, int tile, float weight,
    float* told) {
  bool empty = level[tile] == background;
  float spread = empty ? 0.0f : uncertainty_um[tile] / step_um;
  float distance = empty ? 0.0f : fabsf(defocus_um[tile]) / step_um;
  told[0] += weight * confidence[tile];
  told[1] += weight * logf(spread + LEAST_SPREAD) / 2.0f;
  told[2] += weight * distance / 5.0f;
  told[3] += weight * (empty ? 1.0f : 0.0f);
}

// A small function of measures. `widths` holds the number of measures and the width of
// every layer; `numbers` the middle and spread of every measure, then weights and bias of
// every layer.
__device__ static inline float fitted(
    const float* measured, const int* widths, int layers, const float* numbers) {
  float now[WIDEST_LAYER], next[WIDEST_LAYER];
  int width = widths[0];
  for (int i = 0; i < width; ++i) {
    float value = (measured[i] - numbers[i]) / numbers[width + i];
    now[i] = fminf(fmaxf(value, -FARTHEST), FARTHEST);
  }
  numbers += 2 * width;
  for (int layer = 1; layer <= layers; ++layer) {
    int outputs = widths[layer];
    for (int to = 0; to < outputs; ++to) {
      float value = numbers[outputs * width + to];
      for (int from = 0; from < width; ++from)
        value += numbers[to * width + from] *
                 (layer > 1 ? fmaxf(now[from], 0.0f) : now[from]);
      next[to] = value;
    }
    for (int to = 0; to < outputs; ++to) now[to] = next[to];
    numbers += outputs * (width + 1);
    width = outputs;
  }
  return now[0];
}

// One thread per cell: the share of the correction that is applied, 0 to 1; and if
// `states_error`, of every block of 2 x 2 cells, the squared error that is left.
extern "C" __global__ void evidence_shares(
    const float* sums,
    int rows,
    int columns,
    const float* defocus_um,
    const float* confidence,
    const float* uncertainty_um,
    const short* level,
    int background,
    int tile_rows,
    int tile_columns,
    float origin_px,
    float stride_px,
    float step_um,
    const int* widths,
    int layers,
    const float* numbers,
    float* shares,
    const float* powers,
    const int* error_widths,
    int error_layers,
    const float* error_numbers,
    int states_error,
    float* errors) {
  int cell = element();
  if (cell >= rows * columns) return;
  int row = cell / columns, column = cell % columns;
  float mean[SUMS][OCTAVES];
  int top = max(row - 2, 0), bottom = min(row + 2, rows - 1);
  int left = max(column - 2, 0), right = min(column + 2, columns - 1);
  float near = (float)((bottom - top + 1) * (right - left + 1));
  for (int sum = 0; sum < SUMS; ++sum)
    for (int octave = 0; octave < OCTAVES; ++octave) {
      const float* values = sums + (sum * OCTAVES + octave) * rows * columns;
      float total = 0.0f;
      for (int y = top; y <= bottom; ++y)
        for (int x = left; x <= right; ++x) total += values[y * columns + x];
      mean[sum][octave] = total / near;
    }
  const float *p = mean[0], *b = mean[1], *c = mean[2], *d = mean[3], *e = mean[4];
  float total = p[0] + p[1] + p[2] + p[3];
  float now[MEASURES + 2];
  for (int octave = 0; octave < OCTAVES; ++octave) {
    now[octave] = log_ratio(p[octave], total);
    now[4 + octave] = log_ratio(p[octave] + 2.0f * b[octave] + c[octave], p[octave]);
    now[8 + octave] = log_ratio(c[octave], p[octave]);
    now[12 + octave] = 4.0f * b[octave] / (sqrtf(p[octave] * c[octave]) + LEAST);
  }
  for (int octave = 0; octave < NOISE_OCTAVES; ++octave)
    now[16 + octave] = log_ratio(d[octave], p[octave]);
  now[19] = log_ratio(e[0], d[0]);
  now[20] = logf(total + LEAST);
  for (int ratio = 0; ratio < RATIOS; ++ratio) now[ratio] /= 4.0f;
  Between y = between(
      ((row + 0.5f) * EVIDENCE_PX - 0.5f - origin_px) / stride_px, tile_rows);
  Between x = between(
      ((column + 0.5f) * EVIDENCE_PX - 0.5f - origin_px) / stride_px, tile_columns);
  for (int entry = RATIOS; entry < MEASURES; ++entry) now[entry] = 0.0f;
  for (int corner = 0; corner < 4; ++corner) {
    Corner near = corner_of(y, x, corner);
    certainty(
        defocus_um, confidence, uncertainty_um, level, background, step_um,
        near.row * tile_columns + near.column, near.weight, now + RATIOS);
  }
  float share = 1.0f / (1.0f + expf(-fitted(now, widths, layers, numbers)));
  shares[cell] = share;
  if (!states_error || row % 2 || column % 2) return;
  float power = 0.0f;
  int cells = 0;
  for (int below = row; below <= min(row + 1, rows - 1); ++below)
    for (int beside = column; beside <= min(column + 1, columns - 1); ++beside) {
      power += powers[below * columns + beside];
      ++cells;
    }
  now[MEASURES] = share;
  now[MEASURES + 1] = logf(share * share * power / cells + LEAST) / 4.0f;
  errors[row / 2 * ((columns + 1) / 2) + column / 2] =
      expf(fitted(now, error_widths, error_layers, error_numbers));
}

// Pixels of a block along one axis that lie in a tile; the frame has `side`.
__device__ static inline float common(int block, float begin, float tile_px, int side) {
  float end = fminf(begin + tile_px, min((block + 1) * BLOCK_PX, side));
  return fmaxf(end - fmaxf(begin, block * BLOCK_PX), 0.0f);
}

// One thread per tile: the root mean square of the error expected in it, in the signal's
// unit, from the squared errors of blocks of 32 px.
extern "C" __global__ void expected_errors(
    const float* errors,
    int height,
    int width,
    int rows,
    int columns,
    const float* range,
    int tile_rows,
    int tile_columns,
    float origin_px,
    float stride_px,
    int tile_px,
    float* expected) {
  int tile = element();
  if (tile >= tile_rows * tile_columns) return;
  float first_px = origin_px + 0.5f - tile_px / 2.0f;
  float top = first_px + stride_px * (tile / tile_columns);
  float left = first_px + stride_px * (tile % tile_columns);
  float total = 0.0f, weights = 0.0f;
  for (int row = max((int)top / BLOCK_PX, 0); row < rows; ++row) {
    float down = common(row, top, tile_px, height);
    for (int column = max((int)left / BLOCK_PX, 0); column < columns; ++column) {
      float weight = down * common(column, left, tile_px, width);
      total += weight * errors[row * columns + column];
      weights += weight;
    }
  }
  expected[tile] = sqrtf(total / weights) * range[1];
}

// One thread per pixel: out = signal + share * (out - signal), the share linear
// between the cells' centres.
extern "C" __global__ void evidence_apply(
    const float* signal,
    int height,
    int width,
    int channels,
    const float* shares,
    int rows,
    int columns,
    float* out) {
  int i = element();
  if (i >= height * width) return;
  Between y = between((i / width + 0.5f) / EVIDENCE_PX - 0.5f, rows);
  Between x = between((i % width + 0.5f) / EVIDENCE_PX - 0.5f, columns);
  float share = linear(shares, columns, 1, y, x);
  for (int channel = 0; channel < channels; ++channel) {
    long long at = (long long)i * channels + channel;
    out[at] = signal[at] + share * (out[at] - signal[at]);
  }
}
