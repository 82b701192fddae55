#if defined(__aarch64__)
#define DALLE_ISA_NEON
#include "codebook/table.h"
#endif
