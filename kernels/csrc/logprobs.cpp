// Log-probability, entropy and log-sum-exp of each token under a linear head, without storing logits.
//
//   z    = softcap(logit_scale * (h W^T + b)) / temperature      N rows, H hidden, V vocabulary
//   lse  = max z + log s,  s = sum exp(z - max),  ent = log s - t / s,  t = sum exp(z - max) (z - max)
//
// A tile of logits is [kVocab, kTokens] fp32 with a token per column, so a vector lane is a token: the running (max, s,
// t) of 16 tokens live in three registers, no horizontal reduction is needed, and the weight is read in its own layout
// (only hidden, the smaller operand, is packed). The tile stays in cache between its GEMM and its statistics.
//
// Every split of the vocabulary has its own partial statistics, merged in order: results depend neither on the number
// of threads nor on the other rows of the batch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "bf16_units.h"
#include "tile_kernels.h"

namespace {

using namespace luffy;

constexpr int64_t kVocab = 256;   // vocabulary entries of a tile, fewer where H is large
constexpr int64_t kSplit = 2048;  // vocabulary entries whose partial statistics one task owns

void pick_targets(const float* tile, int64_t count, int64_t first, int64_t token, const int64_t* targets, float* out) {
  for (int64_t i = 0; i < kTokens; ++i) {
    const int64_t v = targets[token + i] - first;
    if (v >= 0 && v < count) out[token + i] = tile[v * kTokens + i];
  }
}

// Produces [count, kTokens] logit tiles. Hidden is prepared once; a weight tile is read where it lies.
class TileGemm {
 public:
  // hidden: [n, H] contiguous, rows padded to `padded` with zeros; weight: [V, H] contiguous, same dtype.
  TileGemm(const at::Tensor& hidden, const at::Tensor& weight, int64_t padded)
      : weight_(weight), width_(weight.size(1)), blocks_(padded / kTokens) {
    const bool bf16 = weight.scalar_type() == at::kBFloat16;
    packed_ = bf16 && width_ % 2 == 0 && has_bf16_units();
    auto rows = at::zeros({padded, width_}, hidden.options().dtype(packed_ ? at::kBFloat16 : at::kFloat));
    rows.narrow(0, 0, hidden.size(0)).copy_(hidden);
    // [block, token, H] -> [block, H, token]; VNNI keeps pairs of H adjacent: [block, H/2, token, 2].
    auto blocks = rows.view({blocks_, kTokens, width_});
    hidden_ = packed_ ? blocks.view({blocks_, kTokens, width_ / 2, 2}).transpose(1, 2).contiguous()
                      : blocks.transpose(1, 2).contiguous();
  }

  // Weight rows [first, first + count) as the operand of `tile`; widened where the product is done in fp32.
  at::Tensor weight_rows(int64_t first, int64_t count) const {
    return packed_ ? weight_ : weight_.narrow(0, first, count).to(at::kFloat);
  }

  void tile(const at::Tensor& rows, int64_t first, int64_t count, int64_t block, float* out) const {
    if (packed_) {
      at::native::cpublas::brgemm(count, kTokens, width_, width_, kTokens, kTokens, /*add_C=*/false,
                                  weight_.const_data_ptr<at::BFloat16>() + first * width_,
                                  hidden_.const_data_ptr<at::BFloat16>() + block * width_ * kTokens, out);
      return;
    }
    auto result = at::from_blob(out, {count, kTokens}, at::kFloat);
    at::mm_out(result, rows, hidden_[block]);
  }

  void release() const {
    if (packed_) at::native::cpublas::brgemm_release();
  }

 private:
  at::Tensor weight_, hidden_;
  int64_t width_, blocks_;
  bool packed_ = false;
};

// Statistics of one split of the vocabulary, [first, last), for every token.
void sweep_split(const TileGemm& gemm, int64_t first, int64_t last, int64_t height, int64_t padded,
                 const int64_t* targets, const Transform* how, float* tile, const Stats& stats) {
  const TileKernels& kernels = tile_kernels();
  for (int64_t v = first; v < last; v += height) {
    const int64_t count = std::min(height, last - v);
    const at::Tensor rows = gemm.weight_rows(v, count);
    for (int64_t token = 0; token < padded; token += kTokens) {
      gemm.tile(rows, v, count, token / kTokens, tile);
      if (how != nullptr) kernels.transform(tile, count, v, token, *how);
      pick_targets(tile, count, v, token, targets, stats.target);
      kernels.accumulate(tile, count, token, stats);
    }
  }
}

// hidden [N, H] and weight [V, H] of one dtype (bf16, fp16 or fp32), bias [V] fp32, targets [N], temperature [N] fp32;
// all rows valid, all contiguous. Returns (logp, entropy, lse), [N] fp32.
std::tuple<at::Tensor, at::Tensor, at::Tensor> logprobs(const at::Tensor& hidden, const at::Tensor& weight,
                                                        const std::optional<at::Tensor>& bias,
                                                        const at::Tensor& targets, const at::Tensor& temperature,
                                                        std::optional<double> softcap, double logit_scale) {
  TORCH_CHECK(hidden.is_contiguous() && weight.is_contiguous(), "logprobs_cpp: operands must be contiguous");
  TORCH_CHECK(hidden.scalar_type() == weight.scalar_type() && weight.scalar_type() != at::kDouble,
              "logprobs_cpp: operands must share one of bfloat16, float16, float32, got ", hidden.scalar_type(), ", ",
              weight.scalar_type());
  const int64_t n = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  const int64_t padded = (n + kTokens - 1) / kTokens * kTokens;
  const int64_t splits = (vocabulary + kSplit - 1) / kSplit;
  // A weight tile should fit in half of a 1 MiB L2.
  const int64_t height = std::clamp((int64_t{1} << 18) / width / kLanes * kLanes, kLanes, kVocab);

  const TileGemm gemm(hidden, weight, padded);
  auto padded_targets = at::full({padded}, -1, targets.options());
  padded_targets.narrow(0, 0, n).copy_(targets);
  auto padded_temperature = at::ones({padded}, at::kFloat);
  padded_temperature.narrow(0, 0, n).copy_(temperature);
  const Transform how{bias ? bias->const_data_ptr<float>() : nullptr, padded_temperature.const_data_ptr<float>(),
                      static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0))};
  const bool plain = !bias && !softcap && logit_scale == 1.0 && at::equal(padded_temperature, at::ones({padded}));

  auto partial = at::zeros({4, splits, padded}, at::kFloat);
  partial[0].fill_(kLowest);
  float* const base = partial.mutable_data_ptr<float>();
  at::parallel_for(0, splits, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowAutograd below;  // of this thread: a weight that requires a gradient is only read here
    std::vector<float> tile(height * kTokens);
    for (int64_t s = begin; s < end; ++s) {
      float* const at = base + s * padded;
      const int64_t field = splits * padded;
      sweep_split(gemm, s * kSplit, std::min(vocabulary, (s + 1) * kSplit), height, padded,
                  padded_targets.const_data_ptr<int64_t>(), plain ? nullptr : &how, tile.data(),
                  {at, at + field, at + 2 * field, at + 3 * field});
    }
    gemm.release();
  });

  // Merge in the order of the splits, in the reference point of the overall maximum.
  auto max = std::get<0>(partial[0].max(0));
  auto shift = partial[0] - max;
  auto scale = shift.exp();
  auto sum = (partial[1] * scale).sum(0);
  auto weighted = ((partial[2] + shift * partial[1]) * scale).sum(0);
  auto log_sum = sum.log();
  auto logp = partial[3].sum(0) - max - log_sum;  // the target lies in one split; the others hold 0
  auto entropy = log_sum - weighted / sum;
  return {logp.narrow(0, 0, n).clone(), entropy.narrow(0, 0, n).clone(), (max + log_sum).narrow(0, 0, n).clone()};
}

}  // namespace

TORCH_LIBRARY_IMPL(luffy_kernels, CPU, library) { library.impl("logprobs_cpp_rows", logprobs); }
