#if defined(__x86_64__)
#define DALLE_ISA_AVX512
#include "codebook/table.h"
#endif
