// Attention forward for sm_80 and later: out = softmax(scale q k^T) v over the visible pairs, and its log-sum-exp.
//
// A block serves a part of one head's query tiles, one after another. For every query tile it walks the key tiles of
// the schedule with the online softmax (softmax.cuh). A warp that sees nothing of a tile skips its products.

#pragma once

#include "attention/softmax.cuh"
#include "cuda/launch.cuh"

namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kWidth>)
    forward_kernel(const __grid_constant__ AttentionForward p) {
  constexpr int kColumns = kForwardColumns;
  constexpr int kTileBytes = kColumns * kPitch<kWidth>;
  const Place place(p.heads);
  const Walk& walk = p.walk;
  const HeadRows<T> q = head_of<T>(p.q, place);
  const HeadRows<T> k = head_of<T>(p.k, place);
  const HeadRows<T> v = head_of<T>(p.v, place);
  char* slots = shared_memory();  // [slots][keys, values][kColumns][kPitch]
  const auto copy = [&](int tile, int slot) {
    copy_tiles<T, kWidth, kColumns>(slots + slot * kForwardSlot<kWidth>, k, v, walk, tile);
  };

  const Walker walker(walk, copy);
  const float to_base_2 = p.scale * kLog2E;
  for (int tile = walker.first_tile; tile < walker.last_tile; ++tile) {
    int token[2];
    tokens_of(token, walk, tile, place);
    uint32_t query[kWidth / 16][4];
    load_rows<T, kWidth>(query, q, token, place.c);
    float acc[kWidth / 8][4] = {};
    OnlineSoftmax softmax;

    const int end = load(walk.tile_steps + tile + 1);
    for (int index = load(walk.tile_steps + tile); index < end; ++index) {
      const Step step = walker.arrive(index);
      Visible<kColumns> visible;
      const bool masked = step.mask != 0 || p.padding != nullptr;
      if (masked && !visible.read_keys(walk, step, p.padding, place)) {
        continue;
      }
      const char* keys = slots + step.slot * kForwardSlot<kWidth>;
      float score[kColumns / 8][4] = {};
      multiply_transposed<T, kWidth, kColumns>(score, query, keys, place.lane);
      softmax.step(score, acc, visible, masked, to_base_2, place.c);
      multiply<T, kWidth, kColumns>(acc, score, keys + kTileBytes, place.lane);
    }

    // Read again rather than kept: the walk needs every register.
    tokens_of(token, walk, tile, place);
    softmax.finish<T, kWidth>(p, acc, token, place);
  }
  copy_async_wait<0>();
}

template <class T>
void run_forward(const AttentionForward& p, void* stream) {
  const dim3 grid{static_cast<unsigned>(p.batch * p.heads), static_cast<unsigned>(p.walk.parts), 1};
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch(forward_kernel<T, kWidth>, grid, kThreads, p.walk.slots * kForwardSlot<kWidth>, stream, p);
  };
  at_width(p.width, run, Widths{});
}

}  // namespace
