// The sampling kernels for AVX2.
#define DALLE_ISA_AVX2
#include "sampling/kernels.h"
#include "simd.h"
#include "noise.h"
#include "sampling/sample.h"
