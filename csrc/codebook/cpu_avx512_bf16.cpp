#if defined(__x86_64__)
#define DALLE_ISA_AVX512_BF16
#include "codebook/table.h"
#endif
