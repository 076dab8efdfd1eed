// CUDA's words in C++, so that the kernels' text compiles for the host.
//
// A launch runs block after block. Kernels that share memory within a block run
// with any number of threads per block: one by default, several real threads with
// a barrier where the cooperation itself is to be tested.
#pragma once
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define RTFOCUS_HOST
#define __global__
#define __device__
#define __shared__ static

struct Index3 { unsigned x = 0, y = 0, z = 0; };
static thread_local Index3 threadIdx, blockIdx;
static thread_local Index3 blockDim, gridDim;
static thread_local std::barrier<>* block_barrier = nullptr;

static inline void __syncthreads() {
  if (block_barrier) block_barrier->arrive_and_wait();
}
static inline unsigned atomicAdd(unsigned* place, unsigned value) {
  return std::atomic_ref<unsigned>(*place).fetch_add(value);
}
static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
static inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline unsigned short half_of(float value) {
  _Float16 half = (_Float16)value;
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
static inline float float_of(unsigned short bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return (float)half;
}
using std::abs;
using std::max;
using std::min;

struct Launch {
  unsigned grid_x, grid_y, block_x, cooperative_threads;
};

// Shared memory is static here, the same for all kernels.
static std::mutex shared_memory;

// Runs `body` for every thread of a launch.
template <class Body>
static void run_launch(const Launch& launch, bool cooperative, Body body) {
  Index3 grid{launch.grid_x, launch.grid_y, 1};
  if (!cooperative) {
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x)
        for (unsigned thread = 0; thread < launch.block_x; ++thread) {
          gridDim = grid, blockDim = {launch.block_x, 1, 1};
          blockIdx = {x, y, 0}, threadIdx = {thread, 0, 0};
          body();
        }
    return;
  }
  std::lock_guard<std::mutex> one_at_a_time(shared_memory);
  unsigned threads = std::min(launch.block_x, launch.cooperative_threads);
  auto run = [&](unsigned thread, std::barrier<>* barrier) {
    block_barrier = threads > 1 ? barrier : nullptr;
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        gridDim = grid, blockDim = {threads, 1, 1};
        blockIdx = {x, y, 0}, threadIdx = {thread, 0, 0};
        body();
        if (threads > 1) barrier->arrive_and_wait();
      }
    block_barrier = nullptr;
  };
  std::barrier<> barrier((std::ptrdiff_t)threads);
  if (threads == 1) return run(0, &barrier);
  std::vector<std::thread> team;
  for (unsigned thread = 0; thread < threads; ++thread)
    team.emplace_back(run, thread, &barrier);
  for (std::thread& member : team) member.join();
}
