// The codebook kernels for AVX-512.
#define DALLE_ISA_AVX512
#include "codebook/kernels.h"
#include "simd.h"
#include "codebook/table.h"
