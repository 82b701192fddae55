#define DALLE_ISA_AVX2
#include "decode/attend.h"
