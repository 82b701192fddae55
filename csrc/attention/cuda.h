// Host interface of the CUDA attention kernels, and their shapes, which cuda_op.cpp tells Python.

#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

// The elements of a row that there are kernels for.
using Widths = std::integer_sequence<int, 16, 32, 64, 80, 96, 128>;

constexpr int kRowTile = 128;  // rows that a block has at a time
constexpr int kAhead = 2;      // steps before its use, in which a column tile is loaded

// Rows of a warp. With 32 each fragment of a column tile serves two products, where a thread's registers hold the sums
// of so many.
template <int kWidth>
constexpr int kWarpRows = kWidth <= 64 ? 32 : 16;
template <int kWidth>
constexpr int kThreads = 32 * kRowTile / kWarpRows<kWidth>;

// Blocks on a multiprocessor: two where a block has four warps.
template <int kWidth>
constexpr int kBlocks = kWidth <= 64 ? 2 : 1;

// Rows of a column tile, as many as a word of a mask has bits: the narrower a tile, the fewer products of it nobody
// sees.
constexpr int kColumns = 32;

// Bytes from one row of a tile in shared memory to the next: an odd number of 16-byte pieces, so that the eight rows
// of a matrix lie in different banks.
template <int kWidth>
constexpr int kPitch = 2 * kWidth + 16;
template <int kWidth>
constexpr int kTileBytes = kColumns * kPitch<kWidth>;

// Bytes of a slot: two column tiles (keys and values, or queries and dout), and for dk and dv two numbers a query.
template <int kWidth>
constexpr int kSlot = 2 * kTileBytes<kWidth>;
template <int kWidth>
constexpr int kKeySlot = kSlot<kWidth> + 2 * kColumns * static_cast<int>(sizeof(float));

// function(std::integral_constant<int, width>), where there are kernels for `width`.
template <class Function, int... kWidths>
void at_width(int width, const Function& function, std::integer_sequence<int, kWidths...>) {
  ((width == kWidths ? function(std::integral_constant<int, kWidths>{}) : void()), ...);
}

// A tensor [B, H, S, D] of 16-bit elements: rows are contiguous and start at multiples of 16 bytes.
struct Rows {
  void* data;
  int64_t strides[3];  // elements between batches, heads and tokens
};

// What a block walks over: dalle_kernels/attention/cuda_walk.py makes it from a Schedule.
struct Walk {
  const int32_t* order;       // [S], the token at each position
  const int32_t* part_tiles;  // [parts + 1], the row tiles of each part of a head
  const int32_t* tile_steps;  // [row tiles + 1], the steps of each row tile
  const int32_t* steps;       // [steps, 4]: column tile, slot, mask id, whether this step loads the tile
  const int32_t* masks;       // [masks, kRowTile], a row's columns as bits; mask 0 is all ones
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

struct AttentionStatistics {
  Rows grad_out, out;
  const float* grad_lse;  // [B, H, S], or null
  const float* lse;       // [B, H, S]
  const int32_t* order;   // [S], the token at each position
  // [B * H, 2, padded]: for each position lse in base 2 (+inf where the query sees no key or is past the end) and
  // delta; `padded` is a multiple of kColumns.
  float* statistics;
  int padded, length, batch, heads, width;
};

struct AttentionBackward {
  Rows grad_out, q, k, v;
  Rows dq, dk, dv;          // dq alone, or dk and dv
  const bool* padding;      // [B, S], or null
  const float* statistics;  // as AttentionStatistics leaves them
  int padded;
  Walk walk;  // for dq rows are queries and columns keys; for dk and dv rows are keys and columns queries
  int batch, heads, width;
  float scale;
};

// One translation unit each way and type, so that they compile side by side.
void attention_forward_bfloat16(const AttentionForward& parameters, void* stream);
void attention_forward_float16(const AttentionForward& parameters, void* stream);
void attention_statistics_bfloat16(const AttentionStatistics& parameters, void* stream);
void attention_statistics_float16(const AttentionStatistics& parameters, void* stream);
void attention_backward_queries_bfloat16(const AttentionBackward& parameters, void* stream);
void attention_backward_queries_float16(const AttentionBackward& parameters, void* stream);
void attention_backward_keys_bfloat16(const AttentionBackward& parameters, void* stream);
void attention_backward_keys_float16(const AttentionBackward& parameters, void* stream);
