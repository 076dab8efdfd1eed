// Common: element types, indices and access to frames, for all other kernels.
//
// All files of this folder are one translation unit, in alphabetical order but
// for this one, which comes first. No header is included, so that NVRTC needs
// nothing but this text; compiled as C++ the same text runs on the host, which
// is how its arithmetic is tested (RTFOCUS_HOST).
//
// Axes of frames: (y, x, channel), C order. "Padded" means mirrored behind both
// axes as numpy.pad(mode="symmetric") does.

// Element types of the camera's frames, of tiles and of results.
#define KIND_U8 0
#define KIND_U16 1
#define KIND_F32 2
#define KIND_F16 3

#define CELL_PX 12

#ifndef RTFOCUS_HOST
__device__ static inline unsigned short half_of(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ static inline float float_of(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
#endif

__device__ static inline int element() {
  return (int)(blockIdx.x * blockDim.x + threadIdx.x);
}

__device__ static inline float load(const void* data, int kind, long long i) {
  switch (kind) {
    case KIND_U8: return (float)((const unsigned char*)data)[i];
    case KIND_U16: return (float)((const unsigned short*)data)[i];
    case KIND_F16: return float_of(((const unsigned short*)data)[i]);
    default: return ((const float*)data)[i];
  }
}

__device__ static inline void store(void* data, int kind, long long i, float value) {
  // Integers: halves to even as numpy.rint, then clipped to the type's range.
  switch (kind) {
    case KIND_U8:
      ((unsigned char*)data)[i] =
          (unsigned char)fminf(fmaxf(rintf(value), 0.0f), 255.0f);
      break;
    case KIND_U16:
      ((unsigned short*)data)[i] =
          (unsigned short)fminf(fmaxf(rintf(value), 0.0f), 65535.0f);
      break;
    case KIND_F16: ((unsigned short*)data)[i] = half_of(value); break;
    default: ((float*)data)[i] = value;
  }
}

// Folds an index into 0..length - 1; the border pixel is repeated.
__device__ static inline int mirror(int index, int length) {
  int folded = index % (2 * length);
  if (folded < 0) folded += 2 * length;
  return folded < length ? folded : 2 * length - 1 - folded;
}

// Brightness of a pixel of a padded frame: itself, or the luminance of linear RGB
// (ITU-R BT.709).
__device__ static inline float grey(
    const float* signal, int height, int width, int channels, int y, int x) {
  long long pixel = (long long)mirror(y, height) * width + mirror(x, width);
  if (channels == 1) return signal[pixel];
  const float* colour = signal + pixel * channels;
  return 0.2126f * colour[0] + 0.7152f * colour[1] + 0.0722f * colour[2];
}

// Value of a frame's pixel in one plane of a network, which has as many as the frame has
// colours or sees its brightness; mirrored beyond the frame.
__device__ static inline float plane_value(
    const float* signal, int height, int width, int channels, int planes, int plane,
    int y, int x) {
  if (planes != channels) return grey(signal, height, width, channels, y, x);
  long long pixel = (long long)mirror(y, height) * width + mirror(x, width);
  return signal[pixel * channels + plane];
}

// From the first to the last of a row; first > last: none.
struct Span {
  int first, last;
};

// Between two of a row, and the share of the second.
struct Between {
  int first, second;
  float share;
};

// Place between two of `count` points, cut at both ends.

__device__ static inline Between between(float place, int count) {
  place = fminf(fmaxf(place, 0.0f), count - 1.0f);
  int first = min((int)place, count - 1);
  return {first, min(first + 1, count - 1), place - first};
}

// One of the four points around a place, and what it weighs; together they weigh 1.
struct Corner {
  int row, column;
  float weight;
};

__device__ static inline Corner corner_of(Between down, Between across, int corner) {
  bool lower = corner / 2, right = corner % 2;
  return {
      lower ? down.second : down.first, right ? across.second : across.first,
      (lower ? down.share : 1.0f - down.share) *
          (right ? across.share : 1.0f - across.share)};
}

// Value between four points of a table with `columns` columns, `step` elements apart.
__device__ static inline float linear(
    const float* values, int columns, int step, Between down, Between across) {
  const float* upper = values + (long long)down.first * columns * step;
  const float* lower = values + (long long)down.second * columns * step;
  int left = across.first * step, right = across.second * step;
  float near = upper[left] + (lower[left] - upper[left]) * down.share;
  float far = upper[right] + (lower[right] - upper[right]) * down.share;
  return near + (far - near) * across.share;
}

// out[i] = spectrum[i] * (real + i imaginary), complex numbers.
__device__ static inline void multiply(
    const float* spectrum, int i, float real, float imaginary, float* out) {
  float a = spectrum[2 * i], b = spectrum[2 * i + 1];
  out[2 * i] = a * real - b * imaginary;
  out[2 * i + 1] = a * imaginary + b * real;
}

// Reductions over a block of any power of two up to 256 threads; valid in thread 0.
// Kernels that use them, or shared memory, work with any such number of threads.
#define MOST_THREADS 256

__device__ static inline double block_sum(double value) {
  __shared__ double parts[MOST_THREADS];
  int thread = (int)threadIdx.x;
  __syncthreads();
  parts[thread] = value;
  __syncthreads();
  for (int span = (int)blockDim.x / 2; span > 0; span /= 2) {
    if (thread < span) parts[thread] += parts[thread + span];
    __syncthreads();
  }
  return parts[0];
}

__device__ static inline float block_max(float value) {
  __shared__ float parts[MOST_THREADS];
  int thread = (int)threadIdx.x;
  __syncthreads();
  parts[thread] = value;
  __syncthreads();
  for (int span = (int)blockDim.x / 2; span > 0; span /= 2) {
    if (thread < span) parts[thread] = fmaxf(parts[thread], parts[thread + span]);
    __syncthreads();
  }
  return parts[0];
}

// Sum of the parts that as many blocks left; one block.
__device__ static inline double sum_of_parts(const double* parts, int count) {
  double part = 0.0;
  for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x) part += parts[i];
  return block_sum(part);
}
