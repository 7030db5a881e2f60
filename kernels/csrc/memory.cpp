// Large buffers: how they get their pages, and how a gradient is scaled into one.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tile_kernels.h"

namespace luffy {
namespace {

// Asks for large pages before the first touch: the faults of small ones cost more than the arithmetic on them.
void use_large_pages(const at::Tensor& buffer) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(buffer.data_ptr()), end = begin + buffer.nbytes();
  const uintptr_t from = (begin + kPage - 1) / kPage * kPage, to = end / kPage * kPage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // refused: small pages it is
#endif
}

// x factor in this dtype, in one pass. torch.mul with a narrower result computes a wide one first. x: contiguous fp32.
at::Tensor scaled(const at::Tensor& x, const at::Tensor& factor, at::ScalarType dtype) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous(), "scaled: x must be contiguous float32");
  auto out = at::empty(x.sizes(), x.options().dtype(dtype));
  use_large_pages(out);
  if (dtype != at::kBFloat16) return at::mul_out(out, x, factor);
  const float by = factor.item<float>();
  const float* const from = x.const_data_ptr<float>();
  auto* const to = reinterpret_cast<uint16_t*>(out.mutable_data_ptr<at::BFloat16>());
  at::parallel_for(0, x.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    tile_kernels().scale_bf16(from + begin, end - begin, by, to + begin);
  });
  return out;
}

}  // namespace
}  // namespace luffy

TORCH_LIBRARY_IMPL(luffy_kernels, CPU, library) {
  library.impl("use_large_pages_", [](at::Tensor& buffer) { luffy::use_large_pages(buffer); });
  library.impl("scaled", luffy::scaled);
}
