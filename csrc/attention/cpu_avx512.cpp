#define DALLE_ISA_AVX512
#include "attention/table.h"

namespace dalle::attention {
const Kernels kAvx512Float32 = avx512::kernels<float, avx512::SingleDot>();
const Kernels kAvx512Bfloat16 = avx512::kernels<bf16, avx512::SingleDot>();  // widened: no instruction multiplies bfloat16
}  // namespace dalle::attention
