// Host interface of the CUDA Gumbel lookup.

#pragma once

#include <cstdint>

// Tensors that end in _terms hold what products read: the tensor itself where it has 16 bits; for float32 three
// bfloat16 tensors, one after the other, whose sum it is.
struct GumbelForward {
  const void* logits;          // [N, K], rows contiguous
  const void* codebook;        // [K, D], contiguous, 16-byte rows
  const void* codebook_terms;  // [terms, K, D]
  const float* temperature;    // one element
  const int64_t* seed;         // two elements, the second the row of the noise that row 0 takes
  void* latents;               // [N, D]
  int64_t* indices;            // [N]
  float* kl;                   // [N]
  float* maximum;              // [N], the largest of logits + g
  float* log_noisy;            // [N], log sum exp((logits + g - maximum) / tau)
  float* log_clean;            // [N], log sum exp(logits - maximum)
  float* mixture;              // [N, D] where hard, else unused
  int64_t logits_stride;
  int rows, codes, width;
  bool hard, noise;
};

struct GumbelBackward {
  const void* grad_terms;  // [terms, N, D], contiguous, or null
  const float* grad_kl;    // [N], or null
  const void* logits;
  const void* codebook_terms;  // [terms, K, D]
  const float* temperature;
  const int64_t* seed;  // likewise
  const float* kl;
  const float* maximum;
  const float* log_noisy;
  const float* log_clean;
  const float* delta;      // [N], grad_latents . mixture, or null
  const int64_t* indices;  // [N] where hard, or null
  void* dlogits;           // [N, K], contiguous; null: nobody asked
  float* dcodebook;  // [parts, K, D], one for each of `parts` shares of the rows; null likewise, or without grad_terms
  int64_t logits_stride;
  int rows, codes, width, parts;
  bool noise;
};

// One translation unit each. Widths: 32, 64, 128, and 256 where elements have 16 bits.
void gumbel_forward_bfloat16(const GumbelForward& parameters, void* stream);
void gumbel_forward_float16(const GumbelForward& parameters, void* stream);
void gumbel_forward_float32(const GumbelForward& parameters, void* stream);
void gumbel_backward_bfloat16(const GumbelBackward& parameters, void* stream);
void gumbel_backward_float16(const GumbelBackward& parameters, void* stream);
void gumbel_backward_float32(const GumbelBackward& parameters, void* stream);
