// Attention forward for sm_80 and later: out = softmax(scale q k^T) v over the visible pairs, and its log-sum-exp.
//
// A block serves a part of one head's query tiles, one after another. For every query tile it walks the key tiles of
// the schedule with the online softmax (softmax.cuh). A warp that sees nothing of a tile skips its products.

#pragma once

#include "attention/softmax.cuh"
#include "cuda/launch.cuh"

namespace {

constexpr int kColumns = 64;  // keys a tile

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
    OnlineSoftmax softmax;

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
      softmax.step(score, acc, visible, masked, to_base_2, place.c);
      multiply<T, kWidth, kColumns>(acc, score, keys + kTileBytes, place.lane);
    }

    // Read again rather than kept: the walk needs every register.
    tokens_of(token, walk, tile, place);
    softmax.finish<T, kWidth>(p, acc, token, place);
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
