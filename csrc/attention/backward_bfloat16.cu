#include "attention/backward_kernel.cuh"

void attention_statistics_bfloat16(const AttentionStatistics& parameters, void* stream) {
  run_statistics<Bfloat16>(parameters, stream);
}

void attention_backward_queries_bfloat16(const AttentionBackward& parameters, void* stream) {
  run_queries<Bfloat16>(parameters, stream);
}

void attention_backward_keys_bfloat16(const AttentionBackward& parameters, void* stream) {
  run_keys<Bfloat16>(parameters, stream);
}
