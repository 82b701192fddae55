// The codebook's kernels for the instruction set that simd.h was set to: all that a translation unit includes.
#pragma once

#include "codebook/gumbel.h"
#include "codebook/projection.h"
#include "codebook/vq.h"
#include "noise.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

// The words of 16 counters from `counter`, and their noise: the generator by itself, for tests.
static void noise_words_at(uint64_t seed, uint64_t row, uint32_t stream, uint32_t counter, uint32_t words[4][16],
                           float noise[4][16]) {
  const NoiseKeys keys(seed);
  for (int i = 0; i < 16; i += kLanes) {
    U lanes[1][4];
    noise_words(keys, NoiseRow(keys, row, stream), counter + uint32_t(i), lanes);
    for (int word = 0; word < 4; word++) {
      store(words[word] + i, lanes[0][word]);
      store(noise[word] + i, gumbel(lanes[0][word]));
    }
  }
}

template <class T>
constexpr CodebookKernels kCodebookKernels{
    gumbel_pack<T>,    gumbel_forward<T>, gumbel_prepare<T>, gumbel_backward<T>,  gumbel_collect<T>,
    spread<T>, projection_scores<T>, projection_finish<T>, projection_distribution<T>, projection_tables<T>,
    projection_gradients<T>, projection_collect<T>, vq_norms<T>,
    vq_forward<T>,     vq_grad_features<T>, vq_grad_codebook<T>, scatter_rows<T>, sum_rows<T>,
    noise_words_at};

const CodebookTable& codebook_kernels() {
#if defined(DALLE_PAIRS)
  static const CodebookTable table{DALLE_WITHOUT_PAIRS::codebook_kernels().f32, kCodebookKernels<bf16>};
#else
  static constexpr CodebookTable table{kCodebookKernels<float>, kCodebookKernels<bf16>};
#endif
  return table;
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
