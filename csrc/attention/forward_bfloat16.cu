#include "attention/forward_kernel.cuh"

void attention_forward_bfloat16(const AttentionForward& parameters, void* stream) {
  run_forward<Bfloat16>(parameters, stream);
}
