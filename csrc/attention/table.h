// The attention kernels of one instruction set: all that a translation unit includes.
#pragma once

#include "attention/backward.h"
#include "attention/forward.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

static int64_t rounded_width(int64_t width) { return round_up(width, kLanes); }

template <class T, class Dot>
constexpr Kernels kernels() {
  return {Forward<T, Dot>::floats, Forward<T, Dot>::run,     Backward<T, Dot>::floats,
          Backward<T, Dot>::run,   Backward<T, Dot>::reduce, rounded_width};
}

const AttentionTable& attention_kernels() {
#if defined(DALLE_PAIRS)
  static const AttentionTable table{DALLE_WITHOUT_PAIRS::attention_kernels().f32, kernels<bf16, PairProduct>()};
#else  // bfloat16 is widened: no instruction multiplies it
  static constexpr AttentionTable table{kernels<float, FloatProduct>(), kernels<bf16, FloatProduct>()};
#endif
  return table;
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
