// vq_lookup on the CPU: the nearest row of the codebook, and the gradients that meet at it.
//
// |f - c|^2 is least where f . c - |c|^2 / 2 is largest. Lanes run over rows: a tile of features is transposed once,
// the codebook is read in place, a value at a time, and every lane keeps its own best score and code, so nothing is
// ever reduced across lanes. Codes come in ascending order and only a greater score wins: ties go to the first.
//
// Several nearest rows, and rows drawn by noise, are kept as a list a lane, best first, into which a better code is put
// in its place; soon few codes are better than the last, and the list is left alone. Noise comes for four quarters of
// the codebook at a time, so codes are not in order there, and a list looks at them where scores are equal.
#pragma once

#include "codebook/kernels.h"
#include "codebook/product.h"
#include "noise.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

template <class T>
DALLE_INLINE F load_part(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load(p, int(left));
}

template <class T>
DALLE_INLINE float squared_norm(const T* row, int64_t width) {
  F total = zero();
  for (int64_t j = 0; j < width; j += kLanes) {
    const F x = load_part(row + j, width - j);
    total = fma(x, x, total);
  }
  return sum(total);
}

template <class T>
void vq_norms(const Vq& p, int64_t code, int64_t code_end) {
  for (; code < code_end; code++) {
    const float squares = squared_norm((const T*)p.codebook + code * p.width, p.width);
    p.norms[code] = p.metric != VqMetric::cosine ? 0.5f * squares : squares > 0 ? 1.f / __builtin_sqrtf(squares) : 0.f;
  }
}

DALLE_INLINE F broadcast_value(const float* p) { return broadcast(p); }
DALLE_INLINE F broadcast_value(const bf16* p) { return as_float(set(uint32_t(p->bits) << 16)); }

// The scores of Codes codes from `code` for Vectors vectors of rows; features [words, kRowTile] transposed. They are
// f . c - |c|^2 / 2, f . c, or f . c / |c|.
template <class P, class T, int Codes, int Vectors>
DALLE_INLINE void score_codes(const Vq& p, const Word* features, int64_t code, F score[Codes][Vectors]) {
  const T* c = (const T*)p.codebook + code * p.width;
  const bool norms = p.metric == VqMetric::euclidean || p.metric == VqMetric::distance;
  DALLE_UNROLL for (int i = 0; i < Codes; i++)
    DALLE_UNROLL for (int j = 0; j < Vectors; j++) score[i][j] = norms ? set(-p.norms[code + i]) : zero();
  const auto step = [&](int64_t d, auto units) __attribute__((always_inline)) {
    F row[Vectors];
    DALLE_UNROLL for (int j = 0; j < Vectors; j++) row[j] = load((const float*)features + d * kRowTile + j * kLanes);
    DALLE_UNROLL for (int i = 0; i < Codes; i++) {
      const F value = units(c + i * p.width + d * P::kDepth);
      DALLE_UNROLL for (int j = 0; j < Vectors; j++) score[i][j] = P::multiply_add(value, row[j], score[i][j]);
    }
  };
  if constexpr (P::kDepth == 1) {
    for (int64_t d = 0; d < p.width; d++) step(d, [](const T* at) __attribute__((always_inline)) { return broadcast_value(at); });
  } else {
    for (int64_t d = 0; d < p.width / 2; d++) step(d, [](const T* at) __attribute__((always_inline)) { return broadcast(at); });
    if (p.width % 2 != 0)  // the last of an odd width stands alone
      step(p.width / 2, [](const T* at) __attribute__((always_inline)) { return as_float(set(uint32_t(at->bits))); });
  }
  if (p.metric == VqMetric::cosine)
    DALLE_UNROLL for (int i = 0; i < Codes; i++)
      DALLE_UNROLL for (int j = 0; j < Vectors; j++) score[i][j] = score[i][j] * set(p.norms[code + i]);
}

template <class P, class T, int Codes, int Vectors>
DALLE_INLINE void compare(const Vq& p, const Word* features, int64_t code, F best[], U best_code[]) {
  F score[Codes][Vectors];
  score_codes<P, T, Codes, Vectors>(p, features, code, score);
  DALLE_UNROLL for (int i = 0; i < Codes; i++)
    DALLE_UNROLL for (int j = 0; j < Vectors; j++) {
      const Mask wins = greater(score[i][j], best[j]);
      best[j] = select(wins, score[i][j], best[j]);
      best_code[j] = select(wins, set(uint32_t(code + i)), best_code[j]);
    }
}

// The best k codes of kBlockVectors vectors of rows, in order.
struct VqList {
  F score[kMostNearest][kBlockVectors];
  U code[kMostNearest][kBlockVectors];
  F noise_scale[kBlockVectors];  // of rows: what noise is multiplied by beside their scores
  F squares[kBlockVectors];      // of rows: |f|^2, for distances
};

DALLE_INLINE Mask comes_before(F score, U code, F other, U other_code) {
  return greater(score, other) | (equal(score, other) & not_below(other_code, code));
}

__attribute__((noinline)) static void put(VqList& list, int64_t k, int j, F in_hand, U its_code) {
  Mask shifts = comes_before(in_hand, its_code, list.score[0][j], list.code[0][j]);
  for (int64_t place = 0; place < k; place++) {
    const F there = list.score[place][j];
    const U code_there = list.code[place][j];
    // What has lost its place takes the next one, whatever is there.
    shifts = shifts | comes_before(in_hand, its_code, there, code_there);
    list.score[place][j] = select(shifts, in_hand, there);
    list.code[place][j] = select(shifts, its_code, code_there);
    in_hand = select(shifts, there, in_hand);
    its_code = select(shifts, code_there, its_code);
  }
}

// noise: [Codes, kRowTile] or null.
template <class P, class T, int Codes>
__attribute__((noinline)) static void rank(const Vq& p, const Word* features, int64_t code, const float* noise,
                                           VqList& list) {
  F score[Codes][kBlockVectors];
  score_codes<P, T, Codes, kBlockVectors>(p, features, code, score);
  DALLE_UNROLL for (int i = 0; i < Codes; i++)
    DALLE_UNROLL for (int j = 0; j < kBlockVectors; j++) {
      F total = score[i][j];
      if (noise != nullptr) {
        if (p.metric == VqMetric::distance) total = zero() - sqrt(max(list.squares[j] - total - total, zero()));
        total = fma(load(noise + i * kRowTile + j * kLanes), list.noise_scale[j], total);
      }
      const U its_code = set(uint32_t(code + i));
      const Mask wins = comes_before(total, its_code, list.score[p.k - 1][j], list.code[p.k - 1][j]);
      if (any(wins)) put(list, p.k, j, total, its_code);
    }
}

template <class P, class T>
static void rank_all(const Vq& p, const Word* features, VqList& list) {
  int64_t code = 0;
  for (; code + kBlockRows <= p.codes; code += kBlockRows) rank<P, T, kBlockRows>(p, features, code, nullptr, list);
  for (; code < p.codes; code++) rank<P, T, 1>(p, features, code, nullptr, list);
}

template <class P, class T>
static void draw_all(const Vq& p, const Word* features, uint64_t noise_row, float* noise, VqList& list) {
  static_assert(4 * kBlockRows <= Vq::kNoiseCodes);
  const NoiseKeys keys(p.seed);
  const int64_t quarter = (p.codes + 3) / 4;
  for (int64_t counter = 0; counter < quarter; counter += kBlockRows) {
    const int count = quarter - counter < kBlockRows ? int(quarter - counter) : kBlockRows;
    for (int i = 0; i < count; i++)
      for (int j = 0; j < kBlockVectors; j++) {
        U words[4];
        noise_words_of_rows(keys, noise_row + uint64_t(j * kLanes), p.stream, uint32_t(counter + i), words);
        DALLE_UNROLL for (int part = 0; part < 4; part++)
          store(noise + (part * kBlockRows + i) * kRowTile + j * kLanes, gumbel(words[part]));
      }
    for (int part = 0; part < 4; part++) {
      const int64_t code = part * quarter + counter;
      const float* its_noise = noise + part * kBlockRows * kRowTile;
      if (count == kBlockRows && code + kBlockRows <= p.codes)
        rank<P, T, kBlockRows>(p, features, code, its_noise, list);
      else
        for (int i = 0; i < count && code + i < p.codes; i++)
          rank<P, T, 1>(p, features, code + i, its_noise + i * kRowTile, list);
    }
  }
}

// What the noise of a row is multiplied by beside the scores of score_codes.
DALLE_INLINE float noise_scale(const Vq& p, float squares) {
  switch (p.metric) {
    case VqMetric::euclidean: return 0.5f * p.temperature;  // |f - c|^2 = |f|^2 - 2 (f . c - |c|^2 / 2)
    case VqMetric::cosine: return squares > 0 ? p.temperature * __builtin_sqrtf(squares) : p.temperature;
    default: return p.temperature;
  }
}

template <class T>
void vq_forward(const Vq& p, int64_t row, int64_t row_end, void* scratch) {
  using P = typename ProductOf<T>::Type;
  constexpr int64_t kGroup = kBlockVectors * kLanes;  // rows that one walk over the codebook serves
  Word* features = (Word*)scratch;
  float* noise = (float*)(features + padded(p.width) * kRowTile);
  for (; row < row_end; row += kGroup) {
    const int64_t count = row_end - row < kGroup ? row_end - row : kGroup;
    std::memset(features, 0, size_t(padded(p.width) * kRowTile) * sizeof(Word));
    for (int64_t r = 0; r < count; r++) {
      const T* f = (const T*)p.features + (row + r) * p.width;
      for (int64_t d = 0; d < p.width; d++)
        if constexpr (P::kDepth == 1) ((float*)features)[d * kRowTile + r] = to_float(f[d]);
        else ((bf16*)(features + d / 2 * kRowTile + r))[d & 1] = f[d];
    }
    uint32_t chosen[kMostNearest][kGroup];
    if (p.k == 1 && p.temperature == 0) {
      F best[kBlockVectors];
      U best_code[kBlockVectors];
      for (int j = 0; j < kBlockVectors; j++) best[j] = set(-INFINITY), best_code[j] = set(0u);
      int64_t code = 0;
      for (; code + kBlockRows <= p.codes; code += kBlockRows)
        compare<P, T, kBlockRows, kBlockVectors>(p, features, code, best, best_code);
      for (; code < p.codes; code++) compare<P, T, 1, kBlockVectors>(p, features, code, best, best_code);
      for (int j = 0; j < kBlockVectors; j++) store(chosen[0] + j * kLanes, best_code[j]);
    } else {
      VqList list;
      for (int64_t place = 0; place < p.k; place++)
        for (int j = 0; j < kBlockVectors; j++) list.score[place][j] = set(-INFINITY), list.code[place][j] = set(~0u);
      if (p.temperature == 0) {
        rank_all<P, T>(p, features, list);
      } else {
        float scales[kGroup] = {}, squares[kGroup] = {};
        for (int64_t r = 0; r < count; r++) {
          squares[r] = squared_norm((const T*)p.features + (row + r) * p.width, p.width);
          scales[r] = noise_scale(p, squares[r]);
        }
        for (int j = 0; j < kBlockVectors; j++)
          list.noise_scale[j] = load(scales + j * kLanes), list.squares[j] = load(squares + j * kLanes);
        draw_all<P, T>(p, features, p.first_row + uint64_t(row), noise, list);
      }
      for (int64_t place = 0; place < p.k; place++)
        for (int j = 0; j < kBlockVectors; j++) store(chosen[place] + j * kLanes, list.code[place][j]);
    }
    for (int64_t r = 0; r < count; r++)
      for (int64_t place = 0; place < p.k; place++) {
        const int64_t choice = (row + r) * p.k + place;
        const int64_t code = int64_t(chosen[place][r]) < p.codes ? chosen[place][r] : 0;  // a row of NaN has none
        const T* f = (const T*)p.features + (row + r) * p.width;
        const T* c = (const T*)p.codebook + code * p.width;
        F total = zero();
        for (int64_t j = 0; j < p.width; j += kLanes) {
          const F difference = load_part(f + j, p.width - j) - load_part(c + j, p.width - j);
          total = fma(difference, difference, total);
        }
        std::memcpy((T*)p.nearest + choice * p.width, c, size_t(p.width) * sizeof(T));
        p.indices[choice] = code;
        p.squared_distance[choice] = sum(total);
      }
  }
}

// 2 grad (f - c) of one choice in columns j .., with c the row that was chosen.
template <class T>
DALLE_INLINE F vq_share(const VqBackward& p, int64_t row, int64_t choice, int64_t j, int left) {
  const F f = load((const T*)p.features + row * p.width + j, left);
  return set(2.f * p.grad[choice]) * (f - load((const T*)p.nearest + choice * p.width + j, left));
}

template <class T>
void vq_grad_features(const VqBackward& p, int64_t row, int64_t row_end) {
  for (; row < row_end; row++) {
    T* out = (T*)p.grad_features + row * p.width;
    for (int64_t j = 0; j < p.width; j += kLanes) {
      const int left = p.width - j < kLanes ? int(p.width - j) : kLanes;
      F total = zero();
      for (int64_t place = 0; place < p.k; place++) total = total + vq_share<T>(p, row, row * p.k + place, j, left);
      store(out + j, total, left);
    }
  }
}

// Adds up term(choice, j, left), the share of a choice in columns j .., over those of each code, in ascending order.
template <class Out, class Term>
DALLE_INLINE void gather_codes(const VqBackward& p, int64_t code, int64_t code_end, Term term) {
  for (; code < code_end; code++) {
    if (p.add && p.starts[code] == p.starts[code + 1]) continue;
    for (int64_t j = 0; j < p.width; j += kLanes) {
      const int left = p.width - j < kLanes ? int(p.width - j) : kLanes;
      F total = p.add ? load((const Out*)p.grad_codebook + code * p.width + j, left) : zero();
      for (int64_t m = p.starts[code]; m < p.starts[code + 1]; m++) total = total + term(p.members[m], j, left);
      store((Out*)p.grad_codebook + code * p.width + j, total, left);
    }
  }
}

template <class T>
void vq_grad_codebook(const VqBackward& p, int64_t code, int64_t code_end) {
  gather_codes<T>(p, code, code_end, [&](int64_t choice, int64_t j, int left) {
    return zero() - vq_share<T>(p, choice / p.k, choice, j, left);
  });
}

template <class T>
void scatter_rows(const void* grad, const VqBackward& p, int64_t code, int64_t code_end) {
  gather_codes<T>(p, code, code_end,
                  [&](int64_t row, int64_t j, int left) { return load((const T*)grad + row * p.width + j, left); });
}

template <class T>
void sum_rows(const VqBackward& p, int64_t code, int64_t code_end) {
  gather_codes<float>(p, code, code_end, [&](int64_t row, int64_t j, int left) {
    return load((const T*)p.features + row * p.width + j, left);
  });
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
