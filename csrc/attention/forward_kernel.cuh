// Attention forward for sm_80 and later: out = softmax(scale q k^T) v over the visible pairs, and its log-sum-exp.
//
// A block serves a part of one head's query tiles, one after another. For every query tile it walks the key tiles of
// the schedule with the online softmax, in base 2: with s = scale log2(e) q k^T,
//   m' = max(m, max s),  l' = 2^(m - m') l + sum 2^(s - m'),  acc' = 2^(m - m') acc + 2^(s - m') v;
// out = acc / l, lse = ln 2 (m + log2 l). A warp that sees nothing of a tile skips its products.

#pragma once

#include "attention/tiles.cuh"
#include "cuda/launch.cuh"

namespace {

constexpr int kColumns = 64;  // keys a tile
constexpr float kNothing = -1e38f;  // the largest score of no keys: finite, so that differences are numbers

// Two blocks a multiprocessor where a thread's sums are few enough for 128 registers.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth <= 64 ? 2 : 1)
    forward_kernel(const __grid_constant__ AttentionForward p) {
  constexpr int kTileBytes = kColumns * kPitch<kWidth>;
  const Place place(p.heads);
  const Walk& walk = p.walk;
  const Table<T> q = head_of<T>(p.q, place);
  const Table<T> k = head_of<T>(p.k, place);
  const Table<T> v = head_of<T>(p.v, place);
  char* slots = shared_memory();  // [slots][keys, values][kColumns][kPitch]
  const auto copy = [&](int tile, int slot) {
    copy_tiles<T, kWidth, kColumns>(slots + slot * 2 * kTileBytes, k, v, walk, tile);
  };

  const Walker walker(walk, copy);
  const float to_base_2 = p.scale * kLog2E;
  for (int tile = walker.first_tile; tile < walker.last_tile; ++tile) {
    int token[2];
    tokens_of(token, walk, tile, place);
    uint32_t query[kWidth / 16][4];
    load_rows<T, kWidth>(query, q, token, place.c);
    float acc[kWidth / 8][4] = {};
    float m[2] = {kNothing, kNothing};
    float l[2] = {0.0f, 0.0f};  // this lane's columns only, until the end

    const int end = load(walk.tile_steps + tile + 1);
    for (int index = load(walk.tile_steps + tile); index < end; ++index) {
      const Step step = walker.arrive(index);
      Visible<kColumns> visible;
      const bool masked = step.mask != 0 || p.padding != nullptr;
      if (masked && !visible.read_keys(walk, step, p.padding, place)) {
        continue;
      }
      const char* keys = slots + step.slot * 2 * kTileBytes;
      float score[kColumns / 8][4] = {};
      multiply_transposed<T, kWidth, kColumns>(score, query, keys, place.lane);

      float largest[2] = {m[0], m[1]};
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[n][i] *= to_base_2;
          if (masked && !visible.sees(n, place.c, i)) {
            score[n][i] = -kInfinity;
          }
          largest[i / 2] = fmaxf(largest[i / 2], score[n][i]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[half] = largest_of_quad(largest[half]);
        const float old = exp2_fast(m[half] - largest[half]);  // 0 with the first visible key
        m[half] = largest[half];
        l[half] *= old;
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
          acc[n][2 * half] *= old;
          acc[n][2 * half + 1] *= old;
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[n][i] = exp2_fast(score[n][i] - m[i / 2]);
          l[i / 2] += score[n][i];
        }
      }
      multiply<T, kWidth, kColumns>(acc, score, keys + kTileBytes, place.lane);
    }

    // Read again rather than kept: the walk needs every register.
    tokens_of(token, walk, tile, place);
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] = sum_of_quad(l[half]);
      inverse[half] = l[half] > 0.0f ? 1.0f / l[half] : 0.0f;
      if (token[half] >= 0 && place.c == 0) {
        const float lse = l[half] > 0.0f ? kLn2 * (m[half] + log2_fast(l[half])) : -kInfinity;
        store(p.lse + static_cast<int64_t>(blockIdx.x) * walk.length + token[half], lse);
      }
    }
    store_rows<T, kWidth>(head_data<T>(p.out, place), p.out.strides[2], acc, inverse, token, place.c);
  }
  copy_async_wait<0>();
}

template <class T, int kWidth>
void run_forward(const AttentionForward& p, void* stream) {
  const int shared_bytes = p.walk.slots * 2 * kColumns * kPitch<kWidth>;
  const dim3 grid{static_cast<unsigned>(p.batch * p.heads), static_cast<unsigned>(p.walk.parts), 1};
  launch(forward_kernel<T, kWidth>, grid, kThreads, shared_bytes, stream, p);
}

template <class T>
void choose_width(const AttentionForward& p, void* stream) {
  switch (p.width) {
    case 16:
      return run_forward<T, 16>(p, stream);
    case 32:
      return run_forward<T, 32>(p, stream);
    case 64:
      return run_forward<T, 64>(p, stream);
    case 80:
      return run_forward<T, 80>(p, stream);
    case 96:
      return run_forward<T, 96>(p, stream);
    case 128:
      return run_forward<T, 128>(p, stream);
  }
}

}  // namespace
