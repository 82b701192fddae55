#define DALLE_ISA_AVX2
#include "attention/table.h"
