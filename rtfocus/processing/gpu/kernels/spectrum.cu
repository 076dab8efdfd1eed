// Spectrum: what lies between the Fourier transforms of depth-variant Wiener and
// Richardson-Lucy (rtfocus.processing.restore, rtfocus.processing.cpu.deconvolution).
//
// Spectra are half spectra (height, width / 2 + 1) of complex numbers, interleaved;
// inverse transforms are not scaled, so their `scale` is 1 / (height * width).

// Which two pixels of an axis a pixel of its surrounded form mixes, and the share of
// the second. `count` pixels from `start` on come first, then a margin that leads from
// what lies behind them to what lies before them.
__device__ static inline Between mixed(
    int place, int start, int count, int length, int frame_length) {
  if (place < count) return {start + place, start + place, 0.0f};
  int margin = length - count, step = place - count;
  float share = 0.5f - 0.5f * cosf(3.14159265f * (step + 0.5f) / margin);
  return {
      mirror(start + count + step, frame_length),
      mirror(start - margin + step, frame_length), share};
}

// One thread per pixel of the transform: a rectangle of the frame in a margin without
// a jump (rtfocus.processing.montage.read_region).
extern "C" __global__ void surround(
    const float* signal,
    int height,
    int width,
    int channels,
    int channel,
    int top,
    int left,
    int rows,
    int columns,
    int padded_height,
    int padded_width,
    int positive,
    float* padded) {
  int i = element();
  if (i >= padded_height * padded_width) return;
  Between down = mixed(i / padded_width, top, rows, padded_height, height);
  Between across = mixed(i % padded_width, left, columns, padded_width, width);
  float value = linear(signal + channel, width, channels, down, across);
  padded[i] = positive ? fmaxf(value, 0.0f) : value;
}

// One thread per pixel: a PSF with its centre at the origin. One larger than the
// image wraps around, as periodic convolution does.
extern "C" __global__ void place_psf(
    const float* psf, int psf_height, int psf_width, int height, int width,
    float* image) {
  int i = element();
  if (i >= height * width) return;
  float sum = 0.0f;
  for (int y = (i / width + psf_height / 2) % height; y < psf_height; y += height)
    for (int x = (i % width + psf_width / 2) % width; x < psf_width; x += width)
      sum += psf[y * psf_width + x];
  image[i] = sum;
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

// f^3 of a bin of a half spectrum, f in cycles per pixel.
__device__ static inline double cubed_frequency(int i, int height, int width) {
  int columns = width / 2 + 1, row = i / columns;
  double v = (double)(row <= (height - 1) / 2 ? row : row - height) / height;
  double u = (double)(i % columns) / width;
  double square = u * u + v * v;
  return square * sqrt(square);
}

// Blocks of threads, for a band of frequencies (cubed): power of a spectrum, power of
// a signal blurred by a transfer function whose power at one cycle per pixel is 1,
// and the number of bins; of each one part per block.
extern "C" __global__ void band_parts(
    const float* spectrum,
    const float* transfer,
    int height,
    int width,
    float low,
    float high,
    double* sums) {
  double seen = 0.0, blurred = 0.0, bins = 0.0;
  int count = height * (width / 2 + 1);
  for (int i = element(); i < count; i += (int)(gridDim.x * blockDim.x)) {
    double rise = cubed_frequency(i, height, width);
    if (rise <= low || rise >= high) continue;
    double a = spectrum[2 * i], b = spectrum[2 * i + 1];
    double real = transfer[2 * i], imaginary = transfer[2 * i + 1];
    seen += a * a + b * b;
    blurred += (real * real + imaginary * imaginary) / rise;
    bins += 1.0;
  }
  seen = block_sum(seen);
  if (threadIdx.x == 0) sums[blockIdx.x] = seen;
  blurred = block_sum(blurred);
  if (threadIdx.x == 0) sums[gridDim.x + blockIdx.x] = blurred;
  bins = block_sum(bins);
  if (threadIdx.x == 0) sums[2 * gridDim.x + blockIdx.x] = bins;
}

// One block: noise power over the signal's power at one cycle per pixel, from the
// parts of the kernels above.
//
// The variance is the mean of the `kept` smallest powers of detail, whose greatest
// is `limit`, but never less than rounding makes (`least`) nor, where the camera's
// gain is known, than photons make (`inverse_gain` times the mean light).
extern "C" __global__ void wiener_ratio(
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
    float caution,
    float* ratio) {
  double below = sum_of_parts(below_sums, parts);
  double number = sum_of_parts(below_counts, parts);
  double power = sum_of_parts(band_sums, parts) / pixels;
  double blurred = sum_of_parts(band_sums + parts, parts);
  double bins = sum_of_parts(band_sums + 2 * parts, parts);
  if (threadIdx.x != 0) return;
  double floor_variance = least + (double)round_off * highest[0] * highest[0];
  double variance = floor_variance;
  if (kept > 0)
    variance = fmax((below + (kept - number) * limit[0]) / kept, floor_variance);
  variance = fmax(variance, light_sum[0] / pixels * inverse_gain);
  // White noise has its variance in every bin; the rest is blurred signal.
  double signal = fmax(power - variance * bins, 1e-3 * power);
  bool blind = signal <= 0.0 || blurred <= 0.0;
  ratio[0] = blind ? 1.0f : (float)(caution * variance * blurred / signal);
}

// One thread per bin: spectrum *= conj(H) / (|H|^2 + ratio f^3), its size limited.
// Where `given` > 0 it is the ratio of noise to signal at every frequency.
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
  int i = element();
  if (i >= height * (width / 2 + 1)) return;
  float real = transfer[2 * i], imaginary = -transfer[2 * i + 1];
  float power = real * real + imaginary * imaginary, factor;
  if (given > 0.0f) {
    factor = (1.0f + given) / (power + given);
  } else {
    factor = 1.0f / (power + ratio[0] * (float)cubed_frequency(i, height, width));
    float size = sqrtf(power) * factor;
    if (size > highest_gain) factor *= highest_gain / size;
  }
  factor *= scale;
  multiply(spectrum, i, real * factor, imaginary * factor, filtered);
}

// One thread per bin, a row of blocks per image: spectrum *= transfer * scale; of `steps`
// above 0 the back projector instead, which does the work of so many matched ones.
extern "C" __global__ void project(
    float* spectrum, const float* transfer, int bins, float steps, float scale) {
  int i = element();
  if (i >= bins) return;
  spectrum += 2LL * bins * blockIdx.y;
  float real = transfer[2 * i], imaginary = transfer[2 * i + 1];
  if (steps > 0.0f) imaginary = -imaginary;
  if (steps > 0.0f && steps != 1.0f) {
    float power = real * real + imaginary * imaginary;
    power = fminf(fmaxf(power, 1e-6f), 1.0f);
    scale *= -expm1f(steps * log1pf(-power)) / power;
  }
  multiply(spectrum, i, real * scale, imaginary * scale, spectrum);
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
    const float* before, const float* correction, int count, float* out) {
  int i = element();
  if (i < count) out[i] = fmaxf(before[i] * correction[i], 0.0f);
}

// One thread per pixel: kernel <- better / sum. A black frame tells nothing of it.
extern "C" __global__ void kernel_settle(
    float* kernel, const float* better, int count, const double* sum) {
  int i = element();
  if (i < count && sum[0] > 0.0) kernel[i] = (float)(better[i] / sum[0]);
}
