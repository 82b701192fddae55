// Runs every codebook, likelihood and sampling kernel of every instruction set on buffers of exactly the size it is
// entitled to, for the address and undefined-behaviour sanitizers (tests/test_sanitizers.py builds and runs it), and
// checks the results against plain double loops.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bf16.h"
#include "codebook/kernels.h"
#include "isa.h"
#include "likelihood/kernels.h"
#include "sampling/kernels.h"

using namespace dalle;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("failed: %s (%s)\n", what.c_str(), isa_name(current_isa()));
}

template <class T>
T narrow(float x);
template <>
float narrow(float x) {
  return x;
}
template <>
bf16 narrow(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  return {uint16_t(word >> 16)};
}

std::mt19937 generator(1);

template <class T>
std::vector<T> random_table(int64_t size, float scale = 1.f) {
  std::normal_distribution<float> normal(0.f, scale);
  std::vector<T> table;
  for (int64_t i = 0; i < size; i++) table.push_back(narrow<T>(normal(generator)));
  table.shrink_to_fit();
  return table;
}

template <class T>
std::vector<T> poisoned(int64_t size) {
  std::vector<T> table(static_cast<size_t>(size));
  std::memset((void*)table.data(), 0xFF, table.size() * sizeof(T));  // NaN, or -1
  return table;
}

struct Scratch {
  explicit Scratch(int64_t bytes) : memory(std::aligned_alloc(64, size_t(round_up(bytes, 64))), &std::free) {
    std::memset(memory.get(), 0xFF, size_t(round_up(bytes, 64)));
  }
  std::unique_ptr<void, void (*)(void*)> memory;
};

// The noise, from the kernels' own generator: its words are checked against published vectors elsewhere.
float noise_of(const CodebookKernels& kernels, uint64_t seed, int64_t row, int64_t code, int64_t codes,
               uint32_t stream) {
  const int64_t quarter = (codes + 3) / 4;
  uint32_t words[4][16];
  float noise[4][16];
  kernels.noise_words(seed, uint64_t(row), stream, uint32_t(code % quarter), words, noise);
  return noise[code / quarter][0];
}

template <class T>
void gumbel(const CodebookKernels& kernels, int64_t rows, int64_t codes, int64_t width, bool hard, bool noise) {
  const std::string name =
      "gumbel " + std::to_string(rows) + " x " + std::to_string(codes) + " -> " + std::to_string(width);
  const auto logits = random_table<T>(rows * codes, 2.f), codebook = random_table<T>(codes * width);
  const Gumbel problem{{codebook.data(), rows, codes, width, 0.7f, noise, 0x9876543210FEDCBAull}, logits.data(), codes};
  auto latents = poisoned<T>(rows * width);
  auto mixture = poisoned<float>(rows * width);
  auto indices = poisoned<int64_t>(rows);
  auto kl = poisoned<float>(rows), maximum = poisoned<float>(rows);
  auto log_noisy = poisoned<float>(rows), log_clean = poisoned<float>(rows);
  GumbelForward forward{problem,          latents.data(),   hard ? mixture.data() : nullptr,
                        indices.data(),   kl.data(),        maximum.data(),
                        log_noisy.data(), log_clean.data(), nullptr};
  auto packed_codebook = poisoned<uint32_t>(forward.packed_words());
  forward.packed = packed_codebook.data();
  kernels.gumbel_pack(forward, 0, forward.tiles());
  const Scratch forward_scratch(forward.scratch());
  kernels.gumbel_forward(forward, 0, rows / 2, forward_scratch.memory.get());
  kernels.gumbel_forward(forward, rows / 2, rows, forward_scratch.memory.get());

  for (int64_t n = 0; n < rows; n++) {
    std::vector<double> mixed(size_t(width), 0.0);
    double total = 0, best = -1e300;
    int64_t index = 0;
    for (int64_t k = 0; k < codes; k++) {
      const double score =
          to_float(logits[size_t(n * codes + k)]) + (noise ? noise_of(kernels, problem.seed, n, k, codes, 0) : 0.f);
      if (score > best) best = score, index = k;
      const double weight = std::exp(score / problem.temperature);
      total += weight;
      for (int64_t d = 0; d < width; d++) mixed[size_t(d)] += weight * to_float(codebook[size_t(k * width + d)]);
    }
    expect(indices[size_t(n)] == index, name + ": index");
    const double lse = maximum[size_t(n)] / problem.temperature + log_noisy[size_t(n)];
    expect(std::fabs(lse - std::log(total)) < 1e-5 * (1 + std::fabs(std::log(total))), name + ": log-sum-exp");
    for (int64_t d = 0; d < width; d++) {
      const double want = mixed[size_t(d)] / total;
      const double got = hard ? mixture[size_t(n * width + d)] : to_float(latents[size_t(n * width + d)]);
      expect(std::fabs(got - want) < (sizeof(T) == 4 ? 1e-5 : 0.03), name + ": latents");
    }
  }

  const auto grad_latents = random_table<T>(rows * width);
  const auto grad_kl = random_table<float>(rows);
  for (const bool has_latents : {true, false}) {
    auto grad_logits = poisoned<T>(rows * codes), grad_codebook = poisoned<T>(codes * width);
    GumbelBackward backward{problem};
    backward.noise = noise && has_latents;
    backward.grad_latents = has_latents ? grad_latents.data() : nullptr;
    backward.grad_kl = grad_kl.data();
    backward.kl = kl.data(), backward.maximum = maximum.data();
    backward.log_noisy = log_noisy.data(), backward.log_clean = log_clean.data();
    backward.mixture = hard ? mixture.data() : nullptr;
    backward.latents = latents.data();
    backward.grad_logits = grad_logits.data();
    backward.grad_codebook = has_latents && !hard ? grad_codebook.data() : nullptr;
    backward.splits = rows > 64 ? 2 : 1;
    auto by_rows = poisoned<uint32_t>(rows * padded(width)), packed = poisoned<uint32_t>(rows * padded(width));
    auto delta = poisoned<float>(rows), partial = poisoned<float>(backward.splits * codes * padded(width));
    backward.grad_by_rows = by_rows.data(), backward.grad_packed = packed.data();
    backward.delta = delta.data(), backward.partial = partial.data();
    const Scratch scratch(backward.scratch());
    if (has_latents) kernels.gumbel_prepare(backward, 0, round_up(rows, kRowTile) / kRowTile);
    kernels.gumbel_backward(backward, 0, backward.tiles() * backward.splits, scratch.memory.get());
    if (backward.grad_codebook != nullptr && backward.splits > 1) kernels.gumbel_collect(backward, 0, codes);
    for (const T value : grad_logits) expect(std::isfinite(to_float(value)), name + ": dlogits");
    if (backward.grad_codebook == nullptr) continue;
    for (const T value : grad_codebook) expect(std::isfinite(to_float(value)), name + ": dcodebook");
    const auto whole = grad_codebook;
    backward.grad_logits = nullptr;
    kernels.gumbel_backward(backward, 0, backward.tiles() * backward.splits, scratch.memory.get());
    if (backward.splits > 1) kernels.gumbel_collect(backward, 0, codes);
    expect(std::memcmp(whole.data(), grad_codebook.data(), whole.size() * sizeof(T)) == 0, name + ": dcodebook alone");
  }
}

// The lookup from features, in strips of `strip` rows.
template <class T>
void projection(const CodebookKernels& kernels, int64_t rows, int64_t channels, int64_t codes, int64_t width, bool hard,
                bool noise, int64_t strip) {
  const std::string name = "projection " + std::to_string(rows) + " x " + std::to_string(channels) + " x " +
                           std::to_string(codes) + " -> " + std::to_string(width);
  const auto features = random_table<T>(rows * channels), weight = random_table<T>(codes * channels);
  const auto bias = random_table<T>(codes), codebook = random_table<T>(codes * width);
  const float temperature = noise ? 0.7f : 1.f;
  const Projection problem{{codebook.data(), rows, codes, width, temperature, noise, 0x9876543210FEDCBAull},
                           features.data(),
                           weight.data(),
                           noise ? bias.data() : nullptr,
                           channels,
                           channels,
                           0,
                           0,
                           nullptr};
  auto latents = poisoned<T>(rows * width);
  auto indices = poisoned<int64_t>(rows);
  auto kl = poisoned<float>(rows), maximum = poisoned<float>(rows), distribution = poisoned<float>(codes);
  auto log_noisy = poisoned<float>(rows), log_clean = poisoned<float>(rows);
  auto feature_rows = poisoned<uint32_t>(strip * padded(channels)), feature_columns = feature_rows;
  ProjectionForward forward{problem};
  forward.latents = latents.data(), forward.hard = hard, forward.indices = indices.data(), forward.kl = kl.data();
  forward.maximum = maximum.data(), forward.log_noisy = log_noisy.data(), forward.log_clean = log_clean.data();
  forward.distribution = distribution.data(), forward.feature_rows = feature_rows.data();
  std::vector<RowTotal> states(size_t(forward.splits() * strip));
  auto sums = poisoned<float>(hard ? 1 : forward.splits() * strip * padded(width));
  auto logits = poisoned<float>(forward.table_size(strip));
  forward.states = states.data(), forward.sums = hard ? nullptr : sums.data(), forward.logits = logits.data();
  const Scratch forward_scratch(forward.scratch());
  const auto spread = [&](const auto& table, int64_t begin, int64_t end, int64_t size, auto& by_rows, auto& packed) {
    kernels.spread({table.data() + begin * size, end - begin, size, size, by_rows.data(), packed.data()}, 0,
                   round_up(end - begin, kRowTile) / kRowTile);
  };
  for (int64_t begin = 0; begin < rows; begin += strip) {
    forward.begin = begin, forward.end = std::min(rows, begin + strip);
    spread(features, begin, forward.end, channels, feature_rows, feature_columns);
    kernels.projection_scores(forward, 0, forward.splits(), forward_scratch.memory.get());
    kernels.projection_finish(forward, 0, forward.strip());
    kernels.projection_distribution(forward, 0, forward.tiles());
  }

  std::vector<double> mean(size_t(codes), 0.0);
  for (int64_t n = 0; n < rows; n++) {
    std::vector<double> mixed(size_t(width), 0.0), clean;
    double total = 0, clean_total = 0, best = -1e300;
    int64_t index = 0;
    for (int64_t k = 0; k < codes; k++) {
      double logit = noise ? to_float(bias[size_t(k)]) : 0;
      for (int64_t c = 0; c < channels; c++)
        logit += double(to_float(features[size_t(n * channels + c)])) * to_float(weight[size_t(k * channels + c)]);
      const double score = logit + (noise ? noise_of(kernels, problem.seed, n, k, codes, 0) : 0.f);
      if (score > best) best = score, index = k;
      const double share = std::exp(score / temperature);
      total += share, clean_total += std::exp(logit), clean.push_back(std::exp(logit));
      for (int64_t d = 0; d < width; d++) mixed[size_t(d)] += share * to_float(codebook[size_t(k * width + d)]);
    }
    for (int64_t k = 0; k < codes; k++) mean[size_t(k)] += clean[size_t(k)] / clean_total / double(rows);
    expect(indices[size_t(n)] == index, name + ": index");
    const double lse = maximum[size_t(n)] / temperature + log_noisy[size_t(n)];
    expect(std::fabs(lse - std::log(total)) < 2e-5 * (1 + std::fabs(std::log(total))), name + ": log-sum-exp");
    for (int64_t d = 0; d < width; d++) {
      const double want = hard ? to_float(codebook[size_t(index * width + d)]) : mixed[size_t(d)] / total;
      expect(std::fabs(to_float(latents[size_t(n * width + d)]) - want) < (sizeof(T) == 4 ? 2e-5 : 0.03),
             name + ": latents");
    }
  }
  for (int64_t k = 0; k < codes; k++)
    expect(std::fabs(distribution[size_t(k)] - mean[size_t(k)]) < 1e-5, name + ": distribution");

  const auto grad_latents = random_table<T>(rows * width);
  const auto grad_kl = random_table<float>(rows), grad_distribution = random_table<float>(codes);
  for (const bool has_latents : {true, false}) {
    auto grad_features = poisoned<T>(rows * channels), grad_weight = poisoned<T>(codes * channels);
    auto grad_bias = poisoned<T>(codes), grad_codebook = poisoned<T>(codes * width);
    auto grad_rows = poisoned<uint32_t>(strip * padded(width)), grad_columns = grad_rows;
    ProjectionBackward backward{problem};
    backward.noise = noise && has_latents;
    const bool mixes = has_latents && !hard, apart = has_latents && noise;
    backward.grad_latents = has_latents ? grad_latents.data() : nullptr;
    backward.grad_kl = grad_kl.data(), backward.grad_distribution = grad_distribution.data();
    backward.kl = kl.data(), backward.maximum = maximum.data();
    backward.log_noisy = log_noisy.data(), backward.log_clean = log_clean.data();
    backward.grad_features = grad_features.data(), backward.grad_weight = grad_weight.data();
    backward.grad_bias = grad_bias.data(), backward.grad_codebook = mixes ? grad_codebook.data() : nullptr;
    backward.feature_rows = feature_rows.data(), backward.feature_columns = feature_columns.data();
    backward.grad_rows = grad_rows.data(), backward.grad_columns = grad_columns.data();
    auto terms = poisoned<float>(backward.table_size(strip)), weights = terms, others = terms;
    auto totals = poisoned<float>(backward.tiles() * strip), other_totals = totals;
    auto partial = poisoned<float>(backward.splits() * strip * padded(channels));
    auto wide_weight = poisoned<float>(codes * padded(channels)),
         wide_codebook = poisoned<float>(codes * padded(width));
    auto wide_bias = poisoned<float>(codes);
    backward.terms = terms.data(), backward.weights = weights.data();
    backward.others = apart ? others.data() : nullptr;
    backward.totals = totals.data(), backward.other_totals = apart ? other_totals.data() : nullptr;
    backward.partial = partial.data(), backward.wide_bias = wide_bias.data();
    backward.wide_weight = sizeof(T) == 2 ? wide_weight.data() : nullptr;
    backward.wide_codebook = sizeof(T) == 2 ? wide_codebook.data() : nullptr;
    const Scratch scratch(backward.scratch());
    for (int64_t begin = 0; begin < rows; begin += strip) {
      backward.begin = begin, backward.end = std::min(rows, begin + strip);
      spread(features, begin, backward.end, channels, feature_rows, feature_columns);
      spread(grad_latents, begin, backward.end, width, grad_rows, grad_columns);
      kernels.projection_tables(backward, 0, backward.tiles(), scratch.memory.get());
      kernels.projection_gradients(backward, 0, backward.splits(), scratch.memory.get());
      kernels.projection_collect(backward, 0, backward.strip());
    }
    double of_biases = 0;
    for (const T value : grad_features) expect(std::isfinite(to_float(value)), name + ": dfeatures");
    for (const T value : grad_weight) expect(std::isfinite(to_float(value)), name + ": dweight");
    for (const T value : grad_bias) of_biases += to_float(value);
    // Softmaxes do not see what is common to all logits.
    expect(std::fabs(of_biases) < (sizeof(T) == 4 ? 1e-3 : 0.5) * double(rows + 1), name + ": dbias");
    if (mixes)
      for (const T value : grad_codebook) expect(std::isfinite(to_float(value)), name + ": dcodebook");
  }
}

template <class T>
void vq(const CodebookKernels& kernels, int64_t rows, int64_t codes, int64_t width, VqMetric metric, int64_t k,
        float temperature) {
  const auto features = random_table<T>(rows * width), codebook = random_table<T>(codes * width);
  auto indices = poisoned<int64_t>(rows * k);
  auto distance = poisoned<float>(rows * k), norms = poisoned<float>(codes);
  auto nearest = poisoned<T>(rows * k * width);
  const Vq problem{
      features.data(), codebook.data(), rows,           codes,           width,       metric, k, temperature, 77, 5,
      kVqStream,       nearest.data(),  indices.data(), distance.data(), norms.data()};
  const Scratch scratch(problem.scratch());
  if (metric != VqMetric::dot) kernels.vq_norms(problem, 0, codes);
  kernels.vq_forward(problem, 0, rows / 2, scratch.memory.get());
  kernels.vq_forward(problem, rows / 2, rows, scratch.memory.get());
  std::vector<int64_t> starts(size_t(codes) + 1), members;
  for (int64_t code = 0; code < codes; code++) {
    for (int64_t choice = 0; choice < rows * k; choice++)
      if (indices[size_t(choice)] == code) members.push_back(choice);
    starts[size_t(code) + 1] = int64_t(members.size());
  }
  for (int64_t n = 0; n < rows; n++) {
    double best = -1e300;
    const auto score = [&](int64_t code) {
      double product = 0, squares = 0, of_row = 0, of_code = 0;
      for (int64_t d = 0; d < width; d++) {
        const double f = to_float(features[size_t(n * width + d)]), c = to_float(codebook[size_t(code * width + d)]);
        product += f * c, squares += (f - c) * (f - c), of_row += f * f, of_code += c * c;
      }
      const double plain = metric == VqMetric::euclidean  ? -squares
                           : metric == VqMetric::distance ? -std::sqrt(squares)
                           : metric == VqMetric::dot      ? product
                                                          : product / std::sqrt(of_row * of_code);
      return plain + (temperature > 0 ? double(temperature * noise_of(kernels, 77, 5 + n, code, codes, 2)) : 0.0);
    };
    for (int64_t code = 0; code < codes; code++) best = std::fmax(best, score(code));
    expect(score(indices[size_t(n * k)]) >= best - 1e-4 * (1 + std::fabs(best)), "vq: the best");
    for (int64_t place = 1; place < k; place++)
      expect(score(indices[size_t(n * k + place)]) <=
                 score(indices[size_t(n * k + place - 1)]) + 1e-4 * (1 + std::fabs(best)),
             "vq: the order");
    for (int64_t choice = n * k; choice < (n + 1) * k; choice++) {
      double squares = 0;
      for (int64_t d = 0; d < width; d++)
        squares += std::pow(double(to_float(features[size_t(n * width + d)])) -
                                to_float(codebook[size_t(indices[size_t(choice)] * width + d)]),
                            2);
      expect(std::fabs(distance[size_t(choice)] - squares) <= 1e-5 * squares + 1e-6, "vq: distance");
    }
  }
  expect(int64_t(members.size()) == rows * k, "vq: indices");
  const auto grad = random_table<float>(rows * k);
  auto grad_features = poisoned<T>(rows * width), grad_codebook = poisoned<T>(codes * width);
  VqBackward backward{grad.data(), features.data(),      nearest.data(),       rows,          codes,         width,
                      k,           grad_features.data(), grad_codebook.data(), starts.data(), members.data()};
  kernels.vq_grad_features(backward, 0, rows);
  kernels.vq_grad_codebook(backward, 0, codes);
  for (const T value : grad_features) expect(std::isfinite(to_float(value)), "vq: dfeatures");
  for (const T value : grad_codebook) expect(std::isfinite(to_float(value)), "vq: dcodebook");
  if (k > 1) return;
  kernels.scatter_rows(features.data(), backward, 0, codes);
  auto sums = poisoned<float>(codes * width);
  backward.grad_codebook = sums.data();
  kernels.sum_rows(backward, 0, codes);
  for (const float value : sums) expect(std::isfinite(value), "vq: sums");
}

template <class T>
void sampling(SampleRows sample, const CodebookKernels& kernels, int64_t rows, int64_t codes, int64_t top_k,
              float top_p) {
  const auto logits = random_table<T>(rows * codes, 2.f), unconditional = random_table<T>(rows * codes, 2.f);
  auto tokens = poisoned<int64_t>(rows);
  const Sampling problem{
      logits.data(), unconditional.data(), rows, codes, codes, codes, 1.5f, 0.8f, top_k, top_p, 77, 0, tokens.data()};
  const Scratch scratch(problem.scratch());
  sample(problem, 0, rows, scratch.memory.get());
  for (int64_t n = 0; n < rows; n++) {
    expect(0 <= tokens[size_t(n)] && tokens[size_t(n)] < codes, "sampling: token");
    if (top_k != 0 || top_p != 1) continue;
    double best = -1e300;
    int64_t want = 0;
    for (int64_t k = 0; k < codes; k++) {
      const double u = to_float(unconditional[size_t(n * codes + k)]), c = to_float(logits[size_t(n * codes + k)]);
      const double score = (u + 1.5 * (c - u)) / 0.8 + noise_of(kernels, 77, n, k, codes, 1);
      if (score > best) best = score, want = k;
    }
    expect(tokens[size_t(n)] == want, "sampling: argmax");
  }
}

template <class T>
void laplace(const LaplaceKernels<T>& kernels, int64_t count) {
  std::uniform_real_distribution<float> uniform(0.1f, 0.9f);
  std::vector<T> pixels;
  for (int64_t i = 0; i < count; i++) pixels.push_back(narrow<T>(uniform(generator)));
  pixels.shrink_to_fit();
  const auto mu = random_table<T>(count), log_b = random_table<T>(count);
  const auto grad = random_table<float>(count);
  auto nll = poisoned<float>(count);
  auto dmu = poisoned<T>(count), dlog_b = poisoned<T>(count);
  kernels.forward({pixels.data(), mu.data(), log_b.data(), nll.data(), count});
  kernels.backward({grad.data(), pixels.data(), mu.data(), log_b.data(), dmu.data(), dlog_b.data(), count});
  for (size_t i = 0; i < size_t(count); i++) {
    const double x = to_float(pixels[i]), b = std::exp(double(to_float(log_b[i])));
    const double z = (std::log(x / (1 - x)) - to_float(mu[i])) / b;
    expect(std::abs(nll[i] - (std::log(2 * b * x * (1 - x)) + std::abs(z))) < 1e-5 * (1 + std::abs(z)), "laplace: nll");
    const double slope = grad[i] * (z < 0 ? 1 : -1) / b, scale = grad[i] * (1 - std::abs(z));
    expect(std::abs(to_float(dmu[i]) - slope) < 0.01 * std::abs(slope), "laplace: dmu");
    expect(std::abs(to_float(dlog_b[i]) - scale) < 0.01 * (std::abs(scale) + std::abs(grad[i] * z)), "laplace: dlog_b");
  }
}

template <class T>
void run(const CodebookKernels& kernels, SampleRows sample, const LaplaceKernels<T>& likelihood) {
  for (const int64_t count : {1, 7, 16, 37}) laplace<T>(likelihood, count);
  for (const auto& [rows, codes, width] :
       {std::array<int64_t, 3>{1, 1, 1}, {3, 2, 5}, {2, 5, 17}, {67, 133, 40}, {5, 300, 72}}) {
    gumbel<T>(kernels, rows, codes, width, false, true);
    gumbel<T>(kernels, rows, codes, width, true, true);
    gumbel<T>(kernels, rows, codes, width, true, false);
    for (const int64_t strip : {rows, std::min(rows, kRowTile)}) {
      projection<T>(kernels, rows, width, codes, 1 + width / 2, false, true, strip);
      projection<T>(kernels, rows, 19, codes, width, true, false, strip);
    }
    for (const VqMetric metric : {VqMetric::euclidean, VqMetric::distance, VqMetric::dot, VqMetric::cosine})
      for (const float temperature : {0.f, 0.7f}) {
        vq<T>(kernels, rows, codes, width, metric, 1, temperature);
        vq<T>(kernels, rows, codes, width, metric, std::min<int64_t>(codes, 3), temperature);
      }
  }
  for (const int64_t codes : {1, 3, 17, 64, 333})
    for (const auto& [top_k, top_p] : {std::pair<int64_t, float>{0, 1.f}, {5, 1.f}, {0, 0.5f}, {200, 0.99f}})
      sampling<T>(sample, kernels, 3, codes, top_k, top_p);
}

}  // namespace

int main() {
  for (const std::string& name : supported_isas()) {
    set_isa(name);
    const CodebookTable& codebook = codebook_kernels();
    const SamplingTable& sampling = sampling_kernels();
    const LaplaceTable& laplace = laplace_kernels();
    run<float>(codebook.f32, sampling.f32, laplace.f32);
    run<bf16>(codebook.bf16, sampling.bf16, laplace.bf16);
    std::printf("%s done\n", name.c_str());
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
