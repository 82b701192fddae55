// The Gumbel noise of dalle_kernels/noise.py: Philox4x32-10 with the seed as its key.

#pragma once

#include <cmath>

#include "cuda/device.cuh"

struct Noise {
  uint32_t key_low, key_high, stream;
  uint64_t first_row;

  // `seed`: two numbers, the second of which is the row of the noise that row 0 takes.
  DEVICE Noise(const int64_t* seed, uint32_t stream)
      : key_low(static_cast<uint32_t>(load(seed))),
        key_high(static_cast<uint32_t>(static_cast<uint64_t>(load(seed)) >> 32)),
        stream(stream),
        first_row(static_cast<uint64_t>(load(seed + 1))) {}

  // The noise of codes `column`, column + Kq, column + 2 Kq and column + 3 Kq of `row`, Kq a quarter of the codes.
  DEVICE void operator()(float (&noise)[4], uint32_t column, int64_t row) const {
    const uint64_t noise_row = first_row + static_cast<uint64_t>(row);
    uint32_t c0 = column;
    uint32_t c1 = static_cast<uint32_t>(noise_row);
    uint32_t c2 = static_cast<uint32_t>(noise_row >> 32);
    uint32_t c3 = stream;
    uint32_t k0 = key_low;
    uint32_t k1 = key_high;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = __umulhi(0xD2511F53u, c0);
      const uint32_t low0 = 0xD2511F53u * c0;
      const uint32_t high1 = __umulhi(0xCD9E8D57u, c2);
      const uint32_t low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint32_t words[4] = {c0, c1, c2, c3};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // u is exact; near 1, -log u is tiny, so the inner logarithm must be accurate to a few ulp. The outer one's
      // absolute error is what counts, and the special function unit's is 2^-22.
      const float u = (static_cast<float>(words[i] >> 9) + 0.5f) * 0x1p-23f;
      noise[i] = -0.6931471805599453f * log2_fast(-logf(u));
    }
  }
};
