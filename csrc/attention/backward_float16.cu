#include "attention/backward_kernel.cuh"

void attention_statistics_float16(const AttentionStatistics& parameters, void* stream) {
  run_statistics<Float16>(parameters, stream);
}

void attention_backward_queries_float16(const AttentionBackward& parameters, void* stream) {
  run_queries<Float16>(parameters, stream);
}

void attention_backward_keys_float16(const AttentionBackward& parameters, void* stream) {
  run_keys<Float16>(parameters, stream);
}
