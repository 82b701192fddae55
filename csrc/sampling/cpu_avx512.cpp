#define DALLE_ISA_AVX512
#include "sampling/sample.h"
