// Nothing here multiplies bfloat16: what NEON has.
#if defined(__aarch64__)
#include "likelihood/kernels.h"

namespace dalle::neon_bf16 {
const LaplaceTable& laplace_kernels() { return neon::laplace_kernels(); }
}  // namespace dalle::neon_bf16
#endif
