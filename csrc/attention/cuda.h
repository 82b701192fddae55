// Host interface of the CUDA attention kernels.

#pragma once

#include <cstdint>
// A tensor [B, H, S, D] of 16-bit elements: rows are contiguous and start at multiples of 16 bytes.
struct Rows {
  void* data;
  int64_t strides[3];  // elements between batches, heads and tokens
};

// What a block walks over: dalle_kernels/attention/cuda_plan.py makes it from a Schedule.
struct Walk {
  const int32_t* order;       // [S], the token at each position
  const int32_t* part_tiles;  // [parts + 1], the row tiles of each part of a head
  const int32_t* tile_steps;  // [row tiles + 1], the steps of each row tile
  const int32_t* steps;       // [steps, 4]: column tile, slot, mask id, whether this step loads the tile
  const int32_t* masks;       // [masks, kRowTile, columns / 32] bit words; mask 0 is all ones
  int parts, slots, length;
};

struct AttentionForward {
  Rows q, k, v, out;
  float* lse;           // [B, H, S], natural
  const bool* padding;  // [B, S], true: ignore the key; or null
  Walk walk;
  int batch, heads, width;
  float scale;
};

struct AttentionBackward {
  Rows grad_out, q, k, v, out, dq, dk, dv;
  const float* grad_lse;  // [B, H, S], or null
  const float* lse;       // [B, H, S]
  const bool* padding;    // [B, S], or null
  // [B * H, 2, padded length]: for each position lse in base 2 (+inf where the query sees no key or is past the end)
  // and delta; `padded` is a multiple of kBackwardColumns.
  float* statistics;
  int padded;
  Walk by_query, by_key;  // rows are queries and columns keys; rows are keys and columns queries
  int batch, heads, width;
  float scale;
};

// Queries or keys in a column tile of the backward pass: fewer where rows are long, whose sums take the registers.
template <int kWidth>
constexpr int kBackwardColumns = kWidth <= 64 ? 64 : 32;

// One translation unit each, so that they compile side by side. Widths: 16, 32, 64, 80, 96, 128.
void attention_forward_bfloat16(const AttentionForward& parameters, void* stream);
void attention_forward_float16(const AttentionForward& parameters, void* stream);
void attention_backward_bfloat16(const AttentionBackward& parameters, void* stream);
void attention_backward_float16(const AttentionBackward& parameters, void* stream);
