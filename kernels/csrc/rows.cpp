// Row kernels of the torch backend's chunks on CPU: one pass over a row where torch takes five.
//
//   center_rows_: z -> c = z - max z in place; returns (max, sum exp(c), E[c] = sum exp(c) c / sum exp(c)), [C] each
//   grad_rows:    out = exp(c) (offset + slope c), offset and slope [C], out [C, V] fp32 or bf16
//
// A row of logits fits in L2, so it is read from memory once per kernel; exp is computed twice rather than stored.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "tile_kernels.h"

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> center_rows(at::Tensor& z) {
  TORCH_CHECK(z.is_contiguous() && z.scalar_type() == at::kFloat, "center_rows_: z must be contiguous float32");
  const int64_t rows = z.size(0), columns = z.size(1);
  auto stats = at::empty({rows, 3}, z.options());
  float *const from = z.mutable_data_ptr<float>(), *const to = stats.mutable_data_ptr<float>();
  const luffy::TileKernels& kernels = luffy::tile_kernels();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernels.center_row(from + row * columns, columns, to + row * 3);
  });
  auto sum = stats.select(1, 1).contiguous();
  return {stats.select(1, 0).contiguous(), sum, stats.select(1, 2) / sum};
}

at::Tensor& grad_rows(at::Tensor& out, const at::Tensor& centred, const at::Tensor& offset, const at::Tensor& slope) {
  TORCH_CHECK(out.is_contiguous() && centred.is_contiguous() && out.sizes() == centred.sizes() &&
                  offset.is_contiguous() && slope.is_contiguous(),
              "grad_rows: operands must be contiguous and out like centred, got ", out.sizes(), ", ", centred.sizes());
  const bool bf16 = out.scalar_type() == at::kBFloat16;
  TORCH_CHECK(bf16 || out.scalar_type() == at::kFloat, "grad_rows: out must be bfloat16 or float32");
  const int64_t columns = centred.size(1);
  const float* const from = centred.const_data_ptr<float>();
  const float *const a = offset.const_data_ptr<float>(), *const b = slope.const_data_ptr<float>();
  void* const to = out.mutable_data_ptr();
  const luffy::TileKernels& kernels = luffy::tile_kernels();
  at::parallel_for(0, centred.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * columns;
      if (bf16) {
        kernels.grad_row_bf16(from + at, columns, a[row], b[row], static_cast<uint16_t*>(to) + at);
      } else {
        kernels.grad_row(from + at, columns, a[row], b[row], static_cast<float*>(to) + at);
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(luffy_kernels, CPU, library) {
  library.impl("center_rows_", center_rows);
  library.impl("grad_rows", grad_rows);
}
