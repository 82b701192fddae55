#include "codebook/gumbel_backward_kernel.cuh"

void gumbel_backward_float16(const GumbelBackward& parameters, void* stream) {
  choose_width<Float16>(parameters, stream);
}
