#if defined(__aarch64__)
#define DALLE_ISA_NEON
#include "attention/table.h"
#endif
