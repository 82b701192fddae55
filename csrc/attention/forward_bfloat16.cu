#include "attention/forward_kernel.cuh"

void attention_forward_bfloat16(const AttentionForward& parameters, void* stream) {
  choose_width<Bfloat16>(parameters, stream);
}
