#define DALLE_ISA_AVX2
#include "decode/attend.h"

namespace dalle::decode {
const Kernels kAvx2Float32 = avx2::decode_kernels<float>();
const Kernels kAvx2Bfloat16 = avx2::decode_kernels<bf16>();
}  // namespace dalle::decode
