// The online softmax of the forward kernel, in base 2: with s = slope q k^T, for each tile of keys
//   m' = max(m, max s) where that is above m + kSlack, else m,
//   l' = 2^(m - m') l + sum 2^(s - m'),  acc' = 2^(m - m') acc + 2^(s - m') v;
// in the end out = acc / l and lse = ln 2 (m + log2 l). Any m gives the same out and lse. One that rarely moves saves
// the factors, and rows few enough are added up that weights of 2^kSlack do no harm.

#pragma once

#include "attention/tiles.cuh"

constexpr float kNothing = -1e38f;  // m before any key: finite, so that differences are numbers
constexpr float kSlack = 8.0f;

// What a lane keeps of rows g and g + 8 of a part.
struct OnlineSoftmax {
  float m[2] = {kNothing, kNothing};
  float l[2] = {0.0f, 0.0f};  // this lane's columns only, until the end

  // Turns products q k^T into weights 2^(s - m') and scales `acc` to them. `slope` is positive.
  template <int kScores, int kFragments>
  DEVICE void step(float (&score)[kScores][4], float (&acc)[kFragments][4], float slope) {
    float largest[2] = {score[0][0], score[0][2]};
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        largest[i / 2] = fmaxf(largest[i / 2], score[n][i]);
      }
    }
    const bool grown = largest[0] * slope - m[0] > kSlack || largest[1] * slope - m[1] > kSlack;
    if (__any_sync(0xffffffffu, grown)) {
      raise(largest, acc, slope);
    }
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] = exp2_fast(score[n][i] * slope - m[i / 2]);
        l[i / 2] += score[n][i];
      }
    }
  }

  // Writes the rows' outputs and log-sum-exps; a row that saw nothing gives zeros and -inf.
  template <class T, int kWidth>
  DEVICE void finish(const AttentionForward& p, const float (&acc)[kWidth / 8][4], const int (&token)[2],
                     const Place& place) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] = sum_of_quad(l[half]);
      const bool some = l[half] != 0.0f;  // NaN is some
      inverse[half] = some ? 1.0f / l[half] : 0.0f;
      if (token[half] >= 0 && place.c == 0) {
        const float lse = some ? kLn2 * (m[half] + log2_fast(l[half])) : -kInfinity;
        const int64_t row = static_cast<int64_t>(place.batch) * p.heads + place.head;
        store(p.lse + row * p.walk.length + token[half], lse);
      }
    }
    store_rows<T, kWidth>(head_data<T>(p.out, place), p.out.strides[2], acc, inverse, token, place.c);
  }

 private:
  template <int kFragments>
  DEVICE void raise(const float (&largest)[2], float (&acc)[kFragments][4], float slope) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float now = fmaxf(m[half], largest_of_quad(largest[half]) * slope);
      const float old = exp2_fast(m[half] - now);  // 0 with the first visible key
      m[half] = now;
      l[half] *= old;
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
        acc[n][2 * half] *= old;
        acc[n][2 * half + 1] *= old;
      }
    }
  }
};
