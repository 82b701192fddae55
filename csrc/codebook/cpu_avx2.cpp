#define DALLE_ISA_AVX2
#include "codebook/table.h"
