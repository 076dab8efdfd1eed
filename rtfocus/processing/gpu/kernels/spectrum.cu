// Spectrum: what lies between the Fourier transforms of depth-variant Wiener and
// Richardson-Lucy (rtfocus.processing.{context,noise,wiener,richardson_lucy}).
//
// Spectra are half spectra (height, width / 2 + 1) of complex numbers, interleaved;
// inverse transforms are not scaled, so their `scale` is 1 / (height * width).

// One thread per pixel of the transform: the whole frame in a margin that leads
// smoothly from its last rows to its first. Each axis mixes two rows: the tables
// hold both and the share of the second.
extern "C" __global__ void surround(
    const float* signal,
    int width,
    int channels,
    int channel,
    int padded_height,
    int padded_width,
    const int* row_a,
    const int* row_b,
    const float* row_share,
    const int* column_a,
    const int* column_b,
    const float* column_share,
    int positive,
    float* padded) {
  int i = element();
  if (i >= padded_height * padded_width) return;
  int y = i / padded_width, x = i % padded_width;
  const float* upper = signal + (long long)row_a[y] * width * channels + channel;
  const float* lower = signal + (long long)row_b[y] * width * channels + channel;
  int left = column_a[x] * channels, right = column_b[x] * channels;
  float near = upper[left] + (lower[left] - upper[left]) * row_share[y];
  float far = upper[right] + (lower[right] - upper[right]) * row_share[y];
  float value = near + (far - near) * column_share[x];
  padded[i] = positive ? fmaxf(value, 0.0f) : value;
}

// Blocks of threads: sum of the light and brightest pixel, one part per block.
extern "C" __global__ void light_parts(
    const float* image, int count, double* sums, float* maxima) {
  double sum = 0.0;
  float highest = 0.0f;
  for (int i = element(); i < count; i += (int)(gridDim.x * blockDim.x)) {
    sum += fmaxf(image[i], 0.0f);
    highest = fmaxf(highest, image[i]);
  }
  sum = block_sum(sum);
  highest = block_max(highest);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    maxima[blockIdx.x] = highest;
  }
}

// One block adds up the parts of `parts` blocks.
extern "C" __global__ void light(
    const double* sums, const float* maxima, int parts, double* sum,
    float* highest) {
  double total = sum_of_parts(sums, parts);
  float most = 0.0f;
  for (int i = (int)threadIdx.x; i < parts; i += (int)blockDim.x)
    most = fmaxf(most, maxima[i]);
  most = block_max(most);
  if (threadIdx.x == 0) {
    sum[0] = total;
    highest[0] = most;
  }
}

// One thread per 2 x 2 pixels: power of the finest diagonal Haar detail.
extern "C" __global__ void diagonal_power(
    const float* image, int height, int width, float* power) {
  int i = element(), columns = width / 2;
  if (i >= height / 2 * columns) return;
  const float* upper =
      image + (long long)(i / columns) * 2 * width + i % columns * 2;
  const float* lower = upper + width;
  float detail = (upper[0] - upper[1] - lower[0] + lower[1]) * 0.5f;
  power[i] = detail * detail;
}

// Blocks of threads: sum and number of the values below a limit.
extern "C" __global__ void below_parts(
    const float* values, int count, const float* limit, double* sums, double* counts) {
  double sum = 0.0, below = 0.0;
  for (int i = element(); i < count; i += (int)(gridDim.x * blockDim.x))
    if (values[i] < limit[0]) {
      sum += values[i];
      below += 1.0;
    }
  sum = block_sum(sum);
  below = block_sum(below);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    counts[blockIdx.x] = below;
  }
}

// Blocks of threads: power of a spectrum in a band of frequencies (cycles per
// pixel), one part per block.
extern "C" __global__ void band_parts(
    const float* spectrum,
    int height,
    int width,
    float low,
    float high,
    double* sums) {
  int columns = width / 2 + 1;
  double sum = 0.0;
  for (int i = element(); i < height * columns; i += (int)(gridDim.x * blockDim.x)) {
    int row = i / columns;
    double v = (double)(row <= (height - 1) / 2 ? row : row - height) / height;
    double u = (double)(i % columns) / width;
    double frequency = sqrt(u * u + v * v);
    if (frequency <= low || frequency >= high) continue;
    double real = spectrum[2 * i], imaginary = spectrum[2 * i + 1];
    sum += real * real + imaginary * imaginary;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One block: noise power over the signal's power at one cycle per
// pixel, for every level, from the parts of the kernels above.
//
// The variance is the mean of the `kept` smallest powers of detail, whose greatest
// is `limit`, but never less than rounding makes (`least`) nor, where the camera's
// gain is known, than photons make (`inverse_gain` times the mean light).
extern "C" __global__ void wiener_ratios(
    const double* below_sums,
    const double* below_counts,
    int parts,
    int kept,
    const float* limit,
    float least,
    float round_off,
    const float* highest,
    const double* light_sum,
    float inverse_gain,
    const double* band_sums,
    int pixels,
    int band_bins,
    float caution,
    int levels,
    const double* band_powers,
    float* ratios) {
  double below = sum_of_parts(below_sums, parts);
  double number = sum_of_parts(below_counts, parts);
  double power = sum_of_parts(band_sums, parts) / pixels;
  if (threadIdx.x != 0) return;
  double floor_variance = least + (double)round_off * highest[0] * highest[0];
  double variance = floor_variance;
  if (kept > 0)
    variance = fmax((below + (kept - number) * limit[0]) / kept, floor_variance);
  variance = fmax(variance, light_sum[0] / pixels * inverse_gain);
  // White noise has its variance in every bin; the rest is blurred signal.
  double signal = fmax(power - variance * band_bins, 1e-3 * power);
  for (int level = 0; level < levels; ++level) {
    bool blind = signal <= 0.0 || band_powers[level] <= 0.0;
    ratios[level] =
        blind ? 1.0f : (float)(caution * variance * band_powers[level] / signal);
  }
}

// One thread per bin: conj(H) / (|H|^2 + ratio f^3), its size limited. Where
// `given` > 0 it is the ratio of noise to signal at every frequency.
extern "C" __global__ void wiener_apply(
    const float* spectrum,
    const float* transfer,
    int height,
    int width,
    const float* ratio,
    float given,
    float highest_gain,
    float scale,
    float* filtered) {
  int i = element(), columns = width / 2 + 1;
  if (i >= height * columns) return;
  float real = transfer[2 * i], imaginary = -transfer[2 * i + 1];
  float power = real * real + imaginary * imaginary, factor;
  if (given > 0.0f) {
    factor = (1.0f + given) / (power + given);
  } else {
    int row = i / columns;
    double v = (double)(row <= (height - 1) / 2 ? row : row - height) / height;
    double u = (double)(i % columns) / width;
    double square = u * u + v * v;
    factor = 1.0f / (power + ratio[0] * (float)(square * sqrt(square)));
    float size = sqrtf(power) * factor;
    if (size > highest_gain) factor *= highest_gain / size;
  }
  factor *= scale;
  real *= factor;
  imaginary *= factor;
  float a = spectrum[2 * i], b = spectrum[2 * i + 1];
  filtered[2 * i] = a * real - b * imaginary;
  filtered[2 * i + 1] = a * imaginary + b * real;
}

// One thread per bin: spectrum *= transfer * scale.
extern "C" __global__ void project(
    float* spectrum, const float* transfer, int bins, float scale) {
  int i = element();
  if (i >= bins) return;
  float real = transfer[2 * i] * scale, imaginary = transfer[2 * i + 1] * scale;
  float a = spectrum[2 * i], b = spectrum[2 * i + 1];
  spectrum[2 * i] = a * real - b * imaginary;
  spectrum[2 * i + 1] = a * imaginary + b * real;
}

// One thread per bin: spectrum *= B * scale, B the back projector that does the work
// of `steps` matched ones (rtfocus.processing.accelerated); 1: the matched one.
extern "C" __global__ void back_project(
    float* spectrum, const float* transfer, int bins, float steps, float scale) {
  int i = element();
  if (i >= bins) return;
  float real = transfer[2 * i], imaginary = -transfer[2 * i + 1];
  if (steps != 1.0f) {
    float power = real * real + imaginary * imaginary;
    power = fminf(fmaxf(power, 1e-6f), 1.0f);
    scale *= -expm1f(steps * log1pf(-power)) / power;
  }
  real *= scale;
  imaginary *= scale;
  float a = spectrum[2 * i], b = spectrum[2 * i + 1];
  spectrum[2 * i] = a * real - b * imaginary;
  spectrum[2 * i + 1] = a * imaginary + b * real;
}

// blurred <- signal / blurred. Below a share of the brightest pixel a blurred
// estimate is round-off of the transforms, and nothing may be divided by it.
extern "C" __global__ void richardson_lucy_ratio(
    const float* signal, float* blurred, int count, const float* highest) {
  int i = element();
  if (i >= count) return;
  float least = fmaxf(1e-6f * highest[0], 1.17549435e-38f);
  blurred[i] = signal[i] / fmaxf(blurred[i], least);
}

extern "C" __global__ void richardson_lucy_update(
    float* estimate, const float* correction, int count) {
  int i = element();
  if (i < count) estimate[i] = fmaxf(estimate[i] * correction[i], 0.0f);
}
