#define DALLE_ISA_AVX2
#include "sampling/sample.h"
