#define DALLE_ISA_NEON
#include "attention/table.h"
