#define DALLE_ISA_AVX512
#include "attention/table.h"
