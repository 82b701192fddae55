#include "codebook/gumbel_backward_kernel.cuh"

void gumbel_backward_float32(const GumbelBackward& parameters, void* stream) {
  choose_width<float>(parameters, stream);
}
