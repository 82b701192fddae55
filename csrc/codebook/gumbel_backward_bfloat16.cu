#include "codebook/gumbel_backward_kernel.cuh"

void gumbel_backward_bfloat16(const GumbelBackward& parameters, void* stream) {
  choose_width<Bfloat16>(parameters, stream);
}
