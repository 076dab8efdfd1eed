// A stand-in libcufft: two-dimensional real transforms by mixed radices, put on the
// streams of the stand-in libcuda.
#include <cmath>
#include <complex>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
typedef std::complex<double> Number;
extern "C" void standin_count(long more);
extern "C" int standin_enqueue(void* stream, void (*function)(void*), void* data);

// exp(sign 2 pi i k / n) for k = 0..n - 1.
static std::vector<Number> roots_of(int n, int sign) {
  std::vector<Number> roots(n);
  for (int k = 0; k < n; ++k) roots[k] = std::polar(1.0, sign * 2 * M_PI * k / n);
  return roots;
}

// Recursive decimation in time, unscaled; `roots` of the whole length.
static void transform(
    const Number* in, Number* out, int n, int stride, const std::vector<Number>& roots) {
  if (n == 1) {
    out[0] = in[0];
    return;
  }
  int radix = 2, whole = (int)roots.size();
  while (n % radix) ++radix;
  int m = n / radix;
  for (int r = 0; r < radix; ++r)
    transform(in + r * stride, out + r * m, m, stride * radix, roots);
  Number parts[64];
  for (int k = 0; k < m; ++k) {
    for (int r = 0; r < radix; ++r) parts[r] = out[r * m + k] * roots[r * k * stride];
    for (int q = 0; q < radix; ++q) {
      Number total = parts[0];
      for (int r = 1; r < radix; ++r)
        total += parts[r] * roots[r * q % radix * (whole / radix)];
      out[q * m + k] = total;
    }
  }
}

static void columns(std::vector<Number>& half, int height, int width, int sign) {
  std::vector<Number> in(height), out(height), roots = roots_of(height, sign);
  for (int x = 0; x < width; ++x) {
    for (int y = 0; y < height; ++y) in[y] = half[y * width + x];
    transform(in.data(), out.data(), height, 1, roots);
    for (int y = 0; y < height; ++y) half[y * width + x] = out[y];
  }
}

static void forward(const float* image, float* spectrum, int height, int width) {
  int half = width / 2 + 1;
  std::vector<Number> all(height * half), in(width), out(width);
  std::vector<Number> roots = roots_of(width, -1);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) in[x] = image[y * width + x];
    transform(in.data(), out.data(), width, 1, roots);
    for (int x = 0; x < half; ++x) all[y * half + x] = out[x];
  }
  columns(all, height, half, -1);
  for (int i = 0; i < height * half; ++i) {
    spectrum[2 * i] = (float)all[i].real();
    spectrum[2 * i + 1] = (float)all[i].imag();
  }
}

static void inverse(float* spectrum, float* image, int height, int width) {
  int half = width / 2 + 1;
  std::vector<Number> all(height * half), in(width), out(width);
  for (int i = 0; i < height * half; ++i) {
    all[i] = {spectrum[2 * i], spectrum[2 * i + 1]};
    spectrum[2 * i] = spectrum[2 * i + 1] = 77.0f;  // cuFFT spoils its input
  }
  columns(all, height, half, 1);
  std::vector<Number> roots = roots_of(width, 1);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < half; ++x) in[x] = all[y * half + x];
    for (int x = half; x < width; ++x) in[x] = std::conj(all[y * half + width - x]);
    transform(in.data(), out.data(), width, 1, roots);
    for (int x = 0; x < width; ++x) image[y * width + x] = (float)out[x].real();
  }
}

struct Plan {
  int height, width, images;
  void* stream;
};
static std::deque<Plan> plans;
static std::mutex plans_gate;

struct Call {
  Plan plan;
  float *source, *target;
  bool back;
};

static void run(void* data) {
  // Not freed: a graph replays it.
  Call* call = (Call*)data;
  int height = call->plan.height, width = call->plan.width;
  long pixels = (long)height * width, bins = 2L * height * (width / 2 + 1);
  for (int n = 0; n < call->plan.images; ++n) {
    if (call->back)
      inverse(call->source + n * bins, call->target + n * pixels, height, width);
    else forward(call->source + n * pixels, call->target + n * bins, height, width);
  }
}

API int cufftPlanMany(
    int* plan, int rank, int* sides, int*, int, int, int*, int, int, int, int images) {
  if (rank != 2) return 4;
  std::lock_guard<std::mutex> one_at_a_time(plans_gate);
  plans.push_back({sides[0], sides[1], images, nullptr});
  *plan = (int)plans.size() - 1;
  standin_count(1);
  return 0;
}
API int cufftSetStream(int plan, void* stream) {
  std::lock_guard<std::mutex> one_at_a_time(plans_gate);
  plans[plan].stream = stream;
  return 0;
}
API int cufftExecR2C(int plan, float* image, float* spectrum) {
  std::lock_guard<std::mutex> one_at_a_time(plans_gate);
  Call* call = new Call{plans[plan], image, spectrum, false};
  return standin_enqueue(plans[plan].stream, run, call);
}
API int cufftExecC2R(int plan, float* spectrum, float* image) {
  std::lock_guard<std::mutex> one_at_a_time(plans_gate);
  Call* call = new Call{plans[plan], spectrum, image, true};
  return standin_enqueue(plans[plan].stream, run, call);
}
API int cufftDestroy(int) { standin_count(-1); return 0; }
