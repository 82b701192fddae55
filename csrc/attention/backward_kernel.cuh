// Attention backward for sm_80 and later. With s = scale q k^T, p = exp(s - lse) and dp = dout v^T:
//   ds = p (dp - delta),  delta = rowsum(dout out) - dlse,
//   dq = scale ds k,  dk = scale ds^T q,  dv = p^T dout.
// Three kernels: statistics.cuh's; dq, whose rows are queries, walking over keys and values; dk and dv, whose rows are
// keys, walking over queries and dout by the transposed lists. Nothing is added up across blocks, so the result is the
// same every time.

#pragma once

#include "attention/statistics.cuh"

namespace {

// dq of a part of one head's queries.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) query_kernel(const __grid_constant__ AttentionBackward p) {
  constexpr int kColumns = kBackwardColumns<kWidth>;
  constexpr int kTileBytes = kColumns * kPitch<kWidth>;
  const Place place(p.heads);
  const Walk& walk = p.walk;
  char* slots = shared_memory();  // [slots][keys, values][kColumns][kPitch]
  const auto copy = [&](int tile, int slot) {
    copy_tiles<T, kWidth, kColumns>(slots + slot * kQuerySlot<kWidth>, head_of<T>(p.k, place), head_of<T>(p.v, place),
                                    walk, tile);
  };

  const Walker walker(walk, copy);
  const float to_base_2 = p.scale * kLog2E;
  for (int tile = walker.first_tile; tile < walker.last_tile; ++tile) {
    int token[2];
    tokens_of(token, walk, tile * kRowTile + place.row());
    uint32_t query[kWidth / 16][4];
    uint32_t grad[kWidth / 16][4];
    load_rows<T, kWidth>(query, head_of<T>(p.q, place), token, place.c);
    load_rows<T, kWidth>(grad, head_of<T>(p.grad_out, place), token, place.c);
    float lse[2];
    float delta[2];
    read_statistics(lse, delta, p, tile, place);
    float dq[kWidth / 8][4] = {};

    const int end = load(walk.tile_steps + tile + 1);
    for (int index = load(walk.tile_steps + tile); index < end; ++index) {
      const Step step = walker.arrive(index);
      Visible<kColumns> visible;
      const bool masked = step.mask != 0 || p.padding != nullptr;
      if (masked && !read_keys(&visible, walk, step, p.padding, place)) {
        continue;
      }
      const char* keys = slots + step.slot * kQuerySlot<kWidth>;
      float score[kColumns / 8][4] = {};
      float dp[kColumns / 8][4] = {};
      multiply_transposed<T, kWidth, kColumns>(&score, &query, keys, place.lane);
      multiply_transposed<T, kWidth, kColumns>(&dp, &grad, keys + kTileBytes, place.lane);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool seen = !masked || visible.sees(n, place.c, i);
          const float weight = seen ? exp2_fast(score[n][i] * to_base_2 - lse[i / 2]) : 0.0f;
          score[n][i] = weight * (dp[n][i] - delta[i / 2]);
        }
      }
      multiply<T, kWidth, kColumns>(&dq, &score, keys, place.lane);
    }
    const float factor[2] = {p.scale, p.scale};
    store_rows<T, kWidth>(head_data<T>(p.dq, place), p.dq.strides[2], dq, factor, token, place.c);
  }
  copy_async_wait<0>();
}

// dk and dv of a part of one head's keys.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) key_kernel(const __grid_constant__ AttentionBackward p) {
  constexpr int kColumns = kBackwardColumns<kWidth>;
  constexpr int kTileBytes = kColumns * kPitch<kWidth>;
  const Place place(p.heads);
  const Walk& walk = p.walk;
  char* slots = shared_memory();  // [slots]: queries, dout [kColumns][kPitch]; lse, delta [kColumns]
  const auto copy = [&](int tile, int slot) {
    char* to = slots + slot * kKeySlot<kWidth>;
    copy_tiles<T, kWidth, kColumns>(to, head_of<T>(p.q, place), head_of<T>(p.grad_out, place), walk, tile);
    if (threadIdx.x < 2 * kColumns / 4) {
      const int which = threadIdx.x / (kColumns / 4);  // lse, delta
      const int piece = threadIdx.x % (kColumns / 4);
      const float* from = p.statistics + (static_cast<int64_t>(blockIdx.x) * 2 + which) * p.padded;
      copy_async(to + 2 * kTileBytes + 16 * threadIdx.x, from + tile * kColumns + 4 * piece, true);
    }
  };

  const Walker walker(walk, copy);
  const float to_base_2 = p.scale * kLog2E;
  for (int tile = walker.first_tile; tile < walker.last_tile; ++tile) {
    int token[2];
    tokens_of(token, walk, tile * kRowTile + place.row());
    uint32_t key[kWidth / 16][4];
    uint32_t value[kWidth / 16][4];
    load_rows<T, kWidth>(key, head_of<T>(p.k, place), token, place.c);
    load_rows<T, kWidth>(value, head_of<T>(p.v, place), token, place.c);
    bool padded[2] = {};
    if (p.padding != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool* padding = p.padding + static_cast<int64_t>(place.batch) * walk.length;
        padded[half] = token[half] >= 0 && load(padding + token[half]);
      }
    }
    float dk[kWidth / 8][4] = {};
    float dv[kWidth / 8][4] = {};

    const int end = load(walk.tile_steps + tile + 1);
    for (int index = load(walk.tile_steps + tile); index < end; ++index) {
      const Step step = walker.arrive(index);
      Visible<kColumns> visible;
      const bool masked = step.mask != 0 || p.padding != nullptr;
      if (masked) {
        visible.read(walk.masks, step.mask, place.row());
        visible.remove_rows(padded);
        if (!__any_sync(0xffffffffu, visible.any())) {
          continue;
        }
      }
      const char* queries = slots + step.slot * kKeySlot<kWidth>;
      const char* grads = queries + kTileBytes;
      const auto* lse = reinterpret_cast<const float*>(grads + kTileBytes);
      const float* delta = lse + kColumns;
      float score[kColumns / 8][4] = {};
      multiply_transposed<T, kWidth, kColumns>(&score, &key, queries, place.lane);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const float2 base = load(reinterpret_cast<const float2*>(lse + 8 * n + 2 * place.c));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool seen = !masked || visible.sees(n, place.c, i);
          score[n][i] = seen ? exp2_fast(score[n][i] * to_base_2 - (i % 2 == 0 ? base.x : base.y)) : 0.0f;
        }
      }
      multiply<T, kWidth, kColumns>(&dv, &score, grads, place.lane);
      float dp[kColumns / 8][4] = {};
      multiply_transposed<T, kWidth, kColumns>(&dp, &value, grads, place.lane);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const float2 base = load(reinterpret_cast<const float2*>(delta + 8 * n + 2 * place.c));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[n][i] *= dp[n][i] - (i % 2 == 0 ? base.x : base.y);
        }
      }
      multiply<T, kWidth, kColumns>(&dk, &score, queries, place.lane);
    }
    const float scaled[2] = {p.scale, p.scale};
    const float plain[2] = {1.0f, 1.0f};
    store_rows<T, kWidth>(head_data<T>(p.dk, place), p.dk.strides[2], dk, scaled, token, place.c);
    store_rows<T, kWidth>(head_data<T>(p.dv, place), p.dv.strides[2], dv, plain, token, place.c);
  }
  copy_async_wait<0>();
}

template <class T>
void run_queries(const AttentionBackward& p, void* stream) {
  const dim3 grid{static_cast<unsigned>(p.batch * p.heads), static_cast<unsigned>(p.walk.parts), 1};
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch(query_kernel<T, kWidth>, grid, kThreads, p.walk.slots * kQuerySlot<kWidth>, stream, p);
  };
  at_width(p.width, run, Widths{});
}

template <class T>
void run_keys(const AttentionBackward& p, void* stream) {
  const dim3 grid{static_cast<unsigned>(p.batch * p.heads), static_cast<unsigned>(p.walk.parts), 1};
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch(key_kernel<T, kWidth>, grid, kThreads, p.walk.slots * kKeySlot<kWidth>, stream, p);
  };
  at_width(p.width, run, Widths{});
}

}  // namespace
