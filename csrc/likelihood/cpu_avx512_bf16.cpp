// Nothing here multiplies bfloat16: what AVX-512 has.
#if defined(__x86_64__)
#include "likelihood/kernels.h"

namespace dalle::avx512_bf16 {
const LaplaceTable& laplace_kernels() { return avx512::laplace_kernels(); }
}  // namespace dalle::avx512_bf16
#endif
