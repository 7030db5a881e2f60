#include "bf16_units.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <array>
#include <exception>

namespace luffy {
namespace {

constexpr int64_t kSide = 32;

// Left entries are 1, right entries of column n are 1 + n / 64, exact in bfloat16: a product is kSide times that.
bool multiplies() {
  std::array<at::BFloat16, kSide * kSide> left, right;
  std::array<float, kSide * kSide> out{};
  left.fill(at::BFloat16(1.0f));
  for (int64_t i = 0; i < kSide * kSide; ++i) right[i] = at::BFloat16(1.0f + static_cast<float>(i / 2 % kSide) / 64);
  try {
    at::native::cpublas::brgemm(kSide, kSide, kSide, kSide, kSide, kSide, /*add_C=*/false, left.data(), right.data(),
                                out.data());
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) {  // this build or CPU has no such product
    return false;
  }
  for (int64_t i = 0; i < kSide * kSide; ++i) {
    if (out[i] != kSide * (1.0f + static_cast<float>(i % kSide) / 64)) return false;
  }
  return true;
}

}  // namespace

bool has_bf16_units() {
#if defined(__x86_64__)
  static const bool answer = __builtin_cpu_supports("avx512bf16") && multiplies();
  return answer;
#else
  return false;
#endif
}

}  // namespace luffy
