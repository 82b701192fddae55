// The Gumbel noise of dalle_kernels/noise.py, a vector of counters at a time.
//
// Philox4x32-10 on the counter (c, row low, row high, stream) and the seed as key. A 32 x 32 -> 64 bit product exists
// for every other 32-bit lane on x86-64, so there a counter word lives in the low half of a 64-bit lane (the high half
// is never read) and two such vectors, even and odd counters, make one vector of words. Rounds 1 and 2 are nearly free:
// after round 1 two of the four words, and after round 2 the last, are the same for a whole row.
#pragma once

#include "simd.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr int kPhiloxRounds = 10;

struct NoiseKeys {
  uint32_t first[kPhiloxRounds], second[kPhiloxRounds];

  explicit NoiseKeys(uint64_t seed) {
    uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
    for (int i = 0; i < kPhiloxRounds; i++, low += 0x9E3779B9u, high += 0xBB67AE85u) first[i] = low, second[i] = high;
  }
};

// What a row's counters have in common: xor masks of rounds 1 and 2, and the last word after round 2.
struct NoiseRow {
  uint32_t mask1_2, mask2_0, mask2_2, word3;

  NoiseRow() = default;
  NoiseRow(const NoiseKeys& keys, uint64_t row, uint32_t stream) {
    const uint64_t product1 = kPhiloxMultiplier1 * (row >> 32);
    const uint32_t word0 = uint32_t(product1 >> 32) ^ uint32_t(row) ^ keys.first[0];
    const uint64_t product0 = kPhiloxMultiplier0 * uint64_t(word0);
    mask1_2 = stream ^ keys.second[0];
    mask2_0 = uint32_t(product1) ^ keys.first[1];
    mask2_2 = uint32_t(product0 >> 32) ^ keys.second[1];
    word3 = uint32_t(product0);
  }
};

// Words 0..3 of some vectors of counters. Vectors go through the rounds side by side, because a round waits for the one
// before.
template <int Vectors>
DALLE_INLINE void noise_words(const NoiseKeys& keys, const NoiseRow& row, const U counters[Vectors],
                              U words[Vectors][4]) {
  constexpr int kParts = kHalves * Vectors;
  const W m0 = wide_set(kPhiloxMultiplier0), m1 = wide_set(kPhiloxMultiplier1);
  W c0[kParts], c1[kParts], c2[kParts], c3[kParts];
  DALLE_UNROLL for (int v = 0; v < Vectors; v++) widen(counters[v], c0 + v * kHalves);
  DALLE_UNROLL for (int h = 0; h < kParts; h++) {
    const WideProduct product0 = wide_multiply(c0[h], m0);
    const WideProduct product1 = wide_multiply(product0.high ^ wide_set(row.mask1_2), m1);
    c0[h] = product1.high ^ wide_set(row.mask2_0);
    c1[h] = product1.low;
    c2[h] = product0.low ^ wide_set(row.mask2_2);
    c3[h] = wide_set(row.word3);
  }
  DALLE_UNROLL for (int round = 2; round < kPhiloxRounds; round++) {
    const W k0 = wide_set(keys.first[round]), k1 = wide_set(keys.second[round]);
    DALLE_UNROLL for (int h = 0; h < kParts; h++) {
      const WideProduct product0 = wide_multiply(c0[h], m0), product1 = wide_multiply(c2[h], m1);
      c0[h] = exclusive_or(product1.high, c1[h], k0);
      c2[h] = exclusive_or(product0.high, c3[h], k1);
      c1[h] = product1.low;
      c3[h] = product0.low;
    }
  }
  DALLE_UNROLL for (int v = 0; v < Vectors; v++) {
    words[v][0] = narrow(c0 + v * kHalves);
    words[v][1] = narrow(c1 + v * kHalves);
    words[v][2] = narrow(c2 + v * kHalves);
    words[v][3] = narrow(c3 + v * kHalves);
  }
}

// The same for the counters counter .. counter + Vectors kLanes - 1.
template <int Vectors = 1>
DALLE_INLINE void noise_words(const NoiseKeys& keys, const NoiseRow& row, uint32_t counter, U words[Vectors][4]) {
  U counters[Vectors];
  DALLE_UNROLL for (int v = 0; v < Vectors; v++) counters[v] = iota() + set(counter + uint32_t(v * kLanes));
  noise_words<Vectors>(keys, row, counters, words);
}

// Words 0..3 of one counter for the rows row .. row + kLanes - 1, a row a lane.
DALLE_INLINE void noise_words_of_rows(const NoiseKeys& keys, uint64_t row, uint32_t stream, uint32_t counter, U words[4]) {
  const W m0 = wide_set(kPhiloxMultiplier0), m1 = wide_set(kPhiloxMultiplier1);
  const U first = set(uint32_t(row)), low = iota() + first;
  const U high = select(not_below(low, first), set(uint32_t(row >> 32)), set(uint32_t(row >> 32) + 1));
  W c0[kHalves], c1[kHalves], c2[kHalves], c3[kHalves];
  widen(set(counter), c0), widen(low, c1), widen(high, c2), widen(set(stream), c3);
  DALLE_UNROLL for (int round = 0; round < kPhiloxRounds; round++) {
    const W k0 = wide_set(keys.first[round]), k1 = wide_set(keys.second[round]);
    DALLE_UNROLL for (int h = 0; h < kHalves; h++) {
      const WideProduct product0 = wide_multiply(c0[h], m0), product1 = wide_multiply(c2[h], m1);
      c0[h] = exclusive_or(product1.high, c1[h], k0);
      c2[h] = exclusive_or(product0.high, c3[h], k1);
      c1[h] = product1.low;
      c3[h] = product0.low;
    }
  }
  words[0] = narrow(c0), words[1] = narrow(c1), words[2] = narrow(c2), words[3] = narrow(c3);
}

// -log(-log u), u = ((word >> 9) + 1/2) 2^-23: the 23 bits become the mantissa of a number in [1, 2), and both that
// and the subtraction are exact.
DALLE_INLINE F gumbel(U word) {
  const F u = as_float((word >> 9) | set(0x3F800000u)) - set(0x1.FFFFFEp-1f);
  return minus_log(minus_log(u));
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
