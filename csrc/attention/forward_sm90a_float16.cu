#include "attention/forward_sm90a_kernel.cuh"

void attention_forward_sm90a_float16(const AttentionForward& parameters, const int32_t* runs, int blocks,
                                     void* stream) {
  choose_width<Float16>(parameters, runs, blocks, stream);
}
