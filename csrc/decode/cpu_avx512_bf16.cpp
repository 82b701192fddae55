// Nothing here multiplies bfloat16: what AVX-512 has.
#if defined(__x86_64__)
#include "decode/kernels.h"

namespace dalle::avx512_bf16 {
const DecodeKernels& decode_kernels() { return avx512::decode_kernels(); }
}  // namespace dalle::avx512_bf16
#endif
