// The likelihood's kernels for AVX2.
#define DALLE_ISA_AVX2
#include "likelihood/kernels.h"
#include "simd.h"
#include "likelihood/laplace.h"
