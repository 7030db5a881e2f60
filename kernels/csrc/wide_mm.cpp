// bf16 products with fp32 results, which torch.mm lacks on CPU: the GEMMs of the torch backend's chunks.
//
//   wide_mm:      out [C, V] fp32  = a [C, H] bf16 @ weight^T, weight [V, H] packed once by `wide_pack`
//   wide_addmm_t: out [V, H] fp32 += dz [C, V]^T bf16 @ h [C, H] bf16
//
// VNNI layout: the matrix unit reads pairs of k side by side, [k/2, n, 2], so every packed operand is padded to even k.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "bf16_units.h"

namespace {

namespace blas = at::native::cpublas;

constexpr int64_t kColumns = 64;  // packed columns of a block
constexpr int64_t kRows = 128;    // output rows of a tile

// [rows, k] -> [blocks, k/2, kColumns, 2], zero-padded; pairs travel as one 32-bit word.
at::Tensor pack_blocks(const at::Tensor& matrix) {
  const int64_t rows = matrix.size(0), half = matrix.size(1) / 2;
  const int64_t blocks = (rows + kColumns - 1) / kColumns;
  // A view that begins at an odd entry has no words.
  auto words = (matrix.storage_offset() % 2 == 0 ? matrix : matrix.clone()).view(at::kInt);
  auto out = at::empty({blocks, half, kColumns}, words.options());
  const int32_t* const from = words.const_data_ptr<int32_t>();
  int32_t* const to = out.mutable_data_ptr<int32_t>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t k = 0; k < half; ++k) {
        int32_t* const line = to + (b * half + k) * kColumns;
        const int64_t count = std::min(kColumns, rows - b * kColumns);
        const int32_t* const source = from + b * kColumns * half + k;
        for (int64_t j = 0; j < count; ++j) line[j] = source[j * half];
        std::fill(line + count, line + kColumns, 0);
      }
    }
  });
  return out.view(at::kBFloat16);
}

bool wide_supported(int64_t width) { return width % 2 == 0 && luffy::has_bf16_units(); }

at::Tensor wide_pack(const at::Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && wide_supported(weight.size(1)),
              "wide_pack: weight must be contiguous bfloat16 with an even width on a machine that packs, got ",
              weight.scalar_type(), " ", weight.sizes());
  return pack_blocks(weight);
}

at::Tensor& wide_mm(at::Tensor& out, const at::Tensor& a, const at::Tensor& packed) {
  const int64_t rows = a.size(0), width = a.size(1), columns = out.size(1), blocks = packed.size(0);
  TORCH_CHECK(a.is_contiguous() && out.is_contiguous() && packed.size(1) * 2 == width,
              "wide_mm: a must be contiguous [C, ", packed.size(1) * 2, "], got ", a.sizes());
  const at::BFloat16* const left = a.const_data_ptr<at::BFloat16>();
  const at::BFloat16* const right = packed.const_data_ptr<at::BFloat16>();
  float* const to = out.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kColumns, count = std::min(kColumns, columns - first);
      for (int64_t row = 0; row < rows; row += kRows) {
        blas::brgemm(std::min(kRows, rows - row), count, width, width, kColumns, columns, /*add_C=*/false,
                     left + row * width, right + b * width * kColumns, to + row * columns + first);
      }
    }
    blas::brgemm_release();
  });
  return out;
}

at::Tensor& wide_addmm_t(at::Tensor& out, const at::Tensor& dz, const at::Tensor& h) {
  const int64_t rows = dz.size(0), vocabulary = dz.size(1), width = h.size(1);
  TORCH_CHECK(dz.is_contiguous() && out.is_contiguous() && h.size(0) == rows, "wide_addmm_t: dz [", h.size(0),
              ", V] and out must be contiguous, got ", dz.sizes(), " ", dz.strides(), " and ", out.strides());
  if (rows == 0) return out;
  const int64_t even = rows + rows % 2;
  auto transposed =
      at::zeros({width, even}, h.options());  // [H, C]: pack_blocks pairs neighbours of the last dimension
  transposed.narrow(1, 0, rows).copy_(h.t());
  const at::Tensor packed = pack_blocks(transposed);
  const at::BFloat16* const right = packed.const_data_ptr<at::BFloat16>();
  const at::BFloat16* const from = dz.const_data_ptr<at::BFloat16>();
  float* const to = out.mutable_data_ptr<float>();
  const int64_t tiles = (vocabulary + kRows - 1) / kRows;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<at::BFloat16> left(kRows * even, at::BFloat16(0.0f));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kRows, count = std::min(kRows, vocabulary - first);
      // Transposed 32 rows at a time, a cache line of each output row.
      for (int64_t start = 0; start < rows; start += 32) {
        const int64_t stop = std::min(rows, start + 32);
        for (int64_t v = 0; v < count; ++v) {
          const at::BFloat16* const column = from + first + v;
          for (int64_t c = start; c < stop; ++c) left[v * even + c] = column[c * vocabulary];
        }
      }
      for (int64_t b = 0; b < packed.size(0); ++b) {
        const int64_t column = b * kColumns;
        blas::brgemm(count, std::min(kColumns, width - column), even, even, kColumns, width, /*add_C=*/true,
                     left.data(), right + b * even * kColumns, to + first * width + column);
      }
    }
    blas::brgemm_release();
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(luffy_kernels, CPU, library) {
  library.impl("wide_pack", wide_pack);
  library.impl("wide_mm", wide_mm);
  library.impl("wide_addmm_t", wide_addmm_t);
}
TORCH_LIBRARY_IMPL(luffy_kernels, CatchAll, library) { library.impl("wide_supported", wide_supported); }
