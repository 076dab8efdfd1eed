// Rank: exact order statistics by radix selection, several ranks of one array at
// once; four rounds of `rank_count` and `rank_narrow`, most significant byte first.

// Bits of a float in an order that grows with its value.
__device__ static inline unsigned sortable(float value) {
  unsigned bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ static inline float unsortable(unsigned bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

#define BINS 256

// One thread per bin of every rank: forget the last search. `beyond` is added to every
// wanted rank.
extern "C" __global__ void rank_begin(
    const int* wanted, int beyond, int searches, unsigned* prefix, int* rank,
    unsigned* histogram) {
  int i = element();
  if (i >= BINS * searches) return;
  histogram[i] = 0;
  if (i >= searches) return;
  prefix[i] = 0;
  rank[i] = wanted[i] + beyond;
}

// Blocks of threads, one row of blocks per rank: count the next byte of the
// values that share the bytes found so far.
extern "C" __global__ void rank_count(
    const float* values, int count, int round, const unsigned* prefix,
    unsigned* histogram) {
  __shared__ unsigned bins[BINS];
  int search = (int)blockIdx.y;
  int shift = 24 - 8 * round;
  for (int i = (int)threadIdx.x; i < BINS; i += (int)blockDim.x) bins[i] = 0;
  __syncthreads();
  for (int i = element(); i < count; i += (int)(gridDim.x * blockDim.x)) {
    unsigned bits = sortable(values[i]);
    // In round 0 nothing is known yet; a shift by 32 bits is undefined.
    if (round == 0 || (bits ^ prefix[search]) >> (shift + 8) == 0)
      atomicAdd(&bins[bits >> shift & 255u], 1u);
  }
  __syncthreads();
  for (int i = (int)threadIdx.x; i < BINS; i += (int)blockDim.x)
    if (bins[i]) atomicAdd(&histogram[BINS * search + i], bins[i]);
}

// One block per rank: find the byte in which the rank lies.
extern "C" __global__ void rank_narrow(
    int round, unsigned* prefix, int* rank, unsigned* histogram, float* found) {
  __shared__ unsigned bins[BINS];
  int search = (int)blockIdx.x;
  for (int i = (int)threadIdx.x; i < BINS; i += (int)blockDim.x) {
    bins[i] = histogram[BINS * search + i];
    histogram[BINS * search + i] = 0;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  unsigned left = (unsigned)rank[search];
  unsigned byte = 0;
  while (byte < BINS - 1 && left >= bins[byte]) left -= bins[byte++];
  rank[search] = (int)left;
  prefix[search] |= byte << (24 - 8 * round);
  found[search] = unsortable(prefix[search]);
}
