#include "codebook/gumbel_forward_kernel.cuh"

void gumbel_forward_float32(const GumbelForward& parameters, void* stream) { choose_width<float>(parameters, stream); }
