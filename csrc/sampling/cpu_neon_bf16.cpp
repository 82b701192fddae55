// Nothing here multiplies bfloat16: what NEON has.
#if defined(__aarch64__)
#include "sampling/kernels.h"

namespace dalle::neon_bf16 {
const SamplingTable& sampling_kernels() { return neon::sampling_kernels(); }
}  // namespace dalle::neon_bf16
#endif
