// vq_lookup on the CPU: the nearest row of the codebook, and the gradients that meet at it.
//
// |f - c|^2 is least where f . c - |c|^2 / 2 is largest. Lanes run over rows: a tile of features is transposed once,
// the codebook is read in place, a value at a time, and every lane keeps its own best score and code, so nothing is
// ever reduced across lanes. Codes come in ascending order and only a greater score wins: ties go to the first.
#pragma once

#include "codebook/kernels.h"
#include "codebook/product.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

template <class T>
DALLE_INLINE F load_part(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load(p, int(left));
}

template <class T>
void half_norms(const Vq& p, int64_t code, int64_t code_end) {
  for (; code < code_end; code++) {
    const T* c = (const T*)p.codebook + code * p.width;
    F total = zero();
    for (int64_t j = 0; j < p.width; j += kLanes) {
      const F x = load_part(c + j, p.width - j);
      total = fma(x, x, total);
    }
    p.half_norms[code] = 0.5f * sum(total);
  }
}

DALLE_INLINE F broadcast_value(const float* p) { return broadcast(p); }
DALLE_INLINE F broadcast_value(const bf16* p) { return as_float(set(uint32_t(p->bits) << 16)); }

// The best of Codes codes from `code` for Vectors vectors of rows; features [words, kRowTile] transposed.
template <class P, class T, int Codes, int Vectors>
DALLE_INLINE void compare(const Vq& p, const Word* features, int64_t code, F best[], U best_code[]) {
  const T* c = (const T*)p.codebook + code * p.width;
  F score[Codes][Vectors];
  DALLE_UNROLL for (int i = 0; i < Codes; i++)
    DALLE_UNROLL for (int j = 0; j < Vectors; j++) score[i][j] = set(-p.half_norms[code + i]);
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
  DALLE_UNROLL for (int i = 0; i < Codes; i++)
    DALLE_UNROLL for (int j = 0; j < Vectors; j++) {
      const Mask wins = greater(score[i][j], best[j]);
      best[j] = select(wins, score[i][j], best[j]);
      best_code[j] = select(wins, set(uint32_t(code + i)), best_code[j]);
    }
}

template <class T>
void vq_forward(const Vq& p, int64_t row, int64_t row_end, void* scratch) {
  using P = typename ProductOf<T>::Type;
  constexpr int64_t kGroup = kBlockVectors * kLanes;  // rows that one walk over the codebook serves
  Word* features = (Word*)scratch;
  for (; row < row_end; row += kGroup) {
    const int64_t count = row_end - row < kGroup ? row_end - row : kGroup;
    std::memset(features, 0, size_t(padded(p.width) * kRowTile) * sizeof(Word));
    for (int64_t r = 0; r < count; r++) {
      const T* f = (const T*)p.features + (row + r) * p.width;
      for (int64_t d = 0; d < p.width; d++)
        if constexpr (P::kDepth == 1) ((float*)features)[d * kRowTile + r] = to_float(f[d]);
        else ((bf16*)(features + d / 2 * kRowTile + r))[d & 1] = f[d];
    }
    F best[kBlockVectors];
    U best_code[kBlockVectors];
    for (int j = 0; j < kBlockVectors; j++) best[j] = set(-INFINITY), best_code[j] = set(0u);
    int64_t code = 0;
    for (; code + kBlockRows <= p.codes; code += kBlockRows)
      compare<P, T, kBlockRows, kBlockVectors>(p, features, code, best, best_code);
    for (; code < p.codes; code++) compare<P, T, 1, kBlockVectors>(p, features, code, best, best_code);

    uint32_t chosen[kGroup];
    for (int j = 0; j < kBlockVectors; j++) store(chosen + j * kLanes, best_code[j]);
    for (int64_t r = 0; r < count; r++) {
      const T* f = (const T*)p.features + (row + r) * p.width;
      const T* c = (const T*)p.codebook + int64_t(chosen[r]) * p.width;
      F total = zero();
      for (int64_t j = 0; j < p.width; j += kLanes) {
        const F difference = load_part(f + j, p.width - j) - load_part(c + j, p.width - j);
        total = fma(difference, difference, total);
      }
      p.indices[row + r] = chosen[r];
      p.squared_distance[row + r] = sum(total);
    }
  }
}

template <class T>
void vq_grad_features(const VqBackward& p, int64_t row, int64_t row_end) {
  for (; row < row_end; row++) {
    const T* f = (const T*)p.features + row * p.width;
    const T* c = (const T*)p.codebook + p.indices[row] * p.width;
    T* out = (T*)p.grad_features + row * p.width;
    const F factor = set(2.f * p.grad[row]);
    for (int64_t j = 0; j < p.width; j += kLanes) {
      const int left = p.width - j < kLanes ? int(p.width - j) : kLanes;
      store(out + j, factor * (load(f + j, left) - load(c + j, left)), left);
    }
  }
}

// Adds up term(row, j, left), the share of a row in columns j .., over the rows of each code, in ascending order.
template <class T, class Term>
DALLE_INLINE void gather_codes(const VqBackward& p, int64_t code, int64_t code_end, Term term) {
  for (; code < code_end; code++)
    for (int64_t j = 0; j < p.width; j += kLanes) {
      const int left = p.width - j < kLanes ? int(p.width - j) : kLanes;
      F total = zero();
      for (int64_t m = p.starts[code]; m < p.starts[code + 1]; m++) total = total + term(p.members[m], j, left);
      store((T*)p.grad_codebook + code * p.width + j, total, left);
    }
}

template <class T>
void vq_grad_codebook(const VqBackward& p, int64_t code, int64_t code_end) {
  for (; code < code_end; code++)
    gather_codes<T>(p, code, code + 1, [&](int64_t row, int64_t j, int left) {
      const F c = load((const T*)p.codebook + code * p.width + j, left);
      return set(2.f * p.grad[row]) * (c - load((const T*)p.features + row * p.width + j, left));
    });
}

template <class T>
void scatter_rows(const void* grad, const VqBackward& p, int64_t code, int64_t code_end) {
  gather_codes<T>(p, code, code_end,
                  [&](int64_t row, int64_t j, int left) { return load((const T*)grad + row * p.width + j, left); });
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
