#if defined(__x86_64__)
#define DALLE_ISA_AVX2
#include "likelihood/laplace.h"
#endif
