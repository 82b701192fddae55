// gumbel_projection_lookup on the CPU: softmax((features W^T + bias + g) / tau) @ codebook straight from features, and
// its gradients. Logits exist a tile of codes and rows at a time, or for one strip of rows.
//
// Forward. A task owns a run of tiles of codes and walks the strip's rows: scores out of a product, what softmax.h
// makes of them, and where the mixture is asked for, probabilities @ codebook. Rows then add up what the tasks
// gathered. For the mean distribution the strip's logits stay until their sums are known.
//
// Backward. With y the mixture's weights, p = softmax(logits), d = dL codebook^T, G the derivative by the mean
// distribution and N rows,
//     dlogits = y (d - y . d) / tau + p (G - p . G) / N + dKL p (log p + H(p)).
// A first walk over the strip makes all of it but the two products with whole rows, y . d and p . G, and adds those up;
// so neither the forward pass need keep the mixture, nor a third walk make the scores again. A second walk has
//     dfeatures = dlogits W,   dW = dlogits^T features,   dcodebook = y^T dL.
// A code's gradients have one writer, those of features one for each run of tiles.
#pragma once

#include "codebook/kernels.h"
#include "codebook/product.h"
#include "codebook/softmax.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

static_assert(kCodeTile % kBlockColumns == 0);

template <class T>
void spread(const Spread& p, int64_t row_tile, int64_t row_tile_end) {
  using P = typename ProductOf<T>::Type;
  const int64_t columns = padded(p.width), words = columns / P::kDepth;
  for (; row_tile < row_tile_end; row_tile++) {
    const int64_t begin = row_tile * kRowTile, end = begin + kRowTile < p.rows ? begin + kRowTile : p.rows;
    const T* rows = (const T*)p.table + begin * p.stride;
    for (int64_t n = begin; n < end; n++)
      for (int64_t j = 0; j < words; j += kLanes) {
        const F x = load_words<P>((const T*)p.table + n * p.stride, j, p.width);
        float* to = (float*)p.by_rows + n * words + j;
        words - j < kLanes ? store(to, x, int(words - j)) : store(to, x);
      }
    const int64_t steps = (end - begin + P::kDepth - 1) / P::kDepth;
    if (p.packed != nullptr)
      pack_rows<P>(rows, end - begin, p.width, p.stride, p.packed + begin / P::kDepth * columns, 0, steps, steps);
  }
}

// What both passes have of a tile: its rows of a table, as either side of a product; its biases.
template <class P, class T>
struct ProjectionTile {
  const Projection& p;
  const Tile tile;

  // [padded width / depth, kCodeTile]: the right-hand side of rows @ table^T.
  void columns_of(const void* table, int64_t width, Word* packed) const {
    for (int l = 0; l < 4; l++)
      pack_columns<P>((const T*)table + tile.first[l] * width, tile.count[l], width, packed, l * kCounterTile,
                      kCounterTile, kCodeTile);
  }
  // [kCodeTile / depth, padded width]: that of weights @ table.
  void rows_of(const void* table, int64_t width, Word* packed) const {
    constexpr int kSteps = int(kCounterTile) / P::kDepth;
    for (int l = 0; l < 4; l++)
      pack_rows<P>((const T*)table + tile.first[l] * width, tile.count[l], width, width, packed, l * kSteps, kSteps,
                   4 * kSteps);
  }
  // -inf past the end of the codebook.
  void biases(float* to) const {
    for (int l = 0; l < 4; l++)
      for (int i = 0; i < int(kCounterTile); i++)
        to[l * kCounterTile + i] = i >= tile.count[l]   ? -INFINITY
                                   : p.bias != nullptr ? to_float(((const T*)p.bias)[tile.first[l] + i])
                                                       : 0.f;
  }
  // body(place in the tile, code) for stretches of codes of at most a vector, with how many they are.
  template <class Body>
  DALLE_METHOD void stretches(Body body) const {
    for (int l = 0; l < 4; l++)
      for (int i = 0; i < tile.count[l]; i += kLanes)
        body(l * kCounterTile + i, tile.first[l] + i, tile.count[l] - i < kLanes ? tile.count[l] - i : kLanes);
  }
};

template <class P>
DALLE_INLINE void scores_of(const Projection& p, int64_t row, int count, const Word* weight, float* scores) {
  const int64_t depth = padded(p.channels) / P::kDepth;
  product<P>({p.feature_rows + row * depth, depth, 1}, weight, scores, kCodeTile, count, kCodeTile, int(depth), false);
}

template <class T>
struct ProjectionForwardKernel {
  using P = typename ProductOf<T>::Type;
  static constexpr int kRowWords = int(kCodeTile) / P::kDepth;

  const ProjectionForward& p;
  const NoiseKeys keys;
  const float scale;
  const int64_t columns;
  RowState* states;      // [kMostRows]
  Word *weight, *mixed;  // the tile of the weight and of the codebook
  float *biases, *scores, *probabilities;

  ProjectionForwardKernel(const ProjectionForward& problem, void* scratch)
      : p(problem), keys(problem.seed), scale(kLog2E / problem.temperature), columns(padded(problem.width)) {
    states = (RowState*)scratch;
    weight = (Word*)((char*)scratch + Projection::kMostRows * kRowStateBytes);
    mixed = weight + kCodeTile * padded(p.channels);
    biases = (float*)(mixed + kCodeTile * columns);
    scores = biases + kCodeTile;
    probabilities = scores + kRowTile * kCodeTile;
  }

  template <bool Noise>
  void enter(const Tile& tile, int64_t row, int count, float* logits, float* sums) {
    const bool keep = p.logits != nullptr;
    for (int r = 0; r < count; r++) {
      TileRow clean, noisy;
      float* its = logits + r * kCodeTile;
      const auto at = [=, biases = biases](int l, int j) __attribute__((always_inline)) {
        const int place = l * int(kCounterTile) + j * kLanes;
        const F logit = load(its + place) + load(biases + place);
        if (keep) store(its + place, logit);
        return logit;
      };
      load_scores<Noise>(tile, keys, NoiseRow(keys, p.first_row + uint64_t(p.begin + row + r), kGumbelStream), at, clean, noisy);
      RowState& state = states[row + r];
      const F top = largest_score(noisy);
      if (__builtin_expect(any(greater_equal(top, set(state.top))), 0))
        raise(p, state, sums + r * columns, sums == nullptr ? 0 : columns, scale, tile, noisy, largest(top));
      const int64_t place = r * kCodeTile;
      add_up(state, scale, clean, noisy,
             [=, to = probabilities](int l, int j, F share) __attribute__((always_inline)) {
               if (sums != nullptr) put_word<P>(to, place + l * kCounterTile + j * kLanes, share);
             });
    }
  }

  void split(int64_t index) {
    const int64_t strip = p.strip();
    float* all_sums = p.sums == nullptr ? nullptr : p.sums + index * strip * columns;
    if (all_sums != nullptr) std::memset(all_sums, 0, size_t(strip * columns) * sizeof(float));
    for (int64_t r = 0; r < strip; r++) states[r] = fresh_row(p);
    for (int64_t t = p.first_tile(index); t < p.first_tile(index + 1); t++) {
      const ProjectionTile<P, T> codes{p, Tile(p, t)};
      codes.columns_of(p.weight, p.channels, weight);
      codes.biases(biases);
      if (all_sums != nullptr) codes.rows_of(p.codebook, p.width, mixed);
      for (int64_t row = 0; row < strip; row += kRowTile) {
        const int count = int(strip - row < kRowTile ? strip - row : kRowTile);
        float* logits = p.logits == nullptr ? scores : p.logits + (t * strip + row) * kCodeTile;
        float* sums = all_sums == nullptr ? nullptr : all_sums + row * columns;
        scores_of<P>(p, row, count, weight, logits);
        p.noise ? enter<true>(codes.tile, row, count, logits, sums) : enter<false>(codes.tile, row, count, logits, sums);
        if (sums != nullptr)
          product<P>({(const Word*)probabilities, kRowWords, 1}, mixed, sums, columns, count, columns, kRowWords, true);
      }
    }
    for (int64_t r = 0; r < strip; r++) {
      const RowState& state = states[r];
      p.states[index * strip + r] = {sum(state.noisy), sum(state.clean), sum(state.moment), state.top, state.best};
    }
  }
};

template <class T>
void projection_scores(const ProjectionForward& problem, int64_t split, int64_t split_end, void* scratch) {
  ProjectionForwardKernel<T> kernel(problem, scratch);
  for (; split < split_end; split++) kernel.split(split);
}

template <class T>
void projection_finish(const ProjectionForward& p, int64_t row, int64_t row_end) {
  const float scale = kLog2E / p.temperature;
  const int64_t columns = padded(p.width), strip = p.strip(), splits = p.splits();
  for (; row < row_end; row++) {
    RowTotal total{0, 0, 0, kLowestLogit, p.codes};
    for (int64_t s = 0; s < splits; s++) {
      const float top = p.states[s * strip + row].top;
      if (top > total.top) total.top = top;
    }
    float factors[Projection::kMostSplits];
    for (int64_t s = 0; s < splits; s++) {
      const RowTotal& part = p.states[s * strip + row];
      const F drop = set((part.top - total.top) * kLog2E);
      const float factor = largest(exp2(drop)), exponent = largest(max(drop, set(kZeroExponent)));
      factors[s] = largest(exp2(set((part.top - total.top) * scale)));
      total.noisy += factors[s] * part.noisy;
      total.clean += factor * part.clean;
      total.moment += factor * (exponent * part.clean + part.moment);
      if (part.top == total.top && part.best < total.best) total.best = part.best;
    }
    const int64_t n = p.begin + row;
    total = finish_row(p, n, total);
    T* latents = (T*)p.latents + n * p.width;
    if (p.hard) {
      std::memcpy(latents, (const T*)p.codebook + total.best * p.width, size_t(p.width) * sizeof(T));
      continue;
    }
    for (int64_t j = 0; j < p.width; j += kLanes) {
      F mixed = zero();
      for (int64_t s = 0; s < splits; s++)
        mixed = fma(set(factors[s]), load(p.sums + (s * strip + row) * columns + j), mixed);
      store(latents + j, mixed * set(1.f / total.noisy), p.width - j < kLanes ? int(p.width - j) : kLanes);
    }
  }
}

template <class T>
void projection_distribution(const ProjectionForward& p, int64_t t, int64_t tile_end) {
  using P = typename ProductOf<T>::Type;
  const float share = 1.f / float(p.rows);
  for (; t < tile_end; t++) {
    float of_tile[kCodeTile];
    TileRow total;
    for (int l = 0; l < 4; l++)
      for (int j = 0; j < kTileVectors; j++) total[l][j] = zero();
    for (int64_t r = 0; r < p.strip(); r++) {
      const RowShift row(p, p.begin + r);
      const float* logits = p.logits + (t * p.strip() + r) * kCodeTile;
      DALLE_UNROLL for (int l = 0; l < 4; l++)
        DALLE_UNROLL for (int j = 0; j < kTileVectors; j++)
          total[l][j] = total[l][j] + exp2_bounded(row.exponent(load(logits + l * kCounterTile + j * kLanes)));
    }
    for (int l = 0; l < 4; l++)
      for (int j = 0; j < kTileVectors; j++) store(of_tile + l * kCounterTile + j * kLanes, total[l][j]);
    ProjectionTile<P, T>{p, Tile(p, t)}.stretches([&](int64_t place, int64_t code, int n) {
      const F before = p.begin == 0 ? zero() : load(p.distribution + code, n);
      const F after = before + load(of_tile + place);
      store(p.distribution + code, p.end == p.rows ? after * set(share) : after, n);
    });
  }
}

template <class T>
struct ProjectionBackwardKernel {
  using P = typename ProductOf<T>::Type;
  static constexpr int kRowWords = int(kCodeTile) / P::kDepth;

  const ProjectionBackward& p;
  const NoiseKeys keys;
  const float scale, log_codes;
  const int64_t channels, columns;  // padded
  // Of the first walk: the tile of the weight and of the codebook, by columns; scores. Of the second: the tile of the
  // weight by rows, gradients of the tile, dlogits, weights in pairs of rows.
  Word *weight, *codebook;
  float *weight_gradient, *codebook_gradient, *tile_vectors, *scores, *totals;

  ProjectionBackwardKernel(const ProjectionBackward& problem, void* scratch)
      : p(problem), keys(problem.seed), scale(kLog2E / problem.temperature),
        log_codes(__builtin_logf(float(problem.codes))), channels(padded(problem.channels)),
        columns(padded(problem.width)) {
    weight = (Word*)scratch;
    codebook = weight + kCodeTile * channels;
    weight_gradient = (float*)(codebook + kCodeTile * columns);
    codebook_gradient = weight_gradient + kCodeTile * channels;
    tile_vectors = codebook_gradient + kCodeTile * columns;
    totals = tile_vectors + 3 * kCodeTile;
    scores = totals + 2 * Projection::kMostRows;
  }

  // --- First walk ---

  template <bool Noise, bool Latents, bool Clean>
  void row_tables(const Tile& tile, int64_t t, int64_t row, int count) {
    const float *biases = tile_vectors, *grad_distribution = tile_vectors + kCodeTile;
    const F inverse = set(1.f / p.temperature);
    for (int r = 0; r < count; r++) {
      const int64_t n = p.begin + row + r, place = (t * p.strip() + row + r) * kCodeTile;
      const auto of_row = [place](float* table) { return table == nullptr ? nullptr : table + place; };
      float *terms = of_row(p.terms), *weights = of_row(p.weights), *others = of_row(p.others);
      const float* its = scores + r * kCodeTile;
      TileRow clean, noisy;
      load_scores<Noise>(
          tile, keys, NoiseRow(keys, p.first_row + uint64_t(n), kGumbelStream),
          [&](int l, int j) __attribute__((always_inline)) {
            const int at = l * int(kCounterTile) + j * kLanes;
            return load(its + at) + load(biases + at);
          },
          clean, noisy);
      const RowShift shift(p, n);
      const float grad_kl = Clean && p.grad_kl != nullptr ? p.grad_kl[n] : 0.f;
      const F slope = set(grad_kl * kLn2), offset = set(grad_kl * (log_codes - (grad_kl != 0 ? p.kl[n] : 0.f)));
      F total = zero(), other_total = zero();
      DALLE_UNROLL for (int l = 0; l < 4; l++)
        DALLE_UNROLL for (int j = 0; j < kTileVectors; j++) {
          const int64_t at = l * kCounterTile + j * kLanes;
          F term = zero();
          if constexpr (Latents) {
            const F y = shift.weight(noisy[l][j], scale);
            store(weights + at, y);
            if (terms != nullptr) {
              term = y * inverse * load(terms + at);
              if (p.delta == nullptr) total = total + term;
            }
          }
          if constexpr (Clean) {
            const F exponent = shift.exponent(clean[l][j]), share = exp2_bounded(exponent);
            const F pulled = share * load(grad_distribution + at);
            if (others != nullptr) {
              store(others + at, share);
              other_total = other_total + pulled;
            } else {
              if (!Latents && weights != nullptr) store(weights + at, share);
              total = total + pulled;
            }
            term = fma(share, fma(exponent, slope, offset), term + pulled);
          }
          if (terms != nullptr) store(terms + at, term);
        }
      if (p.totals != nullptr) p.totals[t * p.strip() + row + r] = sum(total);
      if (p.other_totals != nullptr) p.other_totals[t * p.strip() + row + r] = sum(other_total);
    }
  }

  template <bool Noise>
  void row_tables(const Tile& tile, int64_t t, int64_t row, int count, bool clean) {
    clean ? row_tables<Noise, true, true>(tile, t, row, count) : row_tables<Noise, true, false>(tile, t, row, count);
  }

  void tables(int64_t t) {
    const ProjectionTile<P, T> codes{p, Tile(p, t)};
    const bool latents = p.grad_latents != nullptr, clean = p.grad_kl != nullptr || p.grad_distribution != nullptr;
    const Word* transposed = weight;
    codes.columns_of(p.weight, p.channels, weight);
    codes.biases(tile_vectors);
    if (latents && p.through_logits() && (p.codebook != p.weight || p.width != p.channels)) {
      codes.columns_of(p.codebook, p.width, codebook);
      transposed = codebook;
    }
    std::memset(tile_vectors + kCodeTile, 0, size_t(kCodeTile) * sizeof(float));
    if (p.grad_distribution != nullptr)
      codes.stretches([&](int64_t place, int64_t code, int n) {
        store(tile_vectors + kCodeTile + place, load(p.grad_distribution + code, n) * set(1.f / float(p.rows)));
      });
    const int64_t depth = columns / P::kDepth;
    for (int64_t row = 0; row < p.strip(); row += kRowTile) {
      const int count = int(p.strip() - row < kRowTile ? p.strip() - row : kRowTile);
      scores_of<P>(p, row, count, weight, scores);
      if (latents && p.through_logits())
        product<P>({p.grad_rows + row * depth, depth, 1}, transposed, p.terms + (t * p.strip() + row) * kCodeTile,
                   kCodeTile, count, kCodeTile, int(depth), false);
      if (!latents) row_tables<false, false, true>(codes.tile, t, row, count);
      else p.noise ? row_tables<true>(codes.tile, t, row, count, clean) : row_tables<false>(codes.tile, t, row, count, clean);
    }
  }

  // --- Second walk ---

  void add_totals() {
    const int64_t strip = p.strip();
    std::memset(totals, 0, size_t(2 * Projection::kMostRows) * sizeof(float));
    for (int64_t r = 0; p.delta != nullptr && r < strip; r++) totals[r] = p.delta[p.begin + r] / p.temperature;
    for (int64_t t = 0; t < p.tiles(); t++)
      for (int64_t r = 0; r < strip; r += kLanes) {
        const int n = strip - r < kLanes ? int(strip - r) : kLanes;
        const auto add = [&](const float* from, float* to) {
          if (from != nullptr) store(to + r, load(to + r) + load(from + t * strip + r, n));
        };
        add(p.totals, totals), add(p.other_totals, totals + Projection::kMostRows);
      }
  }

  // dlogits of a tile's rows, as the left-hand sides of both products want them.
  void logit_gradients(int64_t t, int64_t row, int count, Word* by_rows, Word* by_pairs) {
    float* grad_bias = tile_vectors;
    const int64_t first = (t * p.strip() + row) * kCodeTile;
    const auto gradient = [&](int r, int at) __attribute__((always_inline)) {
      if (r >= count) return zero();
      const int64_t place = first + r * kCodeTile + at;
      F x = load(p.terms + place);
      if (p.totals != nullptr) x = fnma(set(totals[row + r]), load(p.weights + place), x);
      if (p.others != nullptr) x = fnma(set(totals[Projection::kMostRows + row + r]), load(p.others + place), x);
      return x;
    };
    for (int r = 0; r < count; r += P::kDepth)
      for (int at = 0; at < int(kCodeTile); at += kLanes) {
        const F x = gradient(r, at);
        F both = x;
        put_word<P>((float*)by_rows, r * kCodeTile + at, x);
        if constexpr (P::kDepth == 2) {
          const F second = gradient(r + 1, at);
          both = both + second;
          put_word<P>((float*)by_rows, (r + 1) * kCodeTile + at, second);
          store((float*)by_pairs + r / 2 * kCodeTile + at, as_float(P::pack(x, second)));
        }
        if (p.grad_bias != nullptr) store(grad_bias + at, load(grad_bias + at) + both);
      }
  }

  const Word* weights_by_pairs(int64_t t, int64_t row, int count, Word* to) {
    const float* from = p.weights + (t * p.strip() + row) * kCodeTile;
    if constexpr (P::kDepth == 1) {
      return (const Word*)from;
    } else {
      for (int r = 0; r < count; r += 2)
        for (int at = 0; at < int(kCodeTile); at += kLanes)
          store((float*)to + r / 2 * kCodeTile + at,
                as_float(P::pack(load(from + r * kCodeTile + at),
                                 r + 1 < count ? load(from + (r + 1) * kCodeTile + at) : zero())));
      return to;
    }
  }

  // The gradient of a tile's codes: zero before the first strip; between strips it is kept in float32, in `wide` if T is
  // less.
  void load_wide(const ProjectionTile<P, T>& codes, const void* grad, const float* wide, int64_t width, float* tile) {
    const int64_t padding = padded(width);
    std::memset(tile, 0, size_t(kCodeTile * padding) * sizeof(float));
    if (p.begin == 0) return;
    for (int l = 0; l < 4; l++)
      for (int64_t i = 0; i < codes.tile.count[l]; i++)
        for (int64_t j = 0; j < width; j += kLanes) {
          const int64_t code = codes.tile.first[l] + i;
          const int n = width - j < kLanes ? int(width - j) : kLanes;
          store(tile + (l * kCounterTile + i) * padding + j,
                wide != nullptr ? load(wide + code * padding + j) : load((const T*)grad + code * width + j, n));
        }
  }
  void store_wide(const ProjectionTile<P, T>& codes, void* grad, float* wide, int64_t width, const float* tile) {
    const int64_t padding = padded(width);
    const bool keep = wide != nullptr && p.end < p.rows;
    for (int l = 0; l < 4; l++)
      for (int64_t i = 0; i < codes.tile.count[l]; i++)
        for (int64_t j = 0; j < width; j += kLanes) {
          const int64_t code = codes.tile.first[l] + i;
          const F x = load(tile + (l * kCounterTile + i) * padding + j);
          if (keep) store(wide + code * padding + j, x);
          else store((T*)grad + code * width + j, x, width - j < kLanes ? int(width - j) : kLanes);
        }
  }

  void bias_gradient(const ProjectionTile<P, T>& codes) {
    codes.stretches([&](int64_t place, int64_t code, int n) {
      const F x = load(tile_vectors + place) + (p.begin == 0 ? zero() : load(p.wide_bias + code, n));
      store(p.wide_bias + code, x, n);
      if (p.end == p.rows) store((T*)p.grad_bias + code, x, n);
    });
  }

  void split(int64_t index) {
    const int64_t strip = p.strip();
    const bool mixes = p.grad_codebook != nullptr, tied = mixes && p.grad_codebook == p.grad_weight;
    Word *by_rows = (Word*)scores, *by_pairs = by_rows + kRowTile * kCodeTile,
         *pairs = by_pairs + kRowTile * kCodeTile;
    float* grad_features = p.grad_features == nullptr ? nullptr : p.partial + index * strip * channels;
    if (grad_features != nullptr) std::memset(grad_features, 0, size_t(strip * channels) * sizeof(float));
    for (int64_t t = p.first_tile(index); t < p.first_tile(index + 1); t++) {
      const ProjectionTile<P, T> codes{p, Tile(p, t)};
      if (grad_features != nullptr) codes.rows_of(p.weight, p.channels, weight);
      if (p.grad_weight != nullptr) load_wide(codes, p.grad_weight, p.wide_weight, p.channels, weight_gradient);
      if (mixes && !tied) load_wide(codes, p.grad_codebook, p.wide_codebook, p.width, codebook_gradient);
      std::memset(tile_vectors, 0, size_t(kCodeTile) * sizeof(float));
      for (int64_t row = 0; row < strip; row += kRowTile) {
        const int count = int(strip - row < kRowTile ? strip - row : kRowTile);
        const int steps = (count + P::kDepth - 1) / P::kDepth;
        if (p.through_logits()) logit_gradients(t, row, count, by_rows, by_pairs);
        if (grad_features != nullptr)
          product<P>({by_rows, kRowWords, 1}, weight, grad_features + row * channels, channels, count, channels,
                     kRowWords, true);
        if (p.grad_weight != nullptr)
          product<P>({P::kDepth == 1 ? by_rows : by_pairs, 1, kCodeTile},
                     p.feature_columns + row / P::kDepth * channels, weight_gradient, channels, kCodeTile, channels, steps,
                     true);
        if (mixes)
          product<P>({weights_by_pairs(t, row, count, pairs), 1, kCodeTile},
                     p.grad_columns + row / P::kDepth * columns, tied ? weight_gradient : codebook_gradient, columns, kCodeTile, columns, steps,
                     true);
      }
      if (p.grad_weight != nullptr) store_wide(codes, p.grad_weight, p.wide_weight, p.channels, weight_gradient);
      if (mixes && !tied) store_wide(codes, p.grad_codebook, p.wide_codebook, p.width, codebook_gradient);
      if (p.grad_bias != nullptr) bias_gradient(codes);
    }
  }
};

template <class T>
void projection_tables(const ProjectionBackward& problem, int64_t tile, int64_t tile_end, void* scratch) {
  ProjectionBackwardKernel<T> kernel(problem, scratch);
  for (; tile < tile_end; tile++) kernel.tables(tile);
}

template <class T>
void projection_gradients(const ProjectionBackward& problem, int64_t split, int64_t split_end, void* scratch) {
  ProjectionBackwardKernel<T> kernel(problem, scratch);
  if (problem.through_logits()) kernel.add_totals();
  for (; split < split_end; split++) kernel.split(split);
}

template <class T>
void projection_collect(const ProjectionBackward& p, int64_t row, int64_t row_end) {
  const int64_t channels = padded(p.channels);
  for (; row < row_end; row++)
    for (int64_t j = 0; j < p.channels; j += kLanes) {
      F total = zero();
      for (int64_t s = 0; s < p.splits(); s++) total = total + load(p.partial + (s * p.strip() + row) * channels + j);
      store((T*)p.grad_features + (p.begin + row) * p.channels + j, total,
            p.channels - j < kLanes ? int(p.channels - j) : kLanes);
    }
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
