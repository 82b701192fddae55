// What a table of noise is drawn by, as operations receive it: an int64 [2]. See dalle_kernels/noise.py.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace dalle {

struct NoiseKey {
  uint64_t seed, first_row;  // and which row of the noise the first row takes
};

inline NoiseKey noise_key(const Tensor& seed) {
  require(seed.dtype() == DType::int64 && seed.numel() == 2 && seed.is_contiguous(),
          "seed: wanted two int64, the seed and the first row of the noise");
  const int64_t* numbers = seed.data<const int64_t>();
  return {uint64_t(numbers[0]), uint64_t(numbers[1])};
}

}  // namespace dalle
