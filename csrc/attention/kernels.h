// The attention kernels as the rest of the library sees them: plain pointers, one table of functions per instruction
// set. `cpu.cpp` owns tensors and threads; the kernels own the arithmetic.
#pragma once

#include <cstdint>

#include "attention/plan.h"
#include "isa.h"

namespace dalle::attention {

// A [B, H, S, D] array with unit stride along D; strides count elements.
struct Array {
  void* data;
  int64_t batch, head, row;
};

struct Problem {
  const Plan* plan;
  int64_t batch, heads, width;  // width = D
  float scale;
  float softcap, steepness;  // scores are softcap tanh(steepness q . k), steepness = scale / softcap; both 0 without
  const uint8_t* padding;    // [B, S], 1 = nobody sees this key; null without
  bool scattered;            // rows that are read many times (k, v forward; q, dO backward) do not follow one another
};

struct ForwardArrays {
  Array q, k, v, out;
  float* lse;  // [B, H, S]
};

struct BackwardArrays {
  Array q, k, v, out, grad_out, dq, dk, dv;  // of dq, dk and dv those that nobody asked for have no data
  const float *lse, *grad_lse;               // [B, H, S]; grad_lse may be null
};

// One thread's scratch memory, cache-line aligned, at least *_floats() long. `owner` is the head whose packed rows the
// memory holds (the forward packs a head once); set it to -1 before each call of an operation.
struct Scratch {
  float* memory;
  int64_t owner;
};

struct Kernels {
  int64_t (*forward_floats)(const Problem&);
  // Query tiles first .. last - 1 of head `head` (b H + h).
  void (*forward)(const Problem&, const ForwardArrays&, int64_t head, int32_t first, int32_t last, Scratch&);

  int64_t (*backward_floats)(const Problem&);
  // Query tiles first .. last - 1 of a head: their dq, and dk and dv of the key tiles as `destinations` [tiles] says
  // (see plan.h); partial slots are [2, 64, rounded D] of `partial`: dk and dv, in position order.
  void (*backward)(const Problem&, const BackwardArrays&, int64_t head, int32_t first, int32_t last,
                   const int32_t* destinations, float* partial, Scratch&);
  // dk and dv of a key tile out of `count` partial slots, added in order.
  void (*reduce_keys)(const Problem&, const BackwardArrays&, int64_t head, int32_t tile, const float* partial,
                      int32_t count);
  int64_t (*rounded_width)(int64_t width);
};

}  // namespace dalle::attention

namespace dalle {

struct AttentionTable {
  attention::Kernels f32, bf16;
};

DALLE_KERNEL_TABLE(AttentionTable, attention_kernels)

}  // namespace dalle
