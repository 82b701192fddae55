// The sampling kernels for AVX-512.
#define DALLE_ISA_AVX512
#include "sampling/kernels.h"
#include "simd.h"
#include "noise.h"
#include "sampling/sample.h"
