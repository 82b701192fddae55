// gumbel_lookup on the CPU: softmax((logits + g) / tau) @ codebook in one pass over the logits, and its gradients.
//
// Forward. A task owns some rows and walks the codebook in tiles. Per tile: scores = logits + g for every row and what
// softmax.h makes of them; then probabilities @ codebook for all the rows at once, out of registers.
//
// Backward. A task owns a tile of codes and walks the rows, so the codebook's gradient has one writer and one order of
// addition. With y the mixture's weights, regenerated, p = softmax(logits) and d = dL codebook^T:
//     dlogits = y (d - dL . mixture) / tau + dKL p (log p + H(p)),   dcodebook = y^T dL.
#pragma once

#include "codebook/kernels.h"
#include "codebook/product.h"
#include "codebook/softmax.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

// A tile's logits and scores of one row; past the end of the codebook they are -inf.
template <bool Noise, bool Full, class T>
DALLE_INLINE void load_row(const T* logits, const Tile& tile, const NoiseKeys& keys, const NoiseRow& noise, TileRow& clean,
                           TileRow& noisy) {
  load_scores<Noise>(
      tile, keys, noise,
      [&](int l, int j) __attribute__((always_inline)) {
        const T* from = logits + tile.first[l] + j * kLanes;
        if constexpr (Full) {
          prefetch(from + kCounterTile);
          return load(from);
        } else {
          const int left = tile.count[l] - j * kLanes, n = left < 0 ? 0 : left < kLanes ? left : kLanes;
          return select(first(n), load(n > 0 ? from : logits, n), set(-INFINITY));
        }
      },
      clean, noisy);
}

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
    probabilities = (float*)((char*)scratch + kRowTile * kRowStateBytes);
    sums = probabilities + kRowTile * kCodeTile;
  }

  template <bool Noise, bool Full>
  void score(const Tile& tile, int64_t row, int count) {
    for (int r = 0; r < count; r++) {
      TileRow clean, noisy;
      load_row<Noise, Full>((const T*)p.logits + (row + r) * p.logits_stride, tile, keys,
                            NoiseRow(keys, p.first_row + uint64_t(row + r), kGumbelStream), clean, noisy);
      RowState& state = states[r];
      const F top = largest_score(noisy);
      // Tiles with noise do not come in the order of codes, so an equal score may be the first one after all.
      if (__builtin_expect(any(greater_equal(top, set(state.top))), 0))
        raise(p, state, sums + r * columns, columns, scale, tile, noisy, largest(top));
      const int64_t at = r * kCodeTile;
      add_up(state, scale, clean, noisy, [&](int l, int j, F weight) __attribute__((always_inline)) {
        put_word<P>(probabilities, at + l * kCounterTile + j * kLanes, weight);
      });
    }
  }

  void multiply(int64_t tile, int count) {
    product<P>({(const Word*)probabilities, kRowWords, 1}, p.packed + tile * kRowWords * columns, sums, columns, count,
               columns, kRowWords, true);
  }

  void finish(int64_t row, int count) {
    for (int r = 0; r < count; r++) {
      const RowState& state = states[r];
      const int64_t n = row + r;
      const RowTotal total = finish_row(p, n, {sum(state.noisy), sum(state.clean), sum(state.moment), state.top, state.best});
      const F factor = set(1.f / total.noisy);
      const T* sampled = (const T*)p.codebook + total.best * p.width;
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
      for (int r = 0; r < count; r++) states[r] = fresh_row(p);
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
      pack_rows<P>((const T*)p.codebook + tile.first[l] * p.width, tile.count[l], p.width, p.width,
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
    pack_rows<P>(grad + begin * p.width, end - begin, p.width, p.width, p.grad_packed + begin / P::kDepth * columns, 0, steps, steps);
  }
}

// What a walk over the rows makes: dlogits, through the latents, kl or both; the weights y where there are latents.
struct Walk {
  bool latents, kl, logits = true;
};

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
  template <bool Noise, bool Full, Walk kWalk>
  DALLE_METHOD void row_gradient(const Tile& tile, int64_t n, const float* product_row, TileRow& y) {
    TileRow clean, noisy;
    load_row<Noise, Full>((const T*)p.logits + n * p.logits_stride, tile, keys,
                          NoiseRow(keys, p.first_row + uint64_t(n), kGumbelStream), clean, noisy);
    T* out = (T*)p.grad_logits + n * p.codes;
    const float grad_kl = kWalk.kl ? p.grad_kl[n] : 0.f;
    const RowShift row(p, n);
    const F delta = set(kWalk.latents && kWalk.logits ? p.delta[n] : 0.f), inverse = set(1.f / p.temperature);
    const F slope = set(grad_kl * kLn2), offset = set(grad_kl * (log_codes - p.kl[n]));
    DALLE_UNROLL for (int l = 0; l < 4; l++)
      DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) {
        F gradient = zero();
        y[l][j] = zero();
        if constexpr (kWalk.latents) y[l][j] = row.weight(noisy[l][j], scale);
        if constexpr (!kWalk.logits) continue;
        if constexpr (kWalk.latents)
          gradient = y[l][j] * inverse * (load(product_row + l * kCounterTile + j * kLanes) - delta);
        if constexpr (kWalk.kl) {
          const F exponent = row.exponent(clean[l][j]);
          gradient = fma(exp2_bounded(exponent), fma(exponent, slope, offset), gradient);
        }
        T* to = out + tile.first[l] + j * kLanes;
        const int left = tile.count[l] - j * kLanes;
        if (Full || left >= kLanes) store(to, gradient);
        else if (left > 0) store(to, gradient, left);
      }
  }

  template <bool Noise, bool Full, Walk kWalk>
  void rows_gradient(const Tile& tile, int64_t row, int count) {
    for (int r = 0; r < count; r += P::kDepth) {
      TileRow y[P::kDepth];
      DALLE_UNROLL for (int i = 0; i < P::kDepth; i++) {
        if (r + i < count) {
          row_gradient<Noise, Full, kWalk>(tile, row + r + i, products + (r + i) * kCodeTile, y[i]);
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

  template <bool Noise, Walk kWalk>
  void rows_gradient(const Tile& tile, int64_t row, int count) {
    tile.full ? rows_gradient<Noise, true, kWalk>(tile, row, count) : rows_gradient<Noise, false, kWalk>(tile, row, count);
  }

  template <Walk kWalk>
  void noisy_rows_gradient(const Tile& tile, int64_t row, int count) {
    p.noise ? rows_gradient<true, kWalk>(tile, row, count) : rows_gradient<false, kWalk>(tile, row, count);
  }

  void task(int64_t index) {
    const Tile tile(p, index % p.tiles());
    const int64_t split = index / p.tiles(), begin = split * p.split_rows();
    const int64_t end = begin + p.split_rows() < p.rows ? begin + p.split_rows() : p.rows;
    const bool has_latents = p.grad_latents != nullptr, has_codebook = has_latents && p.grad_codebook != nullptr;
    const bool has_logits = p.grad_logits != nullptr;
    if (has_latents && has_logits) transpose(tile);
    if (has_codebook) std::memset(code_gradient, 0, size_t(kCodeTile * columns) * sizeof(float));
    for (int64_t row = begin; row < end; row += kRowTile) {
      const int count = int(end - row < kRowTile ? end - row : kRowTile);
      if (has_latents && has_logits)
        product<P>({p.grad_by_rows + row * (columns / P::kDepth), columns / P::kDepth, 1}, transposed, products,
                   kCodeTile, count, kCodeTile, int(columns) / P::kDepth, false);
      if (!has_logits) noisy_rows_gradient<Walk{true, false, false}>(tile, row, count);
      else if (!has_latents) rows_gradient<false, Walk{false, true}>(tile, row, count);
      else if (p.grad_kl == nullptr) noisy_rows_gradient<Walk{true, false}>(tile, row, count);
      else noisy_rows_gradient<Walk{true, true}>(tile, row, count);
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
