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
__global__ void __launch_bounds__(kThreads<kWidth>, kBlocks<kWidth>)
    query_kernel(const __grid_constant__ AttentionBackward p) {
  constexpr int kParts = kWarpRows<kWidth> / 16;
  const Place place(p.heads);
  const Walk& walk = p.walk;
  char* slots = shared_memory();  // [slots][keys, values][kColumns][kPitch]
  const auto copy = [&](int tile, int slot) {
    copy_tiles<T, kWidth>(slots + slot * kSlot<kWidth>, head_of<T>(p.k, place), head_of<T>(p.v, place), walk, tile);
  };

  const Walker walker(walk, copy);
  const float to_base_2 = p.scale * kLog2E;
  for (int tile = walker.first_tile; tile < walker.last_tile; ++tile) {
    uint32_t query[kParts][kWidth / 16][4];
    uint32_t grad[kParts][kWidth / 16][4];
    float lse[kParts][2];
    float delta[kParts][2];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int position = tile * kRowTile + place.row(part, kParts);
      int token[2];
      tokens_of(token, walk, position);
      load_rows<T, kWidth>(query[part], head_of<T>(p.q, place), token, place.c);
      load_rows<T, kWidth>(grad[part], head_of<T>(p.grad_out, place), token, place.c);
      read_statistics(lse[part], delta[part], p, position);
    }
    float dq[kParts][kWidth / 8][4] = {};

    const int end = load(walk.tile_steps + tile + 1);
    for (int index = load(walk.tile_steps + tile); index < end; ++index) {
      const Step step = walker.arrive(index);
      Visible<kParts> visible;
      const bool masked = step.mask != 0 || p.padding != nullptr;
      if (masked && !visible.read(walk, step, place, p.padding)) {
        continue;
      }
      const char* keys = slots + step.slot * kSlot<kWidth>;
      float weight[kParts][kColumns / 8][4] = {};
      multiply_transposed<T>(weight, query, keys, place.lane);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            weight[part][n][i] = exp2_fast(weight[part][n][i] * to_base_2 - lse[part][i / 2]);
          }
        }
      }
      if (masked) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          visible.hide(weight[part], part, 0.0f);
        }
      }
      float dp[kParts][kColumns / 8][4] = {};
      multiply_transposed<T>(dp, grad, keys + kTileBytes<kWidth>, place.lane);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            weight[part][n][i] *= dp[part][n][i] - delta[part][i / 2];
          }
        }
      }
      multiply<T>(dq, weight, keys, place.lane);
    }

    const float factor[2] = {p.scale, p.scale};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int token[2];  // read again rather than kept: the walk needs every register
      tokens_of(token, walk, tile * kRowTile + place.row(part, kParts));
      store_rows<T, kWidth>(head_data<T>(p.dq, place), p.dq.strides[2], dq[part], factor, token, place.c);
    }
  }
  copy_async_wait<0>();
}

// Row g (or, of half 1, g + 8) becomes zeros.
template <int kFragments>
DEVICE void clear_row(float (&sums)[kFragments][4], int half) {
#pragma unroll
  for (int n = 0; n < kFragments; ++n) {
    sums[n][2 * half] = 0.0f;
    sums[n][2 * half + 1] = 0.0f;
  }
}

constexpr int kPiece = 16;  // of a step's queries, whose scores with a warp's keys are in registers at a time

// dk and dv of a part of one head's keys.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads<kWidth>, kBlocks<kWidth>)
    key_kernel(const __grid_constant__ AttentionBackward p) {
  constexpr int kParts = kWarpRows<kWidth> / 16;
  const Place place(p.heads);
  const Walk& walk = p.walk;
  char* slots = shared_memory();  // [slots]: queries, dout [kColumns][kPitch]; lse, delta [kColumns]
  const auto copy = [&](int tile, int slot) {
    char* to = slots + slot * kKeySlot<kWidth>;
    copy_tiles<T, kWidth>(to, head_of<T>(p.q, place), head_of<T>(p.grad_out, place), walk, tile);
    if (threadIdx.x < 2 * kColumns / 4) {
      const int which = threadIdx.x / (kColumns / 4);  // lse, delta
      const int piece = threadIdx.x % (kColumns / 4);
      const float* from = p.statistics + (static_cast<int64_t>(blockIdx.x) * 2 + which) * p.padded;
      copy_async(to + 2 * kTileBytes<kWidth> + 16 * threadIdx.x, from + tile * kColumns + 4 * piece, true);
    }
  };

  const Walker walker(walk, copy);
  const float to_base_2 = p.scale * kLog2E;
  for (int tile = walker.first_tile; tile < walker.last_tile; ++tile) {
    uint32_t key[kParts][kWidth / 16][4];
    uint32_t value[kParts][kWidth / 16][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int token[2];
      tokens_of(token, walk, tile * kRowTile + place.row(part, kParts));
      load_rows<T, kWidth>(key[part], head_of<T>(p.k, place), token, place.c);
      load_rows<T, kWidth>(value[part], head_of<T>(p.v, place), token, place.c);
    }
    float dk[kParts][kWidth / 8][4] = {};
    float dv[kParts][kWidth / 8][4] = {};

    const int end = load(walk.tile_steps + tile + 1);
    for (int index = load(walk.tile_steps + tile); index < end; ++index) {
      const Step step = walker.arrive(index);
      Visible<kParts> visible;
      const bool masked = step.mask != 0;
      if (masked && !visible.read(walk, step, place)) {
        continue;
      }
      const char* slot = slots + step.slot * kKeySlot<kWidth>;
#pragma unroll 1  // unrolled, what is computed ahead would not fit into registers
      for (int first = 0; first < kColumns; first += kPiece) {
        constexpr int kFragments = kPiece / 8;
        const char* queries = slot + first * kPitch<kWidth>;
        const char* grads = queries + kTileBytes<kWidth>;
        const auto* lse = reinterpret_cast<const float*>(slot + 2 * kTileBytes<kWidth>) + first;
        const float* delta = lse + kColumns;
        float weight[kParts][kFragments][4] = {};
        multiply_transposed<T>(weight, key, queries, place.lane);
#pragma unroll
        for (int n = 0; n < kFragments; ++n) {
          const float2 base = load(reinterpret_cast<const float2*>(lse + 8 * n + 2 * place.c));
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              weight[part][n][i] = exp2_fast(weight[part][n][i] * to_base_2 - (i % 2 == 0 ? base.x : base.y));
            }
          }
        }
        if (masked) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            visible.hide(weight[part], part, 0.0f, first / 8);
          }
        }
        multiply<T>(dv, weight, grads, place.lane);
        float dp[kParts][kFragments][4] = {};
        multiply_transposed<T>(dp, value, grads, place.lane);
#pragma unroll
        for (int n = 0; n < kFragments; ++n) {
          const float2 base = load(reinterpret_cast<const float2*>(delta + 8 * n + 2 * place.c));
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              weight[part][n][i] *= dp[part][n][i] - (i % 2 == 0 ? base.x : base.y);
            }
          }
        }
        multiply<T>(dk, weight, queries, place.lane);
      }
    }

    const float scaled[2] = {p.scale, p.scale};
    const float plain[2] = {1.0f, 1.0f};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int token[2];  // read again rather than kept: the walk needs every register
      tokens_of(token, walk, tile * kRowTile + place.row(part, kParts));
      if (p.padding != nullptr) {
        // An ignored key touches no row but its own, whose weights may have overflowed: no log-sum-exp counts it.
        const bool* padding = p.padding + static_cast<int64_t>(place.batch) * walk.length;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (token[half] >= 0 && load(padding + token[half])) {
            clear_row(dk[part], half);
            clear_row(dv[part], half);
          }
        }
      }
      store_rows<T, kWidth>(head_data<T>(p.dk, place), p.dk.strides[2], dk[part], scaled, token, place.c);
      store_rows<T, kWidth>(head_data<T>(p.dv, place), p.dv.strides[2], dv[part], plain, token, place.c);
    }
  }
  copy_async_wait<0>();
}

template <class T>
void run_queries(const AttentionBackward& p, void* stream) {
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch_walk<kWidth>(query_kernel<T, kWidth>, kSlot<kWidth>, p, stream);
  };
  at_width(p.width, run, Widths{});
}

template <class T>
void run_keys(const AttentionBackward& p, void* stream) {
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch_walk<kWidth>(key_kernel<T, kWidth>, kKeySlot<kWidth>, p, stream);
  };
  at_width(p.width, run, Widths{});
}

}  // namespace
