#if defined(__x86_64__)
#define DALLE_ISA_AVX512_BF16
#include "attention/table.h"
#endif
