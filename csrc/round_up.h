#pragma once

#include <cstdint>

namespace dalle {

// The smallest multiple of `step` that is at least `size`.
constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

}  // namespace dalle
