// The online softmax of the forward kernels, in base 2: with s = scale log2(e) q k^T, for each tile of keys
//   m' = max(m, max s),  l' = 2^(m - m') l + sum 2^(s - m'),  acc' = 2^(m - m') acc + 2^(s - m') v;
// in the end out = acc / l and lse = ln 2 (m + log2 l).

#pragma once

#include "attention/tiles.cuh"

constexpr float kNothing = -1e38f;  // the largest score of no keys: finite, so that differences are numbers

// What a lane keeps of rows g and g + 8.
struct OnlineSoftmax {
  float m[2] = {kNothing, kNothing};
  float l[2] = {0.0f, 0.0f};  // this lane's columns only, until the end

  // Turns products q k^T into weights 2^(s - m') and scales `acc` to them; where `masked`, `visible` says which count.
  template <int kColumns, int kFragments>
  DEVICE void step(float (&score)[kColumns / 8][4], float (&acc)[kFragments][4], const Visible<kColumns>& visible,
                   bool masked, float to_base_2, int c) {
    float largest[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] *= to_base_2;
        if (masked && !visible.sees(n, c, i)) {
          score[n][i] = -kInfinity;
        }
        largest[i / 2] = fmaxf(largest[i / 2], score[n][i]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = largest_of_quad(largest[half]);
      const float old = exp2_fast(m[half] - largest[half]);  // 0 with the first visible key
      m[half] = largest[half];
      l[half] *= old;
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
        acc[n][2 * half] *= old;
        acc[n][2 * half + 1] *= old;
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] = exp2_fast(score[n][i] - m[i / 2]);
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
};
