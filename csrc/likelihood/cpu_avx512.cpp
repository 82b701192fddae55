// The likelihood's kernels for AVX-512.
#define DALLE_ISA_AVX512
#include "likelihood/kernels.h"
#include "simd.h"
#include "likelihood/laplace.h"
