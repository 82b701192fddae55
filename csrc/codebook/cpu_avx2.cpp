// The codebook kernels for AVX2.
#define DALLE_ISA_AVX2
#include "codebook/kernels.h"
#include "simd.h"
#include "codebook/table.h"
