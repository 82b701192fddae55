#if defined(__aarch64__)
#define DALLE_ISA_NEON_BF16
#include "attention/table.h"
#endif
