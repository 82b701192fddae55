// sample_tokens on the CPU, a row at a time: guidance and temperature in one pass; for top-k and top-p a threshold on
// the scores, found by selection, not by sorting; then the largest score plus Gumbel noise.
//
// Both filters keep a score x while the weight of the scores above it stays below a limit: top-k counts them (limit
// k), top-p adds up their probability. So the threshold, the smallest score that is kept, falls to bisection: weigh
// the candidates above a pivot, and go on with those above or those below. The candidates about halve each time.
//
// Noise costs several times as much as all the rest, so where few scores are kept it is drawn for those alone.
#pragma once

#include "noise.h"
#include "sampling/kernels.h"
#include "simd.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

constexpr uint32_t kSamplingStream = 1;

// The lanes' largest value and the first code that has it.
struct Best {
  float score = -INFINITY;
  int64_t code = 0;

  void take(F scores, U codes) {
    const float top = largest(scores);
    if (!(top >= score)) return;
    alignas(64) uint32_t lanes[kLanes];
    store(lanes, codes);
    for (uint32_t hits = bits(equal(scores, set(top))); hits != 0; hits &= hits - 1) {
      const int64_t at = lanes[__builtin_ctz(hits)];
      if (top > score || at < code) score = top, code = at;
    }
  }
};

template <class T>
struct Sampler {
  const Sampling& p;
  const NoiseKeys keys;
  const int64_t quarter;
  float* scores;      // [codes + a vector]
  float* candidates;  // the same
  uint32_t* codes;    // the same

  Sampler(const Sampling& problem, void* scratch) : p(problem), keys(problem.seed), quarter((problem.codes + 3) / 4) {
    scores = (float*)scratch;
    candidates = scores + p.span();
    codes = (uint32_t*)(candidates + p.span());
  }

  static int left(int64_t j, int64_t count) { return count - j < kLanes ? int(count - j) : kLanes; }

  // Scores after guidance and temperature, -inf up to a whole vector past the end; returns the largest.
  float score(int64_t row) {
    const T* logits = (const T*)p.logits + row * p.logits_stride;
    const T* base = p.unconditional == nullptr ? nullptr : (const T*)p.unconditional + row * p.unconditional_stride;
    const F guidance = set(p.guidance_scale), inverse = set(p.temperature > 0 ? 1.f / p.temperature : 1.f);
    F top = set(-INFINITY);
    for (int64_t j = 0; j < p.codes; j += kLanes) {
      const int n = left(j, p.codes);
      F x = n == kLanes ? load(logits + j) : load(logits + j, n);
      if (base != nullptr) {
        const F u = n == kLanes ? load(base + j) : load(base + j, n);
        x = max(fma(guidance, x - u, u), set(-INFINITY));  // NaN where both are -inf: not to be drawn
      }
      x = x * inverse;
      if (n < kLanes) x = select(first(n), x, set(-INFINITY));
      top = max(x, top);
      store(scores + j, x);
    }
    return largest(top);
  }

  int64_t first_equal(float value) const {
    for (int64_t j = 0; j < p.codes; j += kLanes)
      if (const uint32_t hits = bits(equal(load(scores + j), set(value)))) return j + __builtin_ctz(hits);
    return 0;
  }

  static F weight(F x, F top, bool counting) {
    return counting ? set(1.f) : exp2((x - top) * set(0x1.715476p+0f));
  }

  // The smallest of the scores >= floor such that the weight of all scores above it is below `limit`.
  float threshold(float floor, float top, float limit, bool counting) {
    const float* from = scores;
    int64_t count = p.codes;
    F lowest = set(top);
    for (int64_t j = 0; j < count; j += kLanes) {
      const F x = load(from + j);
      lowest = min(select(greater_equal(x, set(floor)) & first(left(j, count)), x, set(top)), lowest);
    }
    float low = smallest(lowest), high = top;
    float above = 0;  // weight of what was set aside as larger than every candidate
    while (low < high) {
      float pivot = 0.5f * low + 0.5f * high;
      if (!(pivot >= low && pivot < high)) pivot = low;
      F heavier = zero(), least_above = set(INFINITY), most_below = set(-INFINITY);
      for (int64_t j = 0; j < count; j += kLanes) {
        const F x = load(from + j);
        const Mask valid = first(left(j, count)) & greater_equal(x, set(low)), larger = greater(x, set(pivot)) & valid;
        heavier = heavier + select(larger, weight(x, set(top), counting), zero());
        least_above = min(least_above, select(larger, x, set(INFINITY)));
        most_below = max(most_below, select(valid & ~larger, x, set(-INFINITY)));
      }
      const float weight_above = above + sum(heavier);
      const bool below = weight_above < limit;  // the threshold is at or below the pivot
      if (below) above = weight_above, high = largest(most_below);
      else low = smallest(least_above);
      int64_t kept = 0;
      for (int64_t j = 0; j < count; j += kLanes) {
        const F x = load(from + j);
        const Mask stays = first(left(j, count)) & greater_equal(x, set(low)) & greater_equal(set(high), x);
        store(candidates + kept, compress(stays, x));
        kept += __builtin_popcount(bits(stays));
      }
      from = candidates;
      count = kept;
    }
    return low;
  }

  // argmax(score + noise) over every code; noise as in a table of `codes` columns.
  int64_t draw_all(int64_t row) {
    const NoiseRow noise(keys, p.first_row + uint64_t(row), kSamplingStream);
    F best[4];
    U best_counter[4];
    for (int l = 0; l < 4; l++) best[l] = set(-INFINITY), best_counter[l] = set(0u);
    for (int64_t c = 0; c < quarter; c += kLanes) {
      U words[1][4];
      noise_words(keys, noise, uint32_t(c), words);
      const U counter = iota() + set(uint32_t(c));
      DALLE_UNROLL for (int l = 0; l < 4; l++) {
        const int64_t end = (l + 1) * quarter < p.codes ? (l + 1) * quarter : p.codes, start = l * quarter + c;
        const int n = start >= end ? 0 : left(start, end);
        const F x = n == kLanes ? load(scores + start) : select(first(n), load(scores + (n > 0 ? start : 0), n), set(-INFINITY));
        const F noisy = x + gumbel(words[0][l]);
        const Mask wins = greater(noisy, best[l]);
        best[l] = select(wins, noisy, best[l]);
        best_counter[l] = select(wins, counter, best_counter[l]);
      }
    }
    Best result;
    for (int l = 0; l < 4; l++)
      if (any(greater(best[l], set(-INFINITY)))) result.take(best[l], best_counter[l] + set(uint32_t(l * quarter)));
    return result.code;
  }

  // The same over the `count` gathered candidates alone: each lane has a counter of its own.
  int64_t draw_candidates(int64_t row, int64_t count) {
    const NoiseRow noise(keys, p.first_row + uint64_t(row), kSamplingStream);
    Best result;
    for (int64_t j = 0; j < count; j += kLanes) {
      const U code = load(codes + j);
      U part = set(0u), words[1][4];
      for (int l = 1; l < 4; l++) part = part + select(not_below(code, set(uint32_t(l * quarter))), set(1u), set(0u));
      const U counter = code - part * set(uint32_t(quarter));
      noise_words<1>(keys, noise, &counter, words);
      U word = words[0][0];
      for (int l = 1; l < 4; l++) word = select(equal(part, set(uint32_t(l))), words[0][l], word);
      result.take(select(first(left(j, count)), load(candidates + j) + gumbel(word), set(-INFINITY)), code);
    }
    return result.code;
  }

  int64_t sample(int64_t row) {
    const float top = score(row);
    if (p.temperature == 0) return first_equal(top);
    float floor = -INFINITY;
    if (0 < p.top_k && p.top_k < p.codes) floor = threshold(floor, top, float(p.top_k), true);
    if (p.top_p < 1) {
      F total = zero();
      for (int64_t j = 0; j < p.codes; j += kLanes) {
        const F x = load(scores + j);
        total = total + select(greater_equal(x, set(floor)), weight(x, set(top), false), zero());
      }
      floor = threshold(floor, top, p.top_p * sum(total), false);
    }
    if (floor == -INFINITY) return draw_all(row);

    int64_t count = 0;
    for (int64_t j = 0; j < p.codes; j += kLanes) {
      const F x = load(scores + j);
      const Mask kept = greater_equal(x, set(floor));
      if (!any(kept)) continue;
      store(candidates + count, compress(kept, x));
      store((float*)codes + count, compress(kept, as_float(iota() + set(uint32_t(j)))));
      count += __builtin_popcount(bits(kept));
    }
    if (4 * count <= p.codes) return draw_candidates(row, count);
    for (int64_t j = 0; j < p.codes; j += kLanes) {
      const F x = load(scores + j);
      store(scores + j, select(greater_equal(x, set(floor)), x, set(-INFINITY)));
    }
    return draw_all(row);
  }
};

template <class T>
void sample_rows(const Sampling& problem, int64_t row, int64_t row_end, void* scratch) {
  Sampler<T> sampler(problem, scratch);
  for (; row < row_end; row++) problem.tokens[row] = sampler.sample(row);
}

const SamplingTable& sampling_kernels() {
  static constexpr SamplingTable table{sample_rows<float>, sample_rows<bf16>};
  return table;
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
