// Attention forward for sm_80 and later: out = softmax(scale q k^T) v over the visible pairs, and its log-sum-exp.
//
// A block serves a part of one head's query tiles, one after another. For every query tile it walks the key tiles of
// the schedule with the online softmax (softmax.cuh). A warp that sees nothing of a tile skips its products.

#pragma once

#include "attention/softmax.cuh"

namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads<kWidth>, kBlocks<kWidth>)
    forward_kernel(const __grid_constant__ AttentionForward p) {
  constexpr int kParts = kWarpRows<kWidth> / 16;
  const Place place(p.heads);
  const Walk& walk = p.walk;
  const HeadRows<T> q = head_of<T>(p.q, place);
  const HeadRows<T> k = head_of<T>(p.k, place);
  const HeadRows<T> v = head_of<T>(p.v, place);
  char* slots = shared_memory();  // [slots][keys, values][kColumns][kPitch]
  const auto copy = [&](int tile, int slot) { copy_tiles<T, kWidth>(slots + slot * kSlot<kWidth>, k, v, walk, tile); };

  const Walker walker(walk, copy);
  // Negative scales are the queries' to bear, so that the largest score is that of the largest product; scale 0 becomes
  // so little that all weights are 1.
  const uint32_t sign = p.scale < 0.0f ? 0x80008000u : 0u;
  const float slope = fmaxf(fabsf(p.scale) * kLog2E, 1e-30f);
  for (int tile = walker.first_tile; tile < walker.last_tile; ++tile) {
    uint32_t query[kParts][kWidth / 16][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int token[2];
      tokens_of(token, walk, tile * kRowTile + place.row(part, kParts));
      load_rows<T, kWidth>(query[part], q, token, place.c);
      flip_signs(query[part], sign);
    }
    float acc[kParts][kWidth / 8][4] = {};
    OnlineSoftmax softmax[kParts];

    const int end = load(walk.tile_steps + tile + 1);
    for (int index = load(walk.tile_steps + tile); index < end; ++index) {
      const Step step = walker.arrive(index);
      Visible<kParts> visible;
      const bool masked = step.mask != 0 || p.padding != nullptr;
      if (masked && !visible.read(walk, step, place, p.padding)) {
        continue;
      }
      const char* keys = slots + step.slot * kSlot<kWidth>;
      float score[kParts][kColumns / 8][4] = {};
      multiply_transposed<T>(score, query, keys, place.lane);
      if (masked) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          visible.hide(score[part], part, -kInfinity);
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        softmax[part].step(score[part], acc[part], slope);
      }
      multiply<T>(acc, score, keys + kTileBytes<kWidth>, place.lane);
    }

#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int token[2];  // read again rather than kept: the walk needs every register
      tokens_of(token, walk, tile * kRowTile + place.row(part, kParts));
      softmax[part].template finish<T, kWidth>(p, acc[part], token, place);
    }
  }
  copy_async_wait<0>();
}

template <class T>
void run_forward(const AttentionForward& p, void* stream) {
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch_walk<kWidth>(forward_kernel<T, kWidth>, kSlot<kWidth>, p, stream);
  };
  at_width(p.width, run, Widths{});
}

}  // namespace
