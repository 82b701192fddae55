#define DALLE_ISA_AVX512
#include "decode/attend.h"

namespace dalle::decode {
const Kernels kAvx512Float32 = avx512::decode_kernels<float>();
const Kernels kAvx512Bfloat16 = avx512::decode_kernels<bf16>();
}  // namespace dalle::decode
