#define DALLE_ISA_NEON
#include "likelihood/laplace.h"
