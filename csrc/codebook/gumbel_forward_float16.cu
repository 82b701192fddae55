#include "codebook/gumbel_forward_kernel.cuh"

void gumbel_forward_float16(const GumbelForward& parameters, void* stream) {
  choose_width<Float16>(parameters, stream);
}
