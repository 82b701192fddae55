#define DALLE_ISA_AVX2
#include "attention/table.h"

namespace dalle::attention {
const Kernels kAvx2Float32 = avx2::kernels<float, avx2::SingleDot>();
const Kernels kAvx2Bfloat16 = avx2::kernels<bf16, avx2::SingleDot>();  // widened: no instruction multiplies bfloat16
}  // namespace dalle::attention
