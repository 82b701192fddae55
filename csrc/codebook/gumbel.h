// gumbel_lookup on the CPU: softmax((logits + g) / tau) @ codebook in one pass over the logits, and its gradients.
//
// Forward. A task owns some rows and walks the codebook in tiles of 4 x 32 codes, 32 in each quarter, so that a noise
// counter feeds all four. Per tile: scores = logits + g for every row; their running maximum m; the two softmax sums
// relative to it, of (logits + g) / tau and, for the KL, of the logits themselves; then probabilities @ codebook for
// all the rows at once, out of registers. One maximum serves both softmaxes: g > -2.83, so logits - m < 2.83, and
// g < 16.7, so the largest of them is not far below. When m grows (about log K times a row) the sums are rescaled.
//
// Backward. A task owns a tile of codes and walks the rows, so the codebook's gradient has one writer and one order of
// addition. With y the mixture's weights, regenerated, p = softmax(logits) and d = dL codebook^T:
//     dlogits = y (d - dL . mixture) / tau + dKL p (log p + H(p)),   dcodebook = y^T dL.
//
// Inside, exponentials and sums are in base 2.
#pragma once

#include "codebook/kernels.h"
#include "noise.h"
#include "codebook/product.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

constexpr float kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f;
constexpr float kLowestLogit = -FLT_MAX;    // a row with none as great has no distribution: its kl is NaN
constexpr int kTileVectors = int(kCounterTile) / kLanes;
constexpr int kNoiseVectors = kLanes == 16 ? 2 : 1;  // as many as registers hold
constexpr uint32_t kGumbelStream = 0;

// The codes of tile `tile`: part l, 0 <= l < 4, is first[l] .. first[l] + count[l] - 1. With noise part l lies in
// quarter l, and its codes take word l of the counters from `counter`; without, the four parts follow one another.
struct Tile {
  int64_t first[4];
  int count[4];
  uint32_t counter;
  bool full;

  Tile(const Gumbel& p, int64_t tile) : counter(uint32_t(tile * kCounterTile)), full(true) {
    for (int l = 0; l < 4; l++) {
      first[l] = p.noise ? l * p.quarter() + tile * kCounterTile : tile * kCodeTile + l * kCounterTile;
      const int64_t end = p.noise && (l + 1) * p.quarter() < p.codes ? (l + 1) * p.quarter() : p.codes;
      const int64_t left = end - first[l];
      count[l] = int(left < 0 ? 0 : left < kCounterTile ? left : kCounterTile);
      full = full && count[l] == kCounterTile;
    }
  }
};

// A tile's logits and scores of one row: [l][j] holds codes first[l] + j kLanes ..; past the end, -inf.
template <bool Noise, bool Full, class T>
DALLE_INLINE void load_scores(const T* logits, const Tile& tile, const NoiseKeys& keys, const NoiseRow& noise,
                              F clean[4][kTileVectors], F noisy[4][kTileVectors]) {
  U words[kTileVectors][4];
  if constexpr (Noise) {
    DALLE_UNROLL for (int j = 0; j < kTileVectors; j += kNoiseVectors)
      noise_words<kNoiseVectors>(keys, noise, tile.counter + uint32_t(j * kLanes), words + j);
  }
  DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) {
    DALLE_UNROLL for (int l = 0; l < 4; l++) {
      const T* from = logits + tile.first[l] + j * kLanes;
      if constexpr (Full) {
        clean[l][j] = load(from);
        prefetch(from + kCounterTile);
      } else {
        const int left = tile.count[l] - j * kLanes, n = left < 0 ? 0 : left < kLanes ? left : kLanes;
        clean[l][j] = select(first(n), load(n > 0 ? from : logits, n), set(-INFINITY));
      }
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
static_assert(sizeof(RowState) <= 256);

template <class T>
struct GumbelForwardKernel {
  using P = typename ProductOf<T>::Type;
  static constexpr int kRowWords = int(kCodeTile) / P::kDepth;

  const GumbelForward& p;
  const NoiseKeys keys;
  const float scale;      // of a score, to base 2 and by temperature
  const int64_t columns;  // padded width
  float* probabilities;   // [kRowTile, kCodeTile] T's, or floats, as P wants
  float* sums;            // [kRowTile, columns]
  RowState* states;       // [kRowTile]

  GumbelForwardKernel(const GumbelForward& problem, void* scratch)
      : p(problem), keys(problem.seed), scale(kLog2E / problem.temperature), columns(padded(problem.width)) {
    states = (RowState*)scratch;
    probabilities = (float*)((char*)scratch + kRowTile * 256);
    sums = probabilities + kRowTile * kCodeTile;
  }

  // The row's maximum grew: everything summed so far is rescaled to the new one.
  void raise(RowState& state, float* sum, const Tile& tile, const F noisy[4][kTileVectors], float top) {
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

  template <bool Noise, bool Full>
  void score(const Tile& tile, int64_t row, int count) {
    for (int r = 0; r < count; r++) {
      F clean[4][kTileVectors], noisy[4][kTileVectors];
      load_scores<Noise, Full>((const T*)p.logits + (row + r) * p.logits_stride, tile, keys,
                               NoiseRow(keys, uint64_t(row + r), kGumbelStream), clean, noisy);
      RowState& state = states[r];
      F top = noisy[0][0];
      DALLE_UNROLL for (int l = 0; l < 4; l++)
        DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) top = max(top, noisy[l][j]);
      // Tiles with noise do not come in the order of codes, so an equal score may be the first one after all.
      if (__builtin_expect(any(greater_equal(top, set(state.top))), 0))
        raise(state, sums + r * columns, tile, noisy, largest(top));

      // Differences first: products of large scores, or with a large 1 / tau, would be rounded by more than they differ.
      const F shift = set(state.top);
      F noisy_sum = state.noisy, clean_sum = state.clean, moment = state.moment;
      DALLE_UNROLL for (int l = 0; l < 4; l++)
        DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) {
          const F weight = exp2_or_zero((noisy[l][j] - shift) * set(scale));
          noisy_sum = noisy_sum + weight;
          const int64_t at = r * kCodeTile + l * kCounterTile + j * kLanes;
          if constexpr (P::kDepth == 1) store(probabilities + at, weight);
          else store((bf16*)probabilities + at, weight);
          const F exponent = max(set(kZeroExponent), (clean[l][j] - shift) * set(kLog2E));
          const F share = exp2_bounded(exponent);
          clean_sum = clean_sum + share;
          moment = fma(share, exponent, moment);
        }
      state.noisy = noisy_sum, state.clean = clean_sum, state.moment = moment;
    }
  }

  void multiply(int64_t tile, int count) {
    product<P>({(const Word*)probabilities, kRowWords, 1}, p.packed + tile * kRowWords * columns, sums, columns, count,
               columns, kRowWords, true);
  }

  void finish(int64_t row, int count) {
    for (int r = 0; r < count; r++) {
      const RowState& state = states[r];
      const bool empty = state.best == p.codes;
      const float noisy = empty ? NAN : sum(state.noisy), clean = empty ? NAN : sum(state.clean);
      const int64_t n = row + r, best = empty ? 0 : state.best;
      p.indices[n] = best;
      p.maximum[n] = state.top;
      p.log_noisy[n] = __builtin_logf(noisy);
      p.log_clean[n] = __builtin_logf(clean);
      p.kl[n] = __builtin_logf(float(p.codes)) + kLn2 * (sum(state.moment) / clean) - __builtin_logf(clean);
      const F factor = set(1.f / noisy);
      const T* sampled = (const T*)p.codebook + best * p.width;
      T* latents = (T*)p.latents + n * p.width;
      for (int64_t j = 0; j < p.width; j += kLanes) {
        const int left = p.width - j < kLanes ? int(p.width - j) : kLanes;
        const F mixed = load(sums + r * columns + j) * factor;
        if (p.mixture != nullptr) store(p.mixture + n * p.width + j, mixed, left);
        store(latents + j, p.mixture != nullptr ? load(sampled + j, left) : mixed, left);
      }
    }
  }

  void run(int64_t row, int64_t row_end) {
    for (; row < row_end; row += kRowTile) {
      const int count = int(row_end - row < kRowTile ? row_end - row : kRowTile);
      std::memset(sums, 0, size_t(count) * size_t(columns) * sizeof(float));
      const RowState fresh{zero(), zero(), zero(), kLowestLogit, p.codes};
      for (int r = 0; r < count; r++) states[r] = fresh;
      for (int64_t t = 0; t < p.tiles(); t++) {
        const Tile tile(p, t);
        if (p.noise) tile.full ? score<true, true>(tile, row, count) : score<true, false>(tile, row, count);
        else tile.full ? score<false, true>(tile, row, count) : score<false, false>(tile, row, count);
        multiply(t, count);
      }
      finish(row, count);
    }
  }
};

// The codebook as the products read it, tile by tile: once for all rows and threads.
template <class T>
void gumbel_pack(const GumbelForward& p, int64_t t, int64_t tile_end) {
  using P = typename ProductOf<T>::Type;
  constexpr int kRowWords = int(kCodeTile) / P::kDepth, kPartWords = int(kCounterTile) / P::kDepth;
  for (; t < tile_end; t++) {
    const Tile tile(p, t);
    for (int l = 0; l < 4; l++)
      pack_rows<P>((const T*)p.codebook + tile.first[l] * p.width, tile.count[l], p.width,
                   p.packed + t * kRowWords * padded(p.width), l * kPartWords, kPartWords, kRowWords);
  }
}

template <class T>
void gumbel_forward(const GumbelForward& problem, int64_t row, int64_t row_end, void* scratch) {
  GumbelForwardKernel<T>(problem, scratch).run(row, row_end);
}

// The latents' gradient in the two forms that the products of the backward pass read (by rows, and packed as the
// right-hand side for each tile of rows), and its product with the mixture.
template <class T>
void gumbel_prepare(const GumbelBackward& p, int64_t row_tile, int64_t row_tile_end) {
  using P = typename ProductOf<T>::Type;
  const int64_t columns = padded(p.width);
  const T* grad = (const T*)p.grad_latents;
  for (; row_tile < row_tile_end; row_tile++) {
    const int64_t begin = row_tile * kRowTile, end = begin + kRowTile < p.rows ? begin + kRowTile : p.rows;
    for (int64_t n = begin; n < end; n++) {
      F total = zero();
      Word* by_rows = p.grad_by_rows + n * (columns / P::kDepth);
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int left = int(p.width - j < 0 ? 0 : p.width - j < kLanes ? p.width - j : kLanes);
        const int64_t at = n * p.width + (left > 0 ? j : 0);
        const F g = load(grad + at, left);
        total = fma(g, p.mixture != nullptr ? load(p.mixture + at, left) : load((const T*)p.latents + at, left), total);
        if constexpr (P::kDepth == 1) store((uint32_t*)by_rows + j, as_words(g));
        else store((bf16*)by_rows + j, g);
      }
      p.delta[n] = sum(total);
    }
    const int64_t steps = (end - begin + P::kDepth - 1) / P::kDepth;
    pack_rows<P>(grad + begin * p.width, end - begin, p.width, p.grad_packed + begin / P::kDepth * columns, 0, steps, steps);
  }
}

template <class T>
struct GumbelBackwardKernel {
  using P = typename ProductOf<T>::Type;

  const GumbelBackward& p;
  const NoiseKeys keys;
  const float scale, log_codes;
  const int64_t columns;
  Word* transposed;      // [columns / depth, kCodeTile]: the tile of the codebook
  float* code_gradient;  // [kCodeTile, columns]
  float* products;       // [kRowTile, kCodeTile]: dL codebook^T
  Word* weights;         // [kRowTile / depth, kCodeTile]: y, pairs of rows where P wants pairs

  GumbelBackwardKernel(const GumbelBackward& problem, void* scratch)
      : p(problem), keys(problem.seed), scale(kLog2E / problem.temperature),
        log_codes(__builtin_logf(float(problem.codes))), columns(padded(problem.width)) {
    transposed = (Word*)scratch;
    code_gradient = (float*)(transposed + kCodeTile * columns);
    products = code_gradient + kCodeTile * columns;
    weights = (Word*)(products + kRowTile * kCodeTile);
  }

  void transpose(const Tile& tile) {
    static_assert(kCodeTile % kBlockColumns == 0);
    constexpr int64_t kStep = kBlockColumns;
    const T* codebook = (const T*)p.codebook;
    std::memset(transposed, 0, size_t(columns / P::kDepth * kCodeTile) * sizeof(Word));
    for (int l = 0; l < 4; l++)
      for (int i = 0; i < tile.count[l]; i++) {
        const T* from = codebook + (tile.first[l] + i) * p.width;
        Word* to = transposed + packed_at(0, l * kCounterTile + i, kCodeTile, columns / P::kDepth);
        if constexpr (P::kDepth == 1) {
          for (int64_t d = 0; d < p.width; d++) ((float*)to)[d * kStep] = to_float(from[d]);
        } else {
          for (int64_t d = 0; d < p.width; d++) ((bf16*)(to + d / 2 * kStep))[d & 1] = from[d];
        }
      }
  }

  // The gradient of the logits for one row and tile; returns the weights in y.
  template <bool Noise, bool Full, bool Latents, bool Kl>
  inline __attribute__((always_inline)) void row_gradient(const Tile& tile, int64_t n, const float* product_row, F y[4][kTileVectors]) {
    F clean[4][kTileVectors], noisy[4][kTileVectors];
    load_scores<Noise, Full>((const T*)p.logits + n * p.logits_stride, tile, keys,
                             NoiseRow(keys, uint64_t(n), kGumbelStream), clean, noisy);
    T* out = (T*)p.grad_logits + n * p.codes;
    const float grad_kl = Kl ? p.grad_kl[n] : 0.f;
    const F top = set(p.maximum[n]), noisy_shift = set(-p.log_noisy[n] * kLog2E), clean_shift = set(-p.log_clean[n] * kLog2E);
    const F delta = set(Latents ? p.delta[n] : 0.f), inverse = set(1.f / p.temperature);
    const F slope = set(grad_kl * kLn2), offset = set(grad_kl * (log_codes - p.kl[n]));
    DALLE_UNROLL for (int l = 0; l < 4; l++)
      DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) {
        F gradient = zero();
        y[l][j] = zero();
        if constexpr (Latents) {
          // The maximum comes off first, exactly: scores may be so large that log K is lost in their rounding.
          const F weight = exp2_or_zero(fma(noisy[l][j] - top, set(scale), noisy_shift));
          const F difference = load(product_row + l * kCounterTile + j * kLanes) - delta;
          gradient = weight * inverse * difference;
          y[l][j] = weight;
        }
        if constexpr (Kl) {
          const F exponent = max(set(kZeroExponent), min(zero(), fma(clean[l][j] - top, set(kLog2E), clean_shift)));
          gradient = fma(exp2_bounded(exponent), fma(exponent, slope, offset), gradient);
        }
        T* to = out + tile.first[l] + j * kLanes;
        const int left = tile.count[l] - j * kLanes;
        if (Full || left >= kLanes) store(to, gradient);
        else if (left > 0) store(to, gradient, left);
      }
  }

  template <bool Noise, bool Full, bool Latents, bool Kl>
  void rows_gradient(const Tile& tile, int64_t row, int count) {
    for (int r = 0; r < count; r += P::kDepth) {
      F y[P::kDepth][4][kTileVectors];
      DALLE_UNROLL for (int i = 0; i < P::kDepth; i++) {
        if (r + i < count) {
          row_gradient<Noise, Full, Latents, Kl>(tile, row + r + i, products + (r + i) * kCodeTile, y[i]);
        } else {
          DALLE_UNROLL for (int l = 0; l < 4; l++)
            DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) y[i][l][j] = zero();
        }
      }
      uint32_t* to = (uint32_t*)weights + r / P::kDepth * kCodeTile;
      DALLE_UNROLL for (int l = 0; l < 4; l++)
        DALLE_UNROLL for (int j = 0; j < kTileVectors; j++, to += kLanes) {
          if constexpr (P::kDepth == 1) store(to, as_words(y[0][l][j]));
          else store(to, pair(y[0][l][j], y[1][l][j]));
        }
    }
  }

  template <bool Noise, bool Latents, bool Kl>
  void rows_gradient(const Tile& tile, int64_t row, int count) {
    tile.full ? rows_gradient<Noise, true, Latents, Kl>(tile, row, count)
              : rows_gradient<Noise, false, Latents, Kl>(tile, row, count);
  }

  template <bool Kl>
  void noisy_rows_gradient(const Tile& tile, int64_t row, int count) {
    p.noise ? rows_gradient<true, true, Kl>(tile, row, count) : rows_gradient<false, true, Kl>(tile, row, count);
  }

  void task(int64_t index) {
    const Tile tile(p, index % p.tiles());
    const int64_t split = index / p.tiles(), begin = split * p.split_rows();
    const int64_t end = begin + p.split_rows() < p.rows ? begin + p.split_rows() : p.rows;
    const bool has_latents = p.grad_latents != nullptr, has_codebook = has_latents && p.grad_codebook != nullptr;
    if (has_latents) transpose(tile);
    if (has_codebook) std::memset(code_gradient, 0, size_t(kCodeTile * columns) * sizeof(float));
    for (int64_t row = begin; row < end; row += kRowTile) {
      const int count = int(end - row < kRowTile ? end - row : kRowTile);
      if (has_latents)
        product<P>({p.grad_by_rows + row * (columns / P::kDepth), columns / P::kDepth, 1}, transposed, products,
                   kCodeTile, count, kCodeTile, int(columns) / P::kDepth, false);
      if (!has_latents) rows_gradient<false, false, true>(tile, row, count);
      else if (p.grad_kl == nullptr) noisy_rows_gradient<false>(tile, row, count);
      else noisy_rows_gradient<true>(tile, row, count);
      if (has_codebook)
        product<P>({weights, 1, kCodeTile}, p.grad_packed + row / P::kDepth * columns, code_gradient, columns, kCodeTile,
                   columns, (count + P::kDepth - 1) / P::kDepth, true);
    }
    if (!has_codebook) return;
    for (int l = 0; l < 4; l++)
      for (int i = 0; i < tile.count[l]; i++) {
        const float* from = code_gradient + (l * kCounterTile + i) * columns;
        const int64_t code = tile.first[l] + i;
        if (p.splits > 1) std::memcpy(p.partial + (split * p.codes + code) * columns, from, size_t(columns) * sizeof(float));
        else put(from, code);
      }
  }

  void put(const float* from, int64_t code) {
    T* to = (T*)p.grad_codebook + code * p.width;
    for (int64_t j = 0; j < p.width; j += kLanes)
      store(to + j, load(from + j), p.width - j < kLanes ? int(p.width - j) : kLanes);
  }
};

template <class T>
void gumbel_backward(const GumbelBackward& problem, int64_t task, int64_t task_end, void* scratch) {
  GumbelBackwardKernel<T> kernel(problem, scratch);
  for (; task < task_end; task++) kernel.task(task);
}

template <class T>
void gumbel_collect(const GumbelBackward& p, int64_t code, int64_t code_end) {
  const int64_t columns = padded(p.width);
  for (; code < code_end; code++)
    for (int64_t j = 0; j < p.width; j += kLanes) {
      F total = zero();
      for (int64_t split = 0; split < p.splits; split++)
        total = total + load(p.partial + (split * p.codes + code) * columns + j);
      store((T*)p.grad_codebook + code * p.width + j, total, p.width - j < kLanes ? int(p.width - j) : kLanes);
    }
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
