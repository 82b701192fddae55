#define DALLE_ISA_AVX512
#include "codebook/table.h"
