// Which variant of the tile kernels this process uses, and the operators that tests ask about it.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "tile_kernels.h"

namespace luffy {
namespace {

std::vector<const TileKernels*> available() {
  std::vector<const TileKernels*> found{&tile_kernels_base()};
#ifdef LUFFY_X86_VARIANTS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    found.push_back(&tile_kernels_v3());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(&tile_kernels_v4());
    }
  }
#endif
  return found;
}

const TileKernels& choose() {
  const auto found = available();
  const char* const wanted = std::getenv("LUFFY_KERNELS_ISA");
  if (wanted == nullptr || *wanted == '\0') return *found.back();
  std::string names;
  for (const TileKernels* kernels : found) {
    if (std::string(kernels->name) == wanted) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  TORCH_CHECK_VALUE(false, "LUFFY_KERNELS_ISA must be one of ", names, " on this CPU, got ", wanted);
}

at::Tensor apply(void (*function)(const float*, int64_t, float*), const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous(), "expected contiguous float32, got ", x.scalar_type());
  auto out = at::empty_like(x);
  function(x.const_data_ptr<float>(), x.numel(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

const TileKernels& tile_kernels() {
  static const TileKernels& chosen = choose();
  return chosen;
}

}  // namespace luffy

TORCH_LIBRARY_IMPL(luffy_kernels, CatchAll, library) {
  library.impl("tile_isa", []() -> std::string { return luffy::tile_kernels().name; });
}
TORCH_LIBRARY_IMPL(luffy_kernels, CPU, library) {
  library.impl("tile_exp", [](const at::Tensor& x) { return luffy::apply(luffy::tile_kernels().exp, x); });
  library.impl("tile_log", [](const at::Tensor& x) { return luffy::apply(luffy::tile_kernels().log, x); });
}
