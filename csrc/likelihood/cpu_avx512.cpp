#define DALLE_ISA_AVX512
#include "likelihood/laplace.h"
