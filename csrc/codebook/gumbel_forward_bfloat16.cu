#include "codebook/gumbel_forward_kernel.cuh"

void gumbel_forward_bfloat16(const GumbelForward& parameters, void* stream) {
  choose_width<Bfloat16>(parameters, stream);
}
