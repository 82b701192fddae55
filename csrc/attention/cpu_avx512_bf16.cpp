#define DALLE_ISA_AVX512_BF16
#include "attention/table.h"

namespace dalle::attention {
const Kernels kAvx512Bf16Bfloat16 = avx512_bf16::kernels<bf16, avx512_bf16::PairDot>();
}  // namespace dalle::attention
