// What the sampling kernels take: plain pointers, no torch. Element types: float or dalle::bf16.
#pragma once

#include <cstdint>

#include "isa.h"

namespace dalle {

struct Sampling {
  const void* logits;         // [rows, codes], rows logits_stride apart
  const void* unconditional;  // the same, or null: no guidance
  int64_t rows, codes, logits_stride, unconditional_stride;
  float guidance_scale, temperature;
  int64_t top_k;             // 0: all
  float top_p;               // 1: all
  uint64_t seed, first_row;  // of the noise
  int64_t* tokens;           // [rows]

  // Floats of scratch memory per thread: scores, candidates, and their codes, each with room for a whole vector more.
  int64_t span() const { return codes + 32; }
  int64_t scratch() const { return 3 * 4 * span(); }
};

using SampleRows = void (*)(const Sampling&, int64_t row, int64_t row_end, void* scratch);

struct SamplingTable {
  SampleRows f32, bf16;
};

DALLE_KERNEL_TABLE(SamplingTable, sampling_kernels)

}  // namespace dalle
