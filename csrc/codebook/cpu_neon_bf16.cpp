#if defined(__aarch64__)
#define DALLE_ISA_NEON_BF16
#include "codebook/table.h"
#endif
