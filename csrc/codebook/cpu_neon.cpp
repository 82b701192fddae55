#define DALLE_ISA_NEON
#include "codebook/table.h"
