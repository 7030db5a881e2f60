// The floor of `bench.ops` on CPU: the three products of a training step, tile by tile as our kernels do them, with no
// softmax, no packing and no conversion between them. bfloat16 where the CPU multiplies it, float32 elsewhere.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

namespace {

constexpr int64_t kTokens = 64, kHeight = 256, kDepth = 512;

template <typename Word>
void products(int64_t tokens, int64_t width, int64_t vocabulary, at::Tensor& dw, int64_t count) {
  namespace blas = at::native::cpublas;
  constexpr auto kWord = c10::CppTypeToScalarType<Word>::value;
  const at::Tensor weight = at::zeros({(kHeight + kDepth) * std::max(width, kHeight)}, kWord);
  const at::Tensor hidden = at::zeros({tokens + kTokens, width}, kWord);
  const Word *const w = weight.const_data_ptr<Word>(), *const h = hidden.const_data_ptr<Word>();
  float* const to = dw.mutable_data_ptr<float>();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const at::Tensor scratch = at::zeros({kHeight * kDepth}, kWord);
    const at::Tensor rows = at::zeros({width * kTokens}, at::kFloat), tile = at::zeros({kHeight * kTokens}, at::kFloat);
    const Word* const dz = scratch.const_data_ptr<Word>();
    float *const out = tile.mutable_data_ptr<float>(), *const dh = rows.mutable_data_ptr<float>();
    for (int64_t v = kHeight * next++; v < vocabulary; v = kHeight * next++) {
      const int64_t height = std::min(kHeight, vocabulary - v);
      const int64_t even = height + height % 2;  // pairs of the inner dimension
      for (int64_t t = 0; t < tokens; t += kTokens) {
        blas::brgemm(height, kTokens, width, width, kTokens, kTokens, false, w, h + t * width, out);
        if (count > 1) blas::brgemm(width, kTokens, even, even, kTokens, kTokens, true, w, dz, dh);
      }
      for (int64_t k = 0; count > 1 && k < tokens; k += kDepth) {
        const int64_t depth = std::min(kDepth, tokens - k);
        for (int64_t j = 0; j < width; j += kTokens) {
          blas::brgemm(height, std::min(kTokens, width - j), depth, depth, width, width, k > 0, dz, h + k * width,
                       to + v * width + j);
        }
      }
    }
    blas::brgemm_release();
  });
}

}  // namespace

TORCH_LIBRARY(luffy_bench, library) {
  library.def(
      "tiled_products(int tokens, int width, int vocabulary, Tensor(a!) dw, int count, bool narrow) -> ()",
      [](int64_t tokens, int64_t width, int64_t vocabulary, at::Tensor& dw, int64_t count, bool narrow) {
        (narrow ? products<at::BFloat16> : products<float>)(tokens, width, vocabulary, dw, count);
      });
}
