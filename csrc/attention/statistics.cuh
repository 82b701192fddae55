// What every backward pass knows of a query beforehand: lse in base 2 and delta = rowsum(dout out) - dlse, in the order
// of positions, as the walks read them.

#pragma once

#include "attention/tiles.cuh"

namespace {

constexpr int kStatisticsThreads = 256;
constexpr int kRowLanes = 16;  // lanes that read one row

template <class T>
__global__ void __launch_bounds__(kStatisticsThreads) statistics_kernel(const __grid_constant__ AttentionStatistics p) {
  const int length = p.length;
  const int position = blockIdx.y * (kStatisticsThreads / kRowLanes) + threadIdx.x / kRowLanes;
  const int part = threadIdx.x % kRowLanes;
  const bool valid = position < length;
  const int token = valid ? load(p.order + position) : 0;
  const HeadRows<T> grad = head_of<T>(p.grad_out, Place(p.heads));
  const HeadRows<T> out = head_of<T>(p.out, Place(p.heads));
  float delta = 0.0f;
  for (int piece = part; piece < p.width / 8; piece += kRowLanes) {
    float a[8], b[8];
    widen<T>(load(reinterpret_cast<const uint4*>(grad.row(token)) + piece), a);
    widen<T>(load(reinterpret_cast<const uint4*>(out.row(token)) + piece), b);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      delta += a[i] * b[i];
    }
  }
#pragma unroll
  for (int distance = 1; distance < kRowLanes; distance *= 2) {
    delta += __shfl_xor_sync(0xffffffffu, delta, distance);
  }
  if (part == 0 && position < p.padded) {
    const int64_t query = static_cast<int64_t>(blockIdx.x) * length + token;
    float lse = kInfinity;
    if (valid) {
      lse = load(p.lse + query);
      lse = lse == -kInfinity ? kInfinity : lse * kLog2E;
      delta -= p.grad_lse == nullptr ? 0.0f : load(p.grad_lse + query);
    }
    float* to = p.statistics + static_cast<int64_t>(blockIdx.x) * 2 * p.padded + position;
    store(to, lse);
    store(to + p.padded, valid ? delta : 0.0f);
  }
}

template <class T>
void run_statistics(const AttentionStatistics& p, void* stream) {
  constexpr int kRows = kStatisticsThreads / kRowLanes;
  const dim3 grid{static_cast<unsigned>(p.batch * p.heads), static_cast<unsigned>((p.padded + kRows - 1) / kRows), 1};
  launch(statistics_kernel<T>, grid, kStatisticsThreads, 0, stream, p);
}

// Those of the queries at `position` and position + 8.
DEVICE void read_statistics(float (&lse)[2], float (&delta)[2], const AttentionBackward& p, int position) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = position + 8 * half;
    const float* from = p.statistics + static_cast<int64_t>(blockIdx.x) * 2 * p.padded + own;
    lse[half] = own < p.padded ? load(from) : kInfinity;
    delta[half] = own < p.padded ? load(from + p.padded) : 0.0f;
  }
}

}  // namespace
