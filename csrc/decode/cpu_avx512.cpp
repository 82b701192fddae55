#define DALLE_ISA_AVX512
#include "decode/attend.h"
