#define DALLE_ISA_NEON
#include "decode/attend.h"
