// The codebook kernels for AVX-512 with bf16 dot products.
#define DALLE_ISA_AVX512_BF16
#include "codebook/kernels.h"
#include "simd.h"
#include "codebook/table.h"
