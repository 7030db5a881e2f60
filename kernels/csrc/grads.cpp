// The second sweep of a chunk: dH and dW from the exponentials that the first one left.
//
//   dz_tv = scale_t F_tv  for v != y_t      dz_ty = on_target_t        F = exp(z - reference), or what shape_exps_ made
//   dH    = scale (F W) + on_target W_y     dW += F^T (scale h), then dW_y += on_target h
//
// A factor per token goes into the small operand or the result, so F is multiplied as it lies. The vocabulary is worked
// off in spans: the span's rows of W are transposed once, then every task owns a block of dH or of dW, sums in a fixed
// order, and shares nothing. The exponentials of a span, read by both, are still in the last cache for the second.
#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "exps.h"
#include "plan.h"
#include "tasks.h"
#include "tile_kernels.h"

namespace luffy {
namespace {

template <typename Word>
void transpose(const at::Tensor& rows, Word* out, int64_t ld) {
  const TileKernels& kernels = tile_kernels();
  const int64_t count = rows.size(0), width = rows.size(1), pieces = (count + kTokens - 1) / kTokens;
  for_each_task(
      pieces, [] { return 0; },
      [&](int, int64_t i) {
        const int64_t v = i * kTokens, height = std::min(kTokens, count - v);
        if constexpr (sizeof(Word) == 2) {
          kernels.transpose_16(static_cast<const uint16_t*>(rows.const_data_ptr()) + v * width, height, width, width,
                               reinterpret_cast<uint16_t*>(out) + v, ld);
        } else {
          kernels.transpose_32(static_cast<const uint32_t*>(rows.const_data_ptr()) + v * width, height, width, width,
                               reinterpret_cast<uint32_t*>(out) + v, ld);
        }
      });
}

template <typename Word>
struct Products {
  Exps<Word> exps;
  int64_t tokens, width;  // n, H
  const Word* hidden;     // [n, H]
  const Word* scaled;     // scale h, [padded / pair, H, pair]
  const float *scale, *on_target;
  const int64_t* targets;
  float *dh, *dw, *db;  // [blocks, H, kTokens], [V, H], [V]; null: not wanted
  bool fresh;           // dw holds nothing yet

  int64_t padded() const { return token_blocks(tokens) * kTokens; }

  // dH^T of some token blocks and rows [first, last) of H: += W^T of a span [H, ld], from entry v on, times F.
  void add_dh(const Word* weight, int64_t ld, int64_t v, int64_t count, int64_t begin, int64_t end, int64_t first,
              int64_t last) const {
    for (int64_t k = 0; k < count; k += kDepth) {
      const int64_t depth = std::min(kDepth, round_up(count - k, kPair<Word>));
      for (int64_t block = begin; block < end; ++block) {
        at::native::cpublas::brgemm(last - first, kTokens, depth, ld, kTokens, kTokens, /*add_C=*/true,
                                    weight + first * ld + k, exps.tile(block, v + k),
                                    dh + (block * width + first) * kTokens);
      }
    }
  }

  // Rows [v, v + count) of dW from column `first` to `last`; with the first column of db too.
  void add_dw(int64_t v, int64_t count, int64_t first, int64_t last, Word* scratch) const {
    const int64_t ld = padded() + kPad;
    for (int64_t block = 0; block < token_blocks(tokens); ++block) {
      const Word* const tile = exps.tile(block, v);
      Word* const column = scratch + block * kTokens;
      if constexpr (kPair<Word> == 2) {
        tile_kernels().unpair(reinterpret_cast<const uint32_t*>(tile), count, reinterpret_cast<uint16_t*>(column), ld);
      } else {
        for (int64_t i = 0; i < count; ++i) std::memcpy(column + i * ld, tile + i * kTokens, kTokens * sizeof(Word));
      }
    }
    if (dw != nullptr) {
      for (int64_t j = first; j < last; j += kTokens) {
        for (int64_t k = 0; k < padded(); k += kDepth) {
          at::native::cpublas::brgemm(count, std::min(kTokens, last - j), std::min(kDepth, padded() - k), ld, width,
                                      width, /*add_C=*/!(fresh && k == 0), scratch + k,
                                      scaled + k * width + j * kPair<Word>, dw + v * width + j);
        }
      }
    }
    if (db != nullptr && first == 0) add_db(v, count, scratch, ld);
    for (int64_t t = 0; t < tokens; ++t) {
      if (targets[t] < v || targets[t] >= v + count) continue;
      if (db != nullptr && first == 0) db[targets[t]] += on_target[t];
      if (dw == nullptr) continue;
      float* const row = dw + targets[t] * width;
      for (int64_t k = first; k < last; ++k) row[k] += on_target[t] * static_cast<float>(hidden[t * width + k]);
    }
  }

  void add_db(int64_t v, int64_t count, const Word* rows, int64_t ld) const {
    std::vector<float> sums(count);
    if constexpr (kPair<Word> == 2) {
      tile_kernels().dots_bf16(reinterpret_cast<const uint16_t*>(rows), count, padded(), ld, scale, sums.data());
    } else {
      tile_kernels().dots_fp32(rows, count, padded(), ld, scale, sums.data());
    }
    for (int64_t i = 0; i < count; ++i) db[v + i] += sums[i];
  }
};

template <typename Word>
void run(const Products<Word>& products, const at::Tensor& weight) {
  constexpr auto kWord = c10::CppTypeToScalarType<Word>::value;
  const int64_t vocabulary = weight.size(0), width = weight.size(1), blocks = token_blocks(products.tokens);
  const Plan plan(products.tokens, width, vocabulary, sizeof(Word), at::get_num_threads());
  const int64_t ld = plan.span + kPad, scratch_size = plan.dw_height * (products.padded() + kPad);
  const bool any_dw = products.dw != nullptr || products.db != nullptr;
  const int64_t dh_parts = pieces_of(width, plan.dh_width);
  const int64_t dw_parts = products.dw == nullptr ? 1 : pieces_of(width, plan.dw_width);
  const int64_t dh_tasks = products.dh == nullptr ? 0 : plan.groups * dh_parts;
  at::Tensor transposed = at::empty({dh_tasks == 0 ? 0 : width * ld}, weight.options().dtype(kWord));
  Word* const rows = transposed.mutable_data_ptr<Word>();
  for (int64_t v = 0; v < vocabulary; v += plan.span) {
    const int64_t count = std::min(plan.span, vocabulary - v);
    if (dh_tasks > 0) {
      transpose(weight.narrow(0, v, count).to(kWord), rows, ld);
      if (count % kPair<Word> != 0) {
        for (int64_t k = 0; k < width; ++k) rows[k * ld + count] = Word(0.0f);
      }
    }
    const int64_t dw_tasks = any_dw ? pieces_of(count, plan.dw_height) * dw_parts : 0;
    for_each_task(
        dh_tasks + dw_tasks, [&] { return std::vector<Word>(any_dw ? scratch_size : 0); },
        [&](std::vector<Word>& scratch, int64_t task) {
          if (task < dh_tasks) {
            const int64_t begin = task / dh_parts * kGroup, first = task % dh_parts * plan.dh_width;
            products.add_dh(rows, ld, v, count, begin, std::min(blocks, begin + kGroup), first,
                            std::min(width, first + plan.dh_width));
          } else {
            const int64_t piece = (task - dh_tasks) / dw_parts, first = (task - dh_tasks) % dw_parts * plan.dw_width;
            const int64_t at = piece * plan.dw_height;
            products.add_dw(v + at, std::min(plan.dw_height, count - at), first, std::min(width, first + plan.dw_width),
                            scratch.data());
          }
        });
  }
}

template <typename Word>
at::Tensor grads(const at::Tensor& exps, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                 const at::Tensor& scale, const at::Tensor& on_target, bool need_dh, std::optional<at::Tensor>& dw,
                 std::optional<at::Tensor>& db, bool fresh) {
  constexpr auto kWord = c10::CppTypeToScalarType<Word>::value;
  const int64_t n = hidden.size(0), width = hidden.size(1), blocks = token_blocks(n);
  const at::Tensor operand = hidden.to(kWord);
  at::Tensor scaled = padded_rows(hidden.to(at::kFloat) * scale.unsqueeze(1), kWord);
  if constexpr (kPair<Word> == 2) scaled = scaled.view({blocks * kTokens / 2, 2, width}).transpose(1, 2).contiguous();
  auto padded_scale = at::zeros({blocks * kTokens}, scale.options());
  padded_scale.narrow(0, 0, n).copy_(scale);
  auto dh = at::zeros({need_dh ? blocks : 0, width, kTokens}, at::kFloat);
  const Products<Word> products{{exps.mutable_data_ptr<Word>(), weight.size(0)},
                                n,
                                width,
                                operand.const_data_ptr<Word>(),
                                scaled.const_data_ptr<Word>(),
                                padded_scale.const_data_ptr<float>(),
                                on_target.const_data_ptr<float>(),
                                targets.const_data_ptr<int64_t>(),
                                need_dh ? dh.mutable_data_ptr<float>() : nullptr,
                                dw ? dw->mutable_data_ptr<float>() : nullptr,
                                db ? db->mutable_data_ptr<float>() : nullptr,
                                fresh};
  run(products, weight);
  if (!need_dh) return at::empty({0, width}, at::kFloat);
  auto rows = dh.transpose(1, 2).reshape({blocks * kTokens, width}).narrow(0, 0, n);
  return rows.mul_(scale.unsqueeze(1)).addcmul_(weight.index_select(0, targets).to(at::kFloat), on_target.unsqueeze(1));
}

// exps: what head_sweep wrote for these rows. hidden [n, H], weight [V, H] of one dtype, targets [n]; scale, on_target
// [n] fp32. Adds to dw [V, H] (written where `fresh`) and db [V], both fp32. Returns dH [n, H] fp32, or [0, H].
at::Tensor head_grads(const at::Tensor& exps, const at::Tensor& hidden, const at::Tensor& weight,
                      const at::Tensor& targets, const at::Tensor& scale, const at::Tensor& on_target, bool need_dh,
                      std::optional<at::Tensor> dw, std::optional<at::Tensor> db, bool fresh) {
  TORCH_CHECK(hidden.is_contiguous() && weight.is_contiguous() && targets.is_contiguous() && scale.is_contiguous() &&
                  on_target.is_contiguous() && (!dw || dw->is_contiguous()) && (!db || db->is_contiguous()),
              "head_grads: operands must be contiguous");
  const auto run = exps.scalar_type() == at::kBFloat16 ? grads<at::BFloat16> : grads<float>;
  return run(exps, hidden, weight, targets, scale, on_target, need_dh, dw, db, fresh);
}

template <typename Word>
void shape(at::Tensor& tensor, const at::Tensor& targets, int64_t vocabulary, const at::Tensor& coefficients,
           double softcap) {
  const int64_t n = targets.size(0), blocks = token_blocks(n), pieces = (vocabulary + kSpan - 1) / kSpan;
  const Exps<Word> exps{tensor.mutable_data_ptr<Word>(), vocabulary};
  auto padded = at::zeros({6, blocks * kTokens}, at::kFloat);
  padded.narrow(1, 0, n).copy_(coefficients);
  const float* const from = padded.const_data_ptr<float>();
  for_each_task(
      blocks * pieces, [] { return 0; },
      [&](int, int64_t task) {
        const int64_t block = task / pieces, v = task % pieces * kSpan, count = std::min(kSpan, vocabulary - v);
        auto field = [&](int64_t i) { return from + (i * blocks + block) * kTokens; };
        const Shape how{field(0), field(1), field(2), field(3), field(4), field(5), static_cast<float>(softcap)};
        if constexpr (kPair<Word> == 2) {
          tile_kernels().shape_bf16(reinterpret_cast<uint32_t*>(exps.tile(block, v)), count, how);
        } else {
          tile_kernels().shape_fp32(exps.tile(block, v), count, how);
        }
      });
  const int64_t* const own = targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < n; ++t) exps.at(t, own[t]) = Word(0.0f);
}

template <typename Word>
void entropy_sums(const at::Tensor& tensor, const at::Tensor& factor, int64_t vocabulary, at::Tensor& out) {
  const int64_t n = factor.size(0), blocks = token_blocks(n), pieces = (vocabulary + kSpan - 1) / kSpan;
  const Exps<Word> exps{tensor.mutable_data_ptr<Word>(), vocabulary};
  auto partial = at::empty({pieces, 2, blocks * kTokens}, at::kFloat);
  float* const to = partial.mutable_data_ptr<float>();
  auto padded = at::ones({blocks * kTokens}, at::kFloat);
  padded.narrow(0, 0, n).copy_(factor);
  const float* const by = padded.const_data_ptr<float>();
  for_each_task(
      blocks * pieces, [] { return 0; },
      [&](int, int64_t task) {
        const int64_t block = task / pieces, piece = task % pieces, v = piece * kSpan;
        const int64_t count = std::min(kSpan, vocabulary - v);
        float* const sum = to + (piece * 2 * blocks + block) * kTokens;
        float* const weighted = sum + blocks * kTokens;
        if constexpr (kPair<Word> == 2) {
          tile_kernels().logs_bf16(reinterpret_cast<const uint32_t*>(exps.tile(block, v)), count, by + block * kTokens,
                                   sum, weighted);
        } else {
          tile_kernels().logs_fp32(exps.tile(block, v), count, by + block * kTokens, sum, weighted);
        }
      });
  out.copy_(partial.narrow(2, 0, n).sum(0, false, at::kDouble));
}

// sum E and sum E log(E factor) of each token's exponentials as they are stored, [2, n] fp64.
at::Tensor exps_sums(const at::Tensor& exps, const at::Tensor& factor, int64_t vocabulary) {
  auto out = at::empty({2, factor.size(0)}, at::kDouble);
  const auto run = exps.scalar_type() == at::kBFloat16 ? entropy_sums<at::BFloat16> : entropy_sums<float>;
  run(exps, factor, vocabulary, out);
  return out;
}

// E -> dz in place where a factor per token is not enough. coefficients [6, n] fp32: the fields of a Shape.
at::Tensor& shape_exps(at::Tensor& exps, const at::Tensor& targets, int64_t vocabulary, const at::Tensor& coefficients,
                       std::optional<double> softcap) {
  const auto run = exps.scalar_type() == at::kBFloat16 ? shape<at::BFloat16> : shape<float>;
  run(exps, targets, vocabulary, coefficients, softcap.value_or(0.0));
  return exps;
}

}  // namespace
}  // namespace luffy

TORCH_LIBRARY_IMPL(luffy_kernels, CatchAll, library) {
  library.impl("head_plan", [](int64_t tokens, int64_t width, int64_t vocabulary, int64_t word, int64_t threads) {
    TORCH_CHECK_VALUE(tokens > 0 && width > 0 && vocabulary > 0 && word > 0 && threads > 0,
                      "head_plan: all sizes must be positive, got ", tokens, ", ", width, ", ", vocabulary, ", ", word,
                      ", ", threads);
    const luffy::Plan plan(tokens, width, vocabulary, word, threads);
    return std::vector<int64_t>{plan.height, plan.pieces,   plan.parts,     plan.span,
                                plan.groups, plan.dh_width, plan.dw_height, plan.dw_width};
  });
}
TORCH_LIBRARY_IMPL(luffy_kernels, CPU, library) {
  library.impl("head_grads", luffy::head_grads);
  library.impl("exps_sums", luffy::exps_sums);
  library.impl("shape_exps_", luffy::shape_exps);
}
