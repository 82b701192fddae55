// What Gumbel lookups make of a tile of scores, whether those come from memory (gumbel.h) or from a product
// (projection.h).
//
// The codebook is walked in tiles of 4 x 32 codes, 32 in each quarter, so that a noise counter feeds all four. A row
// keeps the running maximum m of its scores and two softmax sums relative to it, of (logits + g) / tau and, for the KL,
// of the logits themselves. One maximum serves both: g > -2.83, so logits - m < 2.83, and g < 16.7, so the largest of
// them is not far below. When m grows (about log K times a row) the sums are rescaled.
//
// Inside, exponentials and sums are in base 2.
#pragma once

#include "codebook/kernels.h"
#include "noise.h"
#include "multiply.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

constexpr float kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f;
constexpr float kLowestLogit = -FLT_MAX;  // a row with none as great has no distribution: its kl is NaN
constexpr int kTileVectors = int(kCounterTile) / kLanes;
constexpr int kNoiseVectors = kLanes == 16 ? 2 : 1;  // as many as registers hold
constexpr uint32_t kGumbelStream = 0;

// Of one row and tile: [l][j] holds codes first[l] + j kLanes ..
using TileRow = F[4][kTileVectors];

// The codes of tile `tile`: part l, 0 <= l < 4, is first[l] .. first[l] + count[l] - 1. With noise part l lies in
// quarter l, and its codes take word l of the counters from `counter`; without, the four parts follow one another.
struct Tile {
  int64_t first[4];
  int count[4];
  uint32_t counter;
  bool full;

  Tile(const Codes& p, int64_t tile) : counter(p.first_counter + uint32_t(tile * kCounterTile)), full(true) {
    for (int l = 0; l < 4; l++) {
      first[l] = p.noise ? l * p.quarter() + tile * kCounterTile : tile * kCodeTile + l * kCounterTile;
      const int64_t end = p.noise && (l + 1) * p.quarter() < p.codes ? (l + 1) * p.quarter() : p.codes;
      const int64_t left = end - first[l];
      count[l] = int(left < 0 ? 0 : left < kCounterTile ? left : kCounterTile);
      full = full && count[l] == kCounterTile;
    }
  }
};

// A row's logits, at(l, j) each, and its scores: logits + g.
template <bool Noise, class At>
DALLE_INLINE void load_scores(const Tile& tile, const NoiseKeys& keys, const NoiseRow& noise, At at, TileRow& clean,
                              TileRow& noisy) {
  U words[kTileVectors][4];
  if constexpr (Noise) {
    DALLE_UNROLL for (int j = 0; j < kTileVectors; j += kNoiseVectors)
      noise_words<kNoiseVectors>(keys, noise, tile.counter + uint32_t(j * kLanes), words + j);
  }
  DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) {
    DALLE_UNROLL for (int l = 0; l < 4; l++) {
      clean[l][j] = at(l, j);
      noisy[l][j] = Noise ? clean[l][j] + gumbel(words[j][l]) : clean[l][j];
    }
  }
}

// What a row has gathered so far: sums per lane of e^((noisy - top) / tau), of e^(clean - top) and of that times its own
// exponent, to base 2 (for the entropy); the maximum of the scores, and where it is first reached.
struct alignas(64) RowState {
  F noisy, clean, moment;
  float top;
  int64_t best;  // `codes` until some score is at least kLowestLogit
};
static_assert(sizeof(RowState) <= kRowStateBytes);

DALLE_INLINE RowState fresh_row(const Codes& p) { return {zero(), zero(), zero(), kLowestLogit, p.codes}; }

// The row's maximum may have grown: everything summed so far, its `columns` of `sum` too, is rescaled to the new one.
DALLE_INLINE void raise(const Codes& p, RowState& state, float* sum, int64_t columns, float scale, const Tile& tile,
                        const TileRow& noisy, float top) {
  if (top > state.top) {
    const F noisy_factor = exp2(set((state.top - top) * scale));
    const F drop = set((state.top - top) * kLog2E), clean_factor = exp2(drop);
    state.noisy = state.noisy * noisy_factor;
    state.moment = clean_factor * fma(max(drop, set(kZeroExponent)), state.clean, state.moment);
    state.clean = state.clean * clean_factor;
    for (int64_t j = 0; j < columns; j += kLanes) store(sum + j, load(sum + j) * noisy_factor);
    state.top = top;
    state.best = p.codes;
  }
  for (int l = 0; l < 4; l++)
    for (int j = 0; j < kTileVectors; j++)
      if (const uint32_t hits = bits(equal(noisy[l][j], set(top)))) {
        const int64_t code = tile.first[l] + j * kLanes + __builtin_ctz(hits);
        if (code < state.best) state.best = code;
      }
}

DALLE_INLINE F largest_score(const TileRow& noisy) {
  F top = noisy[0][0];
  DALLE_UNROLL for (int l = 0; l < 4; l++)
    DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) top = max(top, noisy[l][j]);
  return top;
}

// Adds a tile to the sums of its row, whose maximum is none of the tile's; put(l, j, weight) takes e^((noisy - top) / tau).
template <class Put>
DALLE_INLINE void add_up(RowState& state, float scale, const TileRow& clean, const TileRow& noisy, Put put) {
  // Differences first: products of large scores, or with a large 1 / tau, would be rounded by more than they differ.
  const F shift = set(state.top);
  F noisy_sum = state.noisy, clean_sum = state.clean, moment = state.moment;
  DALLE_UNROLL for (int l = 0; l < 4; l++)
    DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) {
      const F weight = exp2_or_zero((noisy[l][j] - shift) * set(scale));
      noisy_sum = noisy_sum + weight;
      put(l, j, weight);
      const F exponent = max(set(kZeroExponent), (clean[l][j] - shift) * set(kLog2E));
      const F share = exp2_bounded(exponent);
      clean_sum = clean_sum + share;
      moment = fma(share, exponent, moment);
    }
  state.noisy = noisy_sum, state.clean = clean_sum, state.moment = moment;
}

// Writes row n's results of `p`, but for its latents. Returns the row's total, NaN where no code has a score.
template <class Forward>
DALLE_INLINE RowTotal finish_row(const Forward& p, int64_t n, RowTotal row) {
  if (row.best == p.codes) row = {NAN, NAN, NAN, row.top, 0};
  p.indices[n] = row.best;
  p.maximum[n] = row.top;
  p.log_noisy[n] = __builtin_logf(row.noisy);
  p.log_clean[n] = __builtin_logf(row.clean);
  p.kl[n] = __builtin_logf(float(p.codes)) + kLn2 * (row.moment / row.clean) - __builtin_logf(row.clean);
  return row;
}

// What the backward pass knows of a row, to base 2.
struct RowShift {
  F top, noisy, clean;

  template <class Backward>
  DALLE_METHOD RowShift(const Backward& p, int64_t n)
      : top(set(p.maximum[n])), noisy(set(-p.log_noisy[n] * kLog2E)), clean(set(-p.log_clean[n] * kLog2E)) {}

  // A softmax weight of (logits + g) / tau. The maximum comes off first, exactly: scores may be so large that log K is
  // lost in their rounding.
  DALLE_METHOD F weight(F score, float scale) const { return exp2_or_zero(fma(score - top, set(scale), noisy)); }
  // log2 of softmax(logits), for exp2_bounded.
  DALLE_METHOD F exponent(F logit) const {
    return max(set(kZeroExponent), min(zero(), fma(logit - top, set(kLog2E), clean)));
  }
};

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
