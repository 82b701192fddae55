// Host interface of the CUDA sampling kernel.

#pragma once

#include <cstdint>

#include "cuda/types.h"

struct SampleParameters {
  const void* logits;         // [B, V], rows contiguous
  const void* unconditional;  // the same, or null
  const int64_t* seed;        // two elements, the second the row of the noise that row 0 takes
  int64_t* tokens;            // [B]
  int64_t logits_stride, unconditional_stride;
  int batch, vocabulary;
  int top_k;  // 0: all
  float top_p, temperature, guidance_scale;
};

void sample_tokens(Element element, const SampleParameters& parameters, void* stream);
