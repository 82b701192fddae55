// bfloat16 in memory, and nothing more: arithmetic happens in float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace dalle {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace dalle
