// The attention kernels as the rest of the library sees them: plain pointers, one table of functions per instruction
// set. `cpu.cpp` owns tensors and threads; the kernels own the arithmetic.
#pragma once

#include <cstdint>

#include "attention/plan.h"

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
  const uint8_t* padding;  // [B, S], 1 = nobody sees this key; null without
};

struct ForwardArrays {
  Array q, k, v, out;
  float* lse;  // [B, H, S]
};

struct BackwardArrays {
  Array q, k, v, out, grad_out, dq, dk, dv;
  const float *lse, *grad_lse;  // [B, H, S]; grad_lse may be null
};

// One thread's scratch memory, cache-line aligned, at least *_floats() long. `owner` is the head whose packed rows the
// memory holds; set it to -1 before each call of an operation.
struct Scratch {
  float* memory;
  int64_t owner;
};

struct Kernels {
  int64_t (*forward_floats)(const Problem&);
  // Query tiles first .. last - 1 of head `head` (b H + h).
  void (*forward)(const Problem&, const ForwardArrays&, int64_t head, int32_t first, int32_t last, Scratch&);

  int64_t (*backward_floats)(const Problem&);
  // Key tiles first .. last - 1 of a head: their dk and dv, and this share of dq, which goes to `partial_dq`
  // [tiles 64, rounded D] in position order with touched[t] = 1 for the query tiles that were written; or, where
  // partial_dq is null because the share is the whole head, straight to dq.
  void (*backward)(const Problem&, const BackwardArrays&, int64_t head, int32_t first, int32_t last,
                   float* partial_dq, uint8_t* touched, Scratch&);
  // dq of one query tile out of the shares' partial sums, added in the order of the shares.
  void (*reduce_dq)(const Problem&, const BackwardArrays&, int64_t head, int32_t tile, int32_t shares,
                    const float* partial_dq, const uint8_t* touched);
  int64_t (*rounded_width)(int64_t width);
};

extern const Kernels kAvx2Float32, kAvx2Bfloat16, kAvx512Float32, kAvx512Bfloat16, kAvx512Bf16Bfloat16;

}  // namespace dalle::attention
