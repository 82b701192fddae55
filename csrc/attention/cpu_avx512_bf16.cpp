#define DALLE_ISA_AVX512_BF16
#include "attention/table.h"
