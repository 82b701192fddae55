// The table of functions of one instruction set and element type.
#pragma once

#include "attention/backward.h"
#include "attention/forward.h"

namespace dalle::DALLE_ISA {

static int64_t rounded_width(int64_t width) { return round_up(int(width), kLanes); }

template <class T, class Dot>
constexpr Kernels kernels() {
  return {Forward<T, Dot>::floats, Forward<T, Dot>::run,     Backward<T, Dot>::floats,
          Backward<T, Dot>::run,   Backward<T, Dot>::reduce, rounded_width};
}

}  // namespace dalle::DALLE_ISA
