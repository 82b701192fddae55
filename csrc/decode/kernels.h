// Decoding as the rest of the library sees it: plain pointers, one function per instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace dalle::decode {

// What a head's query sees: slots 0 .. prefix - 1, then `listed` slots out of `slots`. Entry j of the whole is slot j
// or slots[j - prefix].
struct Visible {
  int32_t prefix, listed;
  const int32_t* slots;
};

// The rows that a head's queries see, `row` elements apart, in the dtype of its kernels. Where these are for eight
// bits, slot s's key is to be multiplied by scales[2 s] and its value by scales[2 s + 1].
struct Held {
  const void *keys, *values;
  int64_t row;
  const float* scales;
};

// Attention of one query over entries first .. last - 1, unnormalised.
struct Part {
  float highest;  // largest score; -inf without entries
  float total;    // sum exp(score - highest)
  // and sum exp(score - highest) value in the `sums` that the caller passes, [rounded D]
};

constexpr int kWidest = 256;      // D
constexpr int kAlign = 16;        // `sums` is padded to a multiple of this many floats
constexpr int kMostParts = 16;    // that combine() takes
constexpr int kMostQueries = 64;  // that attend_many() takes

// q [D]. A score is scale q . k, or with a softcap other than 0 softcap tanh(scale q . k).
using Attend = Part (*)(const void* q, const Held& held, int width, float scale, float softcap, const Visible& visible,
                        int32_t first, int32_t last, float* sums);
// The same for `count` queries that see the same entries: one product, which reads each key and value once. Query i is
// at q[i], its part and its sums at parts + i * step and sums + i * step * stride. `memory` has room for 64 (64 + 4 D)
// floats, D rounded up to kAlign, on a 64-byte boundary.
using AttendMany = void (*)(const void* const* q, int count, const Held& held, int width, float scale, float softcap,
                            const Visible& visible, int32_t first, int32_t last, Part* parts, float* sums, int64_t step,
                            int64_t stride, float* memory);
// out [D] = the parts put together; parts' sums lie `stride` floats apart.
using Combine = void (*)(const Part* parts, const float* sums, int64_t stride, int count, int width, void* out);

// A key or value [D] into a slot; the result is its scale, 1 where nothing is rounded.
// dalle_kernels/decode/eight_bit.py defines what eight bits make of it.
using Write = float (*)(const void* row, int width, void* slot);

struct Kernels {
  Attend attend;
  AttendMany attend_many;
  Combine combine;
  Write write;
};

}  // namespace dalle::decode

namespace dalle {

struct DecodeKernels {
  decode::Kernels f32, bf16;                      // by the dtype of q, which is the cache's
  decode::Kernels f32_eight_bit, bf16_eight_bit;  // over a cache of int8
};

DALLE_KERNEL_TABLE(DecodeKernels, decode_kernels)

}  // namespace dalle
