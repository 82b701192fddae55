#define DALLE_ISA_NEON
#include "sampling/sample.h"
