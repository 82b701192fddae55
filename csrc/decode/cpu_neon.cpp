#if defined(__aarch64__)
#define DALLE_ISA_NEON
#include "decode/attend.h"
#endif
