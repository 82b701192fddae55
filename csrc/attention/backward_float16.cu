#include "attention/backward_kernel.cuh"

void attention_backward_float16(const AttentionBackward& parameters, void* stream) {
  choose_width<Float16>(parameters, stream);
}
