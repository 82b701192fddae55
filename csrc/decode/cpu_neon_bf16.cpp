// Nothing here multiplies bfloat16: what NEON has.
#if defined(__aarch64__)
#include "decode/kernels.h"

namespace dalle::neon_bf16 {
const DecodeKernels& decode_kernels() { return neon::decode_kernels(); }
}  // namespace dalle::neon_bf16
#endif
