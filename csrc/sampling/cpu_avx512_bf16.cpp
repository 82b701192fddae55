// Nothing here multiplies bfloat16: what AVX-512 has.
#if defined(__x86_64__)
#include "sampling/kernels.h"

namespace dalle::avx512_bf16 {
const SamplingTable& sampling_kernels() { return avx512::sampling_kernels(); }
}  // namespace dalle::avx512_bf16
#endif
