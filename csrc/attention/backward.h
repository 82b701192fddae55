// Attention backward. A tile of 64 keys lies across the lanes and meets, one after another, the queries that see it;
// with P = exp(scale s - lse) and delta = sum(dO O) - d lse,
//
//     dV += P^T dO      dS = P (dO V^T - delta)      dK += dS^T Q      dQ += dS K
//
// where under a soft cap s = softcap tanh(scale q . k / softcap), dS is also multiplied by 1 - tanh^2.
//
// dK and dV of the tile stay in the nearest cache; dQ is summed by position in a buffer. Both
// products are stored before the exponentials are taken: fused into the registers that hold the sums, the exponentials'
// long chains keep the multipliers waiting.
//
// A call takes a range of query tiles of a head: dQ of those is complete. Keys that queries of several ranges see (the
// text, and a window at each border) leave a partial dK and dV, added up later in the order of the ranges.
//
// A gradient whose array is null is nobody's wish: its products are left out, and without dQ and dK so is dO V^T.
#pragma once

#include "attention/tiles.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

template <class T, class Dot>
struct Backward {
  using Source = Rows<T, Dot>;
  static constexpr bool kPairs = Dot::kDepth == 2;
  static constexpr int kListedQueries = 128;  // pairs of queries that a group of keys takes at a time

  Source q, k, v, out, grad;
  int first, last;  // the range of query tiles
  float *transposed_k, *transposed_v, *keys;
  float *scores, *inner;                 // Q K^T and dO V^T, a row a query
  float *weights, *slopes, *slope_rows;  // P and dS in their place, or as pairs of queries; dS again, as pairs of keys
  float *dk, *dv, *dq, *normaliser, *delta;
  uint8_t *statistics_ready, *reached, *padded, *tile_padded;
  Pair* listed;
  const Problem& problem;
  bool wants_dq, wants_dk, wants_dv;
  int width, rounded;
  float scale;  // of the score that the softmax is taken of: q . k, or tanh(steepness q . k)

  static int64_t floats(const Problem& problem) { return Backward(problem, nullptr).carve(nullptr); }

  Backward(const Problem& problem, float* memory)
      : problem(problem), width(int(problem.width)), rounded(round_up(int(problem.width), kLanes)) {
    scale = (problem.softcap != 0 ? problem.softcap : problem.scale) * kUnits<kPairs>;
    carve(memory);
  }

  int64_t carve(float* memory) {
    Carver carver{memory};
    const Plan& plan = *problem.plan;
    const int tiles = plan.query_tiles;
    const int64_t positions = int64_t(tiles) * kTile, key_positions = int64_t(plan.tiles) * kTile;
    const int units = width / Dot::kDepth;
    float* zeros = carver.floats(rounded);
    transposed_k = carver.floats(int64_t(units) * kTile);
    transposed_v = carver.floats(int64_t(units) * kTile);
    keys = carver.floats(int64_t(kTile) / Dot::kDepth * rounded);
    scores = carver.floats(kTile * kTile);
    inner = carver.floats(kTile * kTile);
    weights = kPairs ? carver.floats(kTile * kTile / 2) : scores;
    slopes = kPairs ? carver.floats(kTile * kTile / 2) : inner;
    slope_rows = kPairs ? carver.floats(kTile * kTile / 2) : slopes;
    dk = carver.floats(int64_t(kTile) * rounded);
    dv = carver.floats(int64_t(kTile) * rounded);
    normaliser = carver.floats(positions);
    delta = carver.floats(positions);
    statistics_ready = carver.of<uint8_t>(tiles);
    reached = carver.of<uint8_t>(tiles);
    listed = carver.of<Pair>(kTile / 2);
    padded = problem.padding ? carver.of<uint8_t>(key_positions) : nullptr;
    tile_padded = problem.padding ? carver.of<uint8_t>(plan.tiles) : nullptr;
    q = out = grad = Source{nullptr, 0,       plan.query_order, plan.query_length, width,
                            rounded, nullptr, nullptr,          nullptr,           zeros};
    k = v = Source{nullptr, 0, plan.order, plan.length, width, rounded, nullptr, nullptr, nullptr, zeros};
    q.carve(carver, tiles, problem.scattered);
    grad.carve(carver, tiles, problem.scattered);
    dq = carver.floats(positions * rounded);
    return carver.used;
  }

  void enter(const BackwardArrays& arrays, int64_t head) {
    const int64_t b = head / problem.heads, h = head % problem.heads;
    const auto attach = [&](Source& rows, const Array& array) {
      rows.base = (const T*)array.data + b * array.batch + h * array.head;
      rows.stride = array.row;
    };
    attach(q, arrays.q);
    attach(k, arrays.k);
    attach(v, arrays.v);
    attach(out, arrays.out);
    attach(grad, arrays.grad_out);
    wants_dq = arrays.dq.data != nullptr;
    wants_dk = arrays.dk.data != nullptr;
    wants_dv = arrays.dv.data != nullptr;
    const Plan& plan = *problem.plan;
    std::memset(reached, 0, size_t(plan.query_tiles));
    std::memset((void*)q.zeros, 0, size_t(rounded) * sizeof(float));
    std::memset(statistics_ready, 0, size_t(plan.query_tiles));
    q.forget(plan.query_tiles);
    grad.forget(plan.query_tiles);
    if (padded) {
      const uint8_t* row = problem.padding + b * plan.length;
      for (int t = 0; t < plan.tiles; t++) {
        tile_padded[t] = 0;
        for (int p = t * kTile; p < (t + 1) * kTile; p++) {
          padded[p] = p < plan.length && row[plan.order[p]];
          tile_padded[t] |= padded[p];
        }
      }
    }
  }

  // What the walk needs of a tile of queries: log-sum-exp and delta, packed rows, dq of zero.
  void reach(const BackwardArrays& arrays, int64_t head, int tile) {
    if (wants_dq && !reached[tile]) {
      reached[tile] = 1;
      std::memset(dq + int64_t(tile) * kTile * rounded, 0, size_t(kTile) * rounded * sizeof(float));
    }
    if (statistics_ready[tile]) return;
    statistics_ready[tile] = 1;
    q.prepare(tile);
    grad.prepare(tile);
    for (int p = tile * kTile; p < (tile + 1) * kTile; p++) {
      normaliser[p] = 1e30f;  // no key, or no query: every weight is 0
      delta[p] = 0;
      if (p >= problem.plan->query_length) continue;
      const int64_t row = head * problem.plan->query_length + problem.plan->query_order[p];
      const float lse = arrays.lse[row];
      if (lse == -INFINITY) continue;
      normaliser[p] = lse * kUnits<kPairs>;
      if (!wants_slopes()) continue;
      F sums = zero();
      for (int d = 0; d < width; d += kLanes)
        sums = fma(load_row(grad.row(p), d, width), load_row(out.row(p), d, width), sums);
      delta[p] = sum(sums) - (arrays.grad_lse ? arrays.grad_lse[row] : 0.f);
    }
  }

  bool wants_slopes() const { return wants_dq || wants_dk; }

  // out[query][key] = rows[query] . transposed[.][key] for `count` rows and kLd keys.
  template <int kLd, int M, int N, int kChains>
  DALLE_METHOD void products(const float* const* rows, int count, const float* transposed, float* out) {
    const int units = width / Dot::kDepth;
    for (int lane = 0; lane < kLd; lane += N * kLanes)
      for_rows<M>(count, [&](auto m, int i) __attribute__((always_inline)) {
        constexpr int kRows = m.value;
        dot_rows<Dot, kRows, N, kChains>(rows + i, transposed + lane, units,
                                         [&](const F(&sums)[kRows][N]) __attribute__((always_inline)) {
          float* const to = out + i * kLd + lane;
          DALLE_UNROLL for (int j = 0; j < kRows; j++)
            DALLE_UNROLL for (int w = 0; w < N; w++) store(to + j * kLd + w * kLanes, sums[j][w]);
        });
      });
  }

  // Turns the products of `count` queries with kLd keys into weights and slopes; pairs is null where all is visible.
  template <bool kMasked, int kLd>
  DALLE_METHOD void weigh(int count, const int* positions, const Pair* pairs) {
    if (!wants_slopes()) return weigh_values<kMasked, kLd>(count, positions, pairs);
    if (problem.softcap != 0) return weigh_capped<kMasked, kLd>(count, positions, pairs);
    weigh_as<kMasked, kLd, false, true>(count, positions, pairs);
  }
  template <bool kMasked, int kLd>
  DALLE_APART void weigh_capped(int count, const int* positions, const Pair* pairs) {
    weigh_as<kMasked, kLd, true, true>(count, positions, pairs);
  }
  template <bool kMasked, int kLd>
  DALLE_APART void weigh_values(int count, const int* positions, const Pair* pairs) {
    if (problem.softcap != 0) return weigh_as<kMasked, kLd, true, false>(count, positions, pairs);
    weigh_as<kMasked, kLd, false, false>(count, positions, pairs);
  }
  template <bool kMasked, int kLd, bool kCapped, bool kSlopes>
  DALLE_METHOD void weigh_as(int count, const int* positions, const Pair* pairs) {
    constexpr int N = kLd >= 2 * kLanes ? 2 : 1;
    const F slope = set(scale), rise = set(problem.steepness);
    // Locals: for all the compiler knows, a store might change a member.
    const float *s = scores, *t = inner;
    float *p_to = weights, *d_to = slopes;
    bf16* rows_to = (bf16*)slope_rows;
    for (int i = 0; i < count; i += 2, s += 2 * kLd, t += 2 * kLd, p_to += 2 * kLd / Dot::kDepth,
             d_to += 2 * kLd / Dot::kDepth, rows_to += 2 * kLd) {
      const int first = positions[i], second = positions[i + 1];
      const F lse[2] = {set(normaliser[first]), set(normaliser[second])};
      const F mean[2] = {set(delta[first]), set(delta[second])};
      DALLE_UNROLL for (int lane = 0; lane < kLd; lane += N * kLanes) {
        F p[2][N], d[2][N];
        DALLE_UNROLL for (int j = 0; j < 2; j++)
          DALLE_UNROLL for (int w = 0; w < N; w++) {
            const int at = j * kLd + lane + w * kLanes;
            const F score = kCapped ? tanh(rise * load(s + at)) : load(s + at);
            p[j][w] = share<kPairs>(score, slope, lse[j]);
            if constexpr (kSlopes) d[j][w] = p[j][w] * (load(t + at) - mean[j]);
            if constexpr (kSlopes && kCapped) d[j][w] *= fnma(score, score, set(1.f));
            if constexpr (kMasked) {
              const Mask seen = from_bits(uint32_t(pairs->bits[j]) >> (lane + w * kLanes));
              p[j][w] = select(seen, p[j][w], zero());
              if constexpr (kSlopes) d[j][w] = select(seen, d[j][w], zero());
            }
          }
        DALLE_UNROLL for (int w = 0; w < N; w++) {
          if constexpr (kPairs) {
            store(p_to + lane + w * kLanes, as_float(Dot::pack(p[0][w], p[1][w])));
            if constexpr (kSlopes) store(d_to + lane + w * kLanes, as_float(Dot::pack(d[0][w], d[1][w])));
          } else {
            DALLE_UNROLL for (int j = 0; j < 2; j++) {
              store(p_to + j * kLd + lane + w * kLanes, p[j][w]);
              if constexpr (kSlopes) store(d_to + j * kLd + lane + w * kLanes, d[j][w]);
            }
          }
        }
        if constexpr (kPairs && kSlopes)
          DALLE_UNROLL for (int j = 0; j < 2; j++) {
            if constexpr (N == 2) store(rows_to + j * kLd + lane, d[j][0], d[j][1]);
            else store(rows_to + j * kLd + lane, d[j][0]);
          }
      }
      if constexpr (kMasked) pairs++;
    }
  }

  void full_tile(const BackwardArrays& arrays, int64_t head, int tile) {
    reach(arrays, head, tile);
    const float *query_rows[kTile], *grad_rows[kTile];
    float* dq_rows[kTile];
    int positions[kTile];
    for (int i = 0; i < kTile; i++) {
      const int p = tile * kTile + i;
      positions[i] = p;
      query_rows[i] = q.units(p);
      grad_rows[i] = grad.units(p);
      dq_rows[i] = dq + int64_t(p) * rounded;
    }
    products<kTile, kTileRows, kWide, 1>(query_rows, kTile, transposed_k, scores);
    if (wants_slopes()) products<kTile, kTileRows, kWide, 1>(grad_rows, kTile, transposed_v, inner);
    weigh<false, kTile>(kTile, positions, nullptr);
    constexpr int kRows = kTile / Dot::kDepth;
    for (int u = 0; u < kRows; u++) {
      query_rows[u] = q.mixed(tile * kRows + u);
      grad_rows[u] = grad.mixed(tile * kRows + u);
    }
    if (wants_dv) mix<Dot, Start::add, kTile>(weights, grad_rows, kRows, dv, rounded, nullptr);
    if (wants_dk) mix<Dot, Start::add, kTile>(slopes, query_rows, kRows, dk, rounded, nullptr);
    if (wants_dq) accumulate<Dot, kRows>(slope_rows, keys, rounded, kRows, kTile, dq_rows);
  }

  // Group g of the tile of keys against n <= kListedQueries pairs of queries.
  void some_pairs(const BackwardArrays& arrays, int64_t head, const Pair* pairs, int n, int g) {
    const float *query_rows[2 * kListedQueries], *grad_rows[2 * kListedQueries];
    float* dq_rows[2 * kListedQueries];
    int positions[2 * kListedQueries];
    for (int i = 0; i < 2 * n; i++) {
      const int p = 2 * pairs[i / 2].index + i % 2;
      if (i % 2 == 0) reach(arrays, head, int(unsigned(p) / kTile));
      positions[i] = p;
      query_rows[i] = q.units(p);
      grad_rows[i] = grad.units(p);
      dq_rows[i] = dq + int64_t(p) * rounded;
    }
    const int lane = g * kGroup;
    products<kGroup, kListRows, kVectors, kListChains>(query_rows, 2 * n, transposed_k + lane, scores);
    if (wants_slopes())
      products<kGroup, kListRows, kVectors, kListChains>(grad_rows, 2 * n, transposed_v + lane, inner);
    weigh<true, kGroup>(2 * n, positions, pairs);
    for (int u = 0; u < 2 * n / Dot::kDepth; u++) {
      const int row = kPairs ? pairs[u].index : positions[u];
      query_rows[u] = q.mixed(row);
      grad_rows[u] = grad.mixed(row);
    }
    const int64_t first_key = lane * int64_t(rounded);
    if (wants_dv) mix<Dot, Start::add, kGroup>(weights, grad_rows, 2 * n / Dot::kDepth, dv + first_key, rounded, nullptr);
    if (wants_dk) mix<Dot, Start::add, kGroup>(slopes, query_rows, 2 * n / Dot::kDepth, dk + first_key, rounded, nullptr);
    if (wants_dq)
      accumulate<Dot, kGroup / Dot::kDepth>(slope_rows, keys + first_key / Dot::kDepth, rounded, kGroup / Dot::kDepth,
                                            2 * n, dq_rows);
  }

  // Writes dk and dv of a tile, or leaves them in `partial` [2, 64, rounded D] where it is not null.
  void key_tile(const BackwardArrays& arrays, int64_t head, int tile, float* partial) {
    const Plan& plan = *problem.plan;
    const Seen seen = seen_by(plan.by_key, tile, first, last);
    std::memset(dk, 0, size_t(kTile) * rounded * sizeof(float));
    std::memset(dv, 0, size_t(kTile) * rounded * sizeof(float));
    k.transpose_into(tile, transposed_k);
    if (wants_slopes()) v.transpose_into(tile, transposed_v);
    if (wants_dq) k.pack_into(tile, keys);
    const bool holes = padded && tile_padded[tile];
    for (const int32_t* full = seen.full; full != seen.full_end && !holes; full++) full_tile(arrays, head, *full);
    for (int g = 0; g < kGroups; g++) {
      const Pair* pairs = seen.pairs[g];
      const int count = int(seen.pairs_end[g] - pairs);
      if (!holes) {
        for (int i = 0; i < count; i += kListedQueries)
          some_pairs(arrays, head, pairs + i, count - i < kListedQueries ? count - i : kListedQueries, g);
        continue;
      }
      uint16_t alive = 0;
      for (int i = 0; i < kGroup; i++)
        if (!padded[tile * kTile + g * kGroup + i]) alive |= uint16_t(1u << i);
      if (!alive) continue;
      for (const int32_t* full = seen.full; full != seen.full_end; full++) {
        for (int p = 0; p < kTile / 2; p++) listed[p] = {*full * (kTile / 2) + p, {alive, alive}};
        some_pairs(arrays, head, listed, kTile / 2, g);
      }
      int n = 0;
      for (int i = 0; i < count; i++) {
        const Pair kept{pairs[i].index, {uint16_t(pairs[i].bits[0] & alive), uint16_t(pairs[i].bits[1] & alive)}};
        if (kept.bits[0] | kept.bits[1]) listed[n++] = kept;
        if (n == kTile / 2 || (n > 0 && i + 1 == count)) {
          some_pairs(arrays, head, listed, n, g);
          n = 0;
        }
      }
    }
    if (partial) {
      const size_t size = size_t(kTile) * rounded;
      if (wants_dk) std::memcpy(partial, dk, size * sizeof(float));
      if (wants_dv) std::memcpy(partial + size, dv, size * sizeof(float));
    } else {
      write_keys(problem, arrays, head, tile, dk, dv, 0, 1);
    }
  }

  // dk and dv of a tile of keys: the sums of `count` buffers, `stride` floats apart, in order.
  static void write_keys(const Problem& problem, const BackwardArrays& arrays, int64_t head, int tile, const float* dk,
                         const float* dv, int64_t stride, int count) {
    write_sums(problem, arrays.dk, head, tile, dk, stride, count, problem.scale);
    write_sums(problem, arrays.dv, head, tile, dv, stride, count, 1.f);
  }
  static void write_sums(const Problem& problem, const Array& to, int64_t head, int tile, const float* sums,
                         int64_t stride, int count, float factor) {
    if (to.data == nullptr) return;
    const Plan& plan = *problem.plan;
    const int width = int(problem.width), rounded = round_up(width, kLanes);
    T* base = (T*)to.data + head / problem.heads * to.batch + head % problem.heads * to.head;
    for (int i = 0; i < kTile && tile * kTile + i < plan.length; i++) {
      T* row = base + plan.order[tile * kTile + i] * to.row;
      for (int d = 0; d < width; d += kLanes) {
        const int64_t at = int64_t(i) * rounded + d;
        F total = load(sums + at);
        for (int c = 1; c < count; c++) total += load(sums + c * stride + at);
        store_row(row, d, width, set(factor) * total);
      }
    }
  }

  void write_queries(const BackwardArrays& arrays, int64_t head) {
    const Plan& plan = *problem.plan;
    const int64_t b = head / problem.heads, h = head % problem.heads;
    T* base = (T*)arrays.dq.data + b * arrays.dq.batch + h * arrays.dq.head;
    const F factor = set(problem.scale);
    for (int p = first * kTile; p < last * kTile && p < plan.query_length; p++) {
      T* row = base + plan.query_order[p] * arrays.dq.row;
      for (int d = 0; d < width; d += kLanes)
        store_row(row, d, width, reached[p / kTile] ? factor * load(dq + int64_t(p) * rounded + d) : zero());
    }
  }

  static void run(const Problem& problem, const BackwardArrays& arrays, int64_t head, int32_t first, int32_t last,
                  const int32_t* destinations, float* partial, Scratch& scratch) {
    Backward backward(problem, scratch.memory);
    backward.first = first;
    backward.last = last;
    backward.enter(arrays, head);
    const int64_t slot = 2 * kTile * int64_t(backward.rounded);
    for (int32_t tile = 0; tile < problem.plan->tiles; tile++)
      if (destinations[tile] != kElsewhere)
        backward.key_tile(arrays, head, tile, destinations[tile] == kHere ? nullptr : partial + destinations[tile] * slot);
    if (backward.wants_dq) backward.write_queries(arrays, head);
  }

  static void reduce(const Problem& problem, const BackwardArrays& arrays, int64_t head, int32_t tile,
                     const float* partial, int32_t count) {
    const int64_t half = kTile * int64_t(round_up(int(problem.width), kLanes));
    write_keys(problem, arrays, head, tile, partial, partial + half, 2 * half, count);
  }
};

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
