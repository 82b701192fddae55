#define DALLE_ISA_AVX2
#include "likelihood/laplace.h"
