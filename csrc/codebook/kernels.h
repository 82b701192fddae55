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

struct Gumbel {
  const void* logits;    // [rows, codes], rows logits_stride apart
  const void* codebook;  // [codes, width]
  int64_t rows, codes, width, logits_stride;
  float temperature;
  bool noise;
  uint64_t seed;

  int64_t quarter() const { return (codes + 3) / 4; }
  int64_t tiles() const {
    return noise ? round_up(quarter(), kCounterTile) / kCounterTile : round_up(codes, kCodeTile) / kCodeTile;
  }
};

struct GumbelForward : Gumbel {
  void* latents;     // [rows, width]: the mixture, or where `mixture` is given the sampled rows of the codebook
  float* mixture;    // [rows, width] or null
  int64_t* indices;  // [rows], as are the next four
  float *kl, *maximum, *log_noisy, *log_clean;  // the largest score; logarithms of sums of exponentials relative to it
  uint32_t* packed;  // a workspace of packed_words(): the codebook in the order in which it is read

  int64_t packed_words() const { return tiles() * kCodeTile * padded(width); }
  // Bytes of scratch memory per thread: probabilities, sums of products, row states.
  int64_t scratch() const { return 4 * kRowTile * (kCodeTile + padded(width)) + kRowTile * 256; }
};

struct GumbelBackward : Gumbel {
  const void* grad_latents;                           // [rows, width] or null
  const float* grad_kl;                               // [rows] or null
  const float *kl, *maximum, *log_noisy, *log_clean;  // of the forward pass
  const float* mixture;                               // [rows, width] or null: then `latents` are the mixture
  const void* latents;                                // [rows, width]
  void* grad_logits;                                  // [rows, codes]
  void* grad_codebook;                                // [codes, width]; null: not the mixture's business
  int64_t splits;  // shares of the rows, each with its own table of the codebook's gradient; see `partial`
  // Workspaces: the latents' gradient in two forms, grad_latents . mixture, and where splits > 1 the shares of the
  // codebook's gradient, to be added in order.
  uint32_t *grad_by_rows, *grad_packed;  // [rows, padded width], [rows, padded width]
  float *delta, *partial;                // [rows], [splits, codes, padded width]

  // The codebook's tile transposed, two tiles of scores, a tile of the codebook's gradient.
  int64_t scratch() const { return 4 * (2 * kCodeTile * padded(width) + 2 * kRowTile * kCodeTile); }
  int64_t split_rows() const { return round_up((rows + splits - 1) / splits, kRowTile); }
};

// In the order of METRICS in dalle_kernels/codebook/vq/contract.py.
enum class VqMetric : int64_t { euclidean, distance, dot, cosine };

constexpr int64_t kMostNearest = 8;

struct Vq {
  const void* features;  // [rows, width]
  const void* codebook;  // [codes, width]
  int64_t rows, codes, width;
  VqMetric metric;
  int64_t k;          // nearest rows, at most kMostNearest
  float temperature;  // of the noise; 0 for none
  uint64_t seed;
  int64_t noise_row;        // of the first row
  void* nearest;            // [rows, k, width], as are the next two
  int64_t* indices;         // [rows, k]
  float* squared_distance;  // [rows, k]
  float* norms;             // [codes], a workspace: see vq_norms

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
};

// Functions take a range of their unit of work, and may run at once on disjoint ranges.
struct CodebookKernels {
  void (*gumbel_pack)(const GumbelForward&, int64_t tile, int64_t tile_end);
  void (*gumbel_forward)(const GumbelForward&, int64_t row, int64_t row_end, void* scratch);
  void (*gumbel_prepare)(const GumbelBackward&, int64_t row_tile, int64_t row_tile_end);
  void (*gumbel_backward)(const GumbelBackward&, int64_t task, int64_t task_end, void* scratch);  // tiles() * splits
  void (*gumbel_collect)(const GumbelBackward&, int64_t code, int64_t code_end);                  // adds up the shares
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
