#include "attention/forward_kernel.cuh"

void attention_forward_float16(const AttentionForward& parameters, void* stream) {
  run_forward<Float16>(parameters, stream);
}
