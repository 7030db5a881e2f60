// The first sweep of a chunk: logits tile by tile, their sums, and where a gradient will follow their exponentials.
//
//   z = softcap(logit_scale * (h W^T + b)) / temperature       n tokens, H hidden, V vocabulary
//   E = exp(z - reference), reference = z_y, the target's logit: one dot product per token, known before the sweep
//
// So exponentials are written once and never rescaled: e^20 and more fit into bfloat16. Where a target is farther below
// the maximum, the blocks of tokens concerned are swept once more with the maximum as the reference: the coefficients
// that large exponentials are multiplied by would be too small for a bfloat16 product. The target's own entry is left
// out of everything: log-probs near 0 and 1 - p keep their digits.
//
// A tile is [vocabulary, kTokens] fp32 with a token per column: a vector lane is a token, no horizontal reduction is
// needed, and the weight is read in its own layout (only hidden, the smaller operand, is packed). It stays in cache
// between its product and its statistics. Those of the tiles are merged in order: results depend neither on the number
// of threads nor on the other rows.
#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "bf16_units.h"
#include "exps.h"
#include "plan.h"
#include "tasks.h"
#include "tile_kernels.h"

namespace luffy {

bool bf16_words(const at::Tensor& weight) {
  return weight.scalar_type() == at::kBFloat16 && weight.size(1) % 2 == 0 && has_bf16_units();
}

namespace {

constexpr double kTooFar = 20;  // a maximum farther above the reference asks for another sweep

// [n, H] -> [blocks, H / pair, kTokens, pair]: the right operand of the logits' product.
template <typename Word>
at::Tensor pack_hidden(const at::Tensor& hidden) {
  const int64_t width = hidden.size(1);
  auto rows = padded_rows(hidden, c10::CppTypeToScalarType<Word>::value);
  const int64_t blocks = rows.size(0) / kTokens;
  if constexpr (kPair<Word> == 2) {  // pairs travel as one 32-bit word
    return rows.view(at::kInt).view({blocks, kTokens, width / 2}).transpose(1, 2).contiguous().view(at::kBFloat16);
  }
  return rows.view({blocks, kTokens, width}).transpose(1, 2).contiguous();
}

// The target's logit of each token, [n] double.
template <typename Operand>
void target_logits(const at::Tensor& hidden, const at::Tensor& weight, const int64_t* targets, const Transform& how,
                   double* out) {
  const int64_t width = hidden.size(1);
  const Operand *const h = hidden.const_data_ptr<Operand>(), *const w = weight.const_data_ptr<Operand>();
  at::parallel_for(0, hidden.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Operand *const row = h + t * width, *const column = w + targets[t] * width;
      double z = 0;
      for (int64_t k = 0; k < width; ++k) z += static_cast<double>(row[k]) * static_cast<double>(column[k]);
      if (how.bias != nullptr) z = std::max<double>(z + how.bias[targets[t]], kLowest);
      z *= how.logit_scale;
      if (how.softcap > 0 && z > kLowest * how.logit_scale) z = how.softcap * std::tanh(z / how.softcap);
      out[t] = z / how.temperature[t];
    }
  });
}

template <typename Word>
class Sweep {
 public:
  Sweep(const at::Tensor& hidden, const at::Tensor& weight, const int64_t* targets, const Transform* how,
        const float* reference, bool flat, Word* exps)
      : weight_(weight),
        hidden_(pack_hidden<Word>(hidden)),
        targets_(targets),
        how_(how),
        reference_(reference),
        flat_(flat),
        width_(weight.size(1)),
        vocabulary_(weight.size(0)),
        tokens_(hidden.size(0)),
        plan_(tokens_, width_, vocabulary_, sizeof(Word), at::get_num_threads()),
        exps_{exps, vocabulary_},
        partial_(at::empty({plan_.pieces, token_blocks(tokens_), kFields, kTokens}, at::kFloat)) {}

  // Sweeps these blocks of tokens over the whole vocabulary.
  void run(const std::vector<int64_t>& blocks) {
    const auto count = static_cast<int64_t>(blocks.size());
    const int64_t parts = plan_.parts;
    for_each_task(
        plan_.pieces * parts, [&] { return std::vector<float>(plan_.height * kTokens); },
        [&](std::vector<float>& tile, int64_t task) {
          const int64_t piece = task / parts, part = task % parts;
          sweep(piece, blocks.data() + part * count / parts, blocks.data() + (part + 1) * count / parts, tile.data());
        });
  }

  // Their statistics over the whole vocabulary, to rows of `out`, [kMerged, n].
  void merge(const std::vector<int64_t>& blocks, double* out) const {
    const int64_t stride = token_blocks(tokens_) * kFields * kTokens;
    for_each_task(
        blocks.size(), [] { return std::vector<double>(kMerged * kTokens); },
        [&](std::vector<double>& merged, int64_t i) {
          const int64_t first = blocks[i] * kTokens, count = std::min(kTokens, tokens_ - first);
          tile_kernels().merge(partial(0, blocks[i]).data, plan_.pieces, stride, reference_ + first, merged.data());
          for (int64_t field = 0; field < kMerged; ++field) {
            std::copy_n(merged.data() + field * kTokens, count, out + field * tokens_ + first);
          }
        });
  }

 private:
  Stats partial(int64_t piece, int64_t block) const {
    return {partial_.mutable_data_ptr<float>() + (piece * token_blocks(tokens_) + block) * kFields * kTokens};
  }

  void sweep(int64_t piece, const int64_t* block, const int64_t* end, float* tile) const {
    const at::AutoDispatchBelowAutograd below;  // of this thread: a weight that requires a gradient is only read here
    const TileKernels& kernels = tile_kernels();
    const int64_t first = piece * plan_.height, count = std::min(plan_.height, vocabulary_ - first);
    constexpr auto kWord = c10::CppTypeToScalarType<Word>::value;
    const at::Tensor rows = weight_.narrow(0, first, count).to(kWord);  // a copy where it has to be widened
    for (; block != end; ++block) {
      const int64_t token = *block * kTokens;
      logits(rows.const_data_ptr<Word>(), hidden_.const_data_ptr<Word>() + token * width_, count, tile);
      if (how_ != nullptr) kernels.transform(tile, count, first, token, *how_);
      const Stats out = partial(piece, *block);
      std::fill_n(out.flat(), kTokens, 0.0f);
      if (flat_) kernels.flat(tile, count, out);
      for (int64_t i = 0; i < kTokens; ++i) {
        const int64_t v = targets_[token + i] - first;
        if (v >= 0 && v < count) tile[v * kTokens + i] = kOutside;
      }
      if (exps_.data == nullptr) {
        kernels.stats(tile, count, out);
      } else if constexpr (kPair<Word> == 2) {
        kernels.exps_bf16(tile, count, reference_ + token, out, reinterpret_cast<uint32_t*>(exps_.tile(*block, first)));
      } else {
        kernels.exps_fp32(tile, count, reference_ + token, out, exps_.tile(*block, first));
      }
    }
  }

  // A tile [count, kTokens] from rows of the weight [count, H] and a block of hidden states [H / pair, kTokens, pair].
  // Summed in pieces: one sum over all of a large H would lose several times as many digits as a plain product.
  void logits(const Word* rows, const Word* hidden, int64_t count, float* tile) const {
    const int64_t depth = round_up(pieces_of(width_, pieces_of(width_, kDepth)), kLanes);
    for (int64_t k = 0; k < width_; k += depth) {
      at::native::cpublas::brgemm(count, kTokens, std::min(depth, width_ - k), width_, kTokens, kTokens,
                                  /*add_C=*/k > 0, rows + k, hidden + k * kTokens, tile);
    }
  }

  const at::Tensor weight_, hidden_;
  const int64_t* targets_;
  const Transform* how_;
  const float* reference_;
  bool flat_;
  int64_t width_, vocabulary_, tokens_;
  Plan plan_;
  Exps<Word> exps_;
  at::Tensor partial_;
};

template <typename Word>
void run(const at::Tensor& hidden, const at::Tensor& weight, const int64_t* targets, const Transform* how, bool flat,
         const std::optional<at::Tensor>& exps, at::Tensor& reference, at::Tensor& out) {
  const int64_t n = hidden.size(0);
  float* const from = reference.mutable_data_ptr<float>();
  double* const to = out.mutable_data_ptr<double>();
  Sweep<Word> sweep(hidden, weight, targets, how, from, flat, exps ? exps->mutable_data_ptr<Word>() : nullptr);
  std::vector<int64_t> blocks(token_blocks(n));
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  sweep.run(blocks);
  double* const max = to + 2 * n;
  sweep.merge(blocks, max);
  if (!exps) return;
  std::erase_if(blocks, [&](int64_t block) {
    bool near = true;
    for (int64_t t = block * kTokens; t < std::min(n, (block + 1) * kTokens); ++t) {
      if (max[t] - from[t] <= kTooFar) continue;
      from[t] = max[t];
      near = false;
    }
    return near;
  });
  if (blocks.empty()) return;
  sweep.run(blocks);
  sweep.merge(blocks, max);
}

// hidden [n, H] and weight [V, H] of one dtype (bf16, fp16 or fp32), bias [V] fp32, targets [n], temperature [n] fp32;
// all rows valid, all contiguous. Writes E to `exps` where it is given. Returns [7, n] fp64: reference, the target's
// logit; over the other entries m = max z, sum exp(z - m), sum exp(z - m) (z - m); over all sum z (with `flat`, else
// 0); sum E.
at::Tensor head_sweep(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const at::Tensor& targets, const at::Tensor& temperature, std::optional<double> softcap,
                      double logit_scale, bool flat, const std::optional<at::Tensor>& exps) {
  const at::ScalarType operand = weight.scalar_type();
  TORCH_CHECK(hidden.is_contiguous() && weight.is_contiguous() && hidden.scalar_type() == operand &&
                  (operand == at::kBFloat16 || operand == at::kHalf || operand == at::kFloat),
              "head_sweep: hidden and weight must be contiguous and share one of bfloat16, float16, float32, got ",
              hidden.scalar_type(), ", ", operand);
  const int64_t n = hidden.size(0);
  const bool words = exps ? exps->scalar_type() == at::kBFloat16 : bf16_words(weight);
  const int64_t entries = token_blocks(n) * kTokens * round_up(weight.size(0), words ? 2 : 1);
  TORCH_CHECK(!exps || (exps->is_contiguous() && exps->numel() >= entries), "head_sweep: exps must hold ", entries);
  auto padded = [&](const at::Tensor& x, double fill) {
    auto out = at::full({token_blocks(n) * kTokens}, fill, x.options());
    out.narrow(0, 0, n).copy_(x);
    return out;
  };
  const auto own = padded(targets, -1), cool = padded(temperature.to(at::kFloat), 1);
  const Transform how{bias ? bias->const_data_ptr<float>() : nullptr, cool.const_data_ptr<float>(),
                      static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0))};
  auto out = at::empty({2 + kMerged, n}, at::kDouble);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, operand, "head_sweep", [&] {
    target_logits<scalar_t>(hidden, weight, own.const_data_ptr<int64_t>(), how,
                            out.select(0, 1).mutable_data_ptr<double>());
  });
  auto reference = padded(out.select(0, 1).to(at::kFloat), -kLowest);  // no exponential of padding is above 0
  const bool plain = !bias && !softcap && logit_scale == 1 && at::equal(cool, at::ones_like(cool));
  const auto sweep = words ? run<at::BFloat16> : run<float>;
  sweep(hidden, weight, own.const_data_ptr<int64_t>(), plain ? nullptr : &how, flat, exps, reference, out);
  out.select(0, 0).copy_(reference.narrow(0, 0, n));
  return out;
}

}  // namespace
}  // namespace luffy

TORCH_LIBRARY_IMPL(luffy_kernels, CPU, library) {
  library.impl("head_sweep", luffy::head_sweep);
  library.impl("bf16_words", luffy::bf16_words);
}
