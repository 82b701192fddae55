#include "attention/backward_kernel.cuh"

void attention_backward_bfloat16(const AttentionBackward& parameters, void* stream) {
  choose_width<Bfloat16>(parameters, stream);
}
