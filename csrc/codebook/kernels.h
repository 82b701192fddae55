// What the codebook's kernels take, and one table of functions per instruction set: plain pointers, no torch.
//
// Tables are row-major and dense, but the logits' rows may lie further apart. Element types: float or dalle::bf16,
// the same for logits, codebook, latents and their gradients; everything else is float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "round_up.h"

namespace dalle {

// Tiles are the same for every instruction set, so sizes and shares of work are too.
constexpr int64_t kRowTile = 64;      // rows that one pass over the codebook serves
constexpr int64_t kCounterTile = 32;  // noise counters, each good for one code in every quarter of the codebook
constexpr int64_t kCodeTile = 4 * kCounterTile;
constexpr int64_t kPad = 16;  // widths are padded to whole vectors of any instruction set

constexpr int64_t padded(int64_t width) { return round_up(width, kPad); }

constexpr int64_t kRowStateBytes = 256;  // what a row of a Gumbel lookup gathers on its way through the codebook

// What a row of logits comes to: sums over its codes relative to the greatest score `top`, of e^((score - top) / tau),
// of e^(logit - top) and of that times its exponent, to base 2; and which code is the first to reach `top`.
struct RowTotal {
  float noisy, clean, moment, top;
  int64_t best;
};

// The codes of a Gumbel lookup, and how they are walked.
struct Codes {
  const void* codebook;  // [codes, width]
  int64_t rows, codes, width;
  float temperature;
  bool noise;
  uint64_t seed, first_row;  // of the noise
  uint32_t first_counter;    // of each quarter, where these codes are some columns of each quarter of a larger codebook

  int64_t quarter() const { return (codes + 3) / 4; }
  int64_t tiles() const {
    return noise ? round_up(quarter(), kCounterTile) / kCounterTile : round_up(codes, kCodeTile) / kCodeTile;
  }
};

struct Gumbel : Codes {
  const void* logits;  // [rows, codes], rows logits_stride apart
  int64_t logits_stride;
};

struct GumbelForward : Gumbel {
  void* latents;     // [rows, width]: the mixture, or where `mixture` is given the sampled rows of the codebook
  float* mixture;    // [rows, width] or null
  int64_t* indices;  // [rows], as are the next four
  float *kl, *maximum, *log_noisy, *log_clean;  // the largest score; logarithms of sums of exponentials relative to it
  uint32_t* packed;  // a workspace of packed_words(): the codebook in the order in which it is read

  int64_t packed_words() const { return tiles() * kCodeTile * padded(width); }
  // Bytes of scratch memory per thread: probabilities, sums of products, row states.
  int64_t scratch() const { return 4 * kRowTile * (kCodeTile + padded(width)) + kRowTile * kRowStateBytes; }
};

struct GumbelBackward : Gumbel {
  const void* grad_latents;                           // [rows, width] or null
  const float* grad_kl;                               // [rows] or null
  const float *kl, *maximum, *log_noisy, *log_clean;  // of the forward pass
  const float* mixture;                               // [rows, width] or null: then `latents` are the mixture
  const void* latents;                                // [rows, width]
  void* grad_logits;                                  // [rows, codes] or null: nobody asked
  void* grad_codebook;  // [codes, width]; null: nobody asked, or it does not come from the mixture
  int64_t splits;       // shares of the rows, each with its own table of the codebook's gradient; see `partial`
  // Workspaces: the latents' gradient in two forms, grad_latents . mixture, and where splits > 1 the shares of the
  // codebook's gradient, to be added in order.
  uint32_t *grad_by_rows, *grad_packed;  // [rows, padded width], [rows, padded width]
  float *delta, *partial;                // [rows], [splits, codes, padded width]

  // The codebook's tile transposed, two tiles of scores, a tile of the codebook's gradient.
  int64_t scratch() const { return 4 * (2 * kCodeTile * padded(width) + 2 * kRowTile * kCodeTile); }
  int64_t split_rows() const { return round_up((rows + splits - 1) / splits, kRowTile); }
};

// A table in the two forms that products read: each row by itself, and packed as the right-hand side of a product over
// the rows, a tile of kRowTile rows at a time.
struct Spread {
  const void* table;  // [rows, width], rows `stride` apart
  int64_t rows, width, stride;
  uint32_t* by_rows;  // [rows, padded width]
  uint32_t* packed;   // [rows, padded width] or null
};

// softmax((features weight^T + bias + g) / tau) @ codebook. Rows are taken a strip at a time, `begin` .. `end` - 1; the
// kernels are called for each strip in turn. Within one, work is shared out by codes: `splits` runs of tiles.
struct Projection : Codes {
  const void* features;  // [rows, channels], rows features_stride apart
  const void* weight;    // [codes, channels]
  const void* bias;      // [codes] or null
  int64_t channels, features_stride;
  int64_t begin, end;            // of the strip
  const uint32_t* feature_rows;  // the strip's features, as Spread has them

  static constexpr int64_t kMostSplits = 32;
  static constexpr int64_t kMostRows = 1024;  // of a strip
  // Rows of a strip of which tables of every code are kept: 32 MB each, but at least 64 rows.
  static constexpr int64_t rows_with_tables(int64_t codes) {
    const int64_t rows = (int64_t(1) << 23) / round_up(codes, kCodeTile) / kRowTile * kRowTile;
    return rows < kRowTile ? kRowTile : rows < kMostRows ? rows : kMostRows;
  }
  int64_t strip() const { return end - begin; }
  int64_t splits() const { return tiles() < kMostSplits ? tiles() : kMostSplits; }
  int64_t first_tile(int64_t split) const { return split * tiles() / splits(); }
  // Of a strip's tables of every code: tile by tile, of each its rows.
  int64_t table_size(int64_t rows) const { return tiles() * rows * kCodeTile; }
};

struct ProjectionForward : Projection {
  void* latents;  // [rows, width]: the mixture, or where `hard` the sampled rows of the codebook
  bool hard;
  int64_t* indices;  // [rows], as are the next four; as of GumbelForward
  float *kl, *maximum, *log_noisy, *log_clean;
  float* distribution;  // [codes] or null: the mean over the rows of softmax(logits)
  // Workspaces: what rows gathered in each split; their sums of codebook rows; the strip's logits, for `distribution`.
  RowTotal* states;  // [splits, strip]
  float* sums;       // [splits, strip, padded width]; null where latents are hard
  float* logits;     // table_size

  int64_t scratch() const {
    return 4 * (kCodeTile * (padded(channels) + padded(width) + 1) + 2 * kRowTile * kCodeTile) +
           kMostRows * kRowStateBytes;
  }
};

struct ProjectionBackward : Projection {
  const void* grad_latents;        // [rows, width], null or not wanted; dense, as are all that follow
  const float* grad_kl;            // [rows] or null
  const float* grad_distribution;  // [codes] or null
  const float *kl, *maximum, *log_noisy, *log_clean;  // of the forward pass
  const float* delta;  // [rows]: grad_latents . mixture, where that is not of these codes alone; else null
  void *grad_features, *grad_weight, *grad_bias;  // null where they are not asked for
  void* grad_codebook;  // the mixture's; null too where that has none; grad_weight where one table is both
  const uint32_t *feature_columns, *grad_rows, *grad_columns;  // the strip's, packed: Spread
  // Workspaces. Tables of the strip: dlogits = terms - total weights - other_total others.
  float* terms;                  // null where no gradient goes through the logits
  float* weights;                // the softmax of scores, or where only that has a gradient, of the logits
  float* others;                 // that of the logits, where both have one and they differ
  float *totals, *other_totals;  // [tiles, strip]: what each tile adds to a row's totals
  float* partial;                // [splits, strip, padded channels]: the features' gradient
  float *wide_weight,
      *wide_codebook;  // [codes, padded channels], [codes, padded width]: between strips, see store_wide
  float* wide_bias;    // [codes]

  bool through_logits() const { return terms != nullptr; }
  int64_t scratch() const {
    return 4 * (kCodeTile * (2 * padded(channels) + 2 * padded(width) + 3) + 3 * kRowTile * kCodeTile + 2 * kMostRows);
  }
};

// In the order of METRICS in dalle_kernels/codebook/vq/contract.py.
enum class VqMetric : int64_t { euclidean, distance, dot, cosine };

constexpr int64_t kMostNearest = 8;
constexpr uint32_t kVqStream = 2, kHeadStep = 256;  // VQ_STREAM and HEAD_STEP of dalle_kernels/noise.py

struct Vq {
  const void* features;  // [rows, width]
  const void* codebook;  // [codes, width]
  int64_t rows, codes, width;
  VqMetric metric;
  int64_t k;                 // nearest rows, at most kMostNearest
  float temperature;         // of the noise; 0 for none
  uint64_t seed, first_row;  // of the noise
  uint32_t stream;           // likewise
  void* nearest;             // [rows, k, width], as are the next two
  int64_t* indices;          // [rows, k]
  float* squared_distance;   // [rows, k]
  float* norms;              // [codes], a workspace: see vq_norms

  static constexpr int64_t kNoiseCodes = 24;  // whose noise is made at once
  // A tile of features, and one of noise.
  int64_t scratch() const { return 4 * kRowTile * (padded(width) + kNoiseCodes); }
};

struct VqBackward {
  const float* grad;     // [rows, k]
  const void* features;  // [rows, width]
  const void* nearest;   // [rows, k, width]
  int64_t rows, codes, width, k;
  void* grad_features;
  void* grad_codebook;
  // The choices of each code, row x k + place, in ascending order: members[starts[k]] .. members[starts[k + 1]].
  const int64_t *starts, *members;
  bool add = false;  // to what grad_codebook holds
};

// Functions take a range of their unit of work, and may run at once on disjoint ranges.
struct CodebookKernels {
  void (*gumbel_pack)(const GumbelForward&, int64_t tile, int64_t tile_end);
  void (*gumbel_forward)(const GumbelForward&, int64_t row, int64_t row_end, void* scratch);
  void (*gumbel_prepare)(const GumbelBackward&, int64_t row_tile, int64_t row_tile_end);
  void (*gumbel_backward)(const GumbelBackward&, int64_t task, int64_t task_end, void* scratch);  // tiles() * splits
  void (*gumbel_collect)(const GumbelBackward&, int64_t code, int64_t code_end);                  // adds up the shares
  void (*spread)(const Spread&, int64_t row_tile, int64_t row_tile_end);
  // Of a strip: the scores of splits, their sums in every row, and after that the distribution in every tile.
  void (*projection_scores)(const ProjectionForward&, int64_t split, int64_t split_end, void* scratch);
  void (*projection_finish)(const ProjectionForward&, int64_t row, int64_t row_end);
  void (*projection_distribution)(const ProjectionForward&, int64_t tile, int64_t tile_end);
  // Of a strip: its tables, tile by tile; the gradients of codes, in splits; those of features.
  void (*projection_tables)(const ProjectionBackward&, int64_t tile, int64_t tile_end, void* scratch);
  void (*projection_gradients)(const ProjectionBackward&, int64_t split, int64_t split_end, void* scratch);
  void (*projection_collect)(const ProjectionBackward&, int64_t row, int64_t row_end);
  // norms[k] = |c_k|^2 / 2; for cosines 1 / |c_k|, 0 where that is zero.
  void (*vq_norms)(const Vq&, int64_t code, int64_t code_end);
  void (*vq_forward)(const Vq&, int64_t row, int64_t row_end, void* scratch);
  void (*vq_grad_features)(const VqBackward&, int64_t row, int64_t row_end);
  void (*vq_grad_codebook)(const VqBackward&, int64_t code, int64_t code_end);
  // grad_codebook[k] = the sum of grad's rows that chose code k: the straight-through share of gumbel_lookup.
  void (*scatter_rows)(const void* grad, const VqBackward&, int64_t code, int64_t code_end);
  // The same of features' rows in float32, whatever they are.
  void (*sum_rows)(const VqBackward&, int64_t code, int64_t code_end);
  // The four words of the 16 counters from `counter`, and the noise that they make: the generator itself, for tests.
  void (*noise_words)(uint64_t seed, uint64_t row, uint32_t stream, uint32_t counter, uint32_t words[4][16],
                      float noise[4][16]);
};

struct CodebookTable {
  CodebookKernels f32, bf16;
};

DALLE_KERNEL_TABLE(CodebookTable, codebook_kernels)

}  // namespace dalle
