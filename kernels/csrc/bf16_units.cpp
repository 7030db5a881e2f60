#include "bf16_units.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <array>
#include <exception>

namespace luffy {
namespace {

constexpr int64_t kSide = 32;

// Small whole numbers that vary along both sides, exact in bfloat16 and in every sum; written, then added once more.
bool multiplies() {
  std::array<at::BFloat16, kSide * kSide> left, right;  // right: [k/2, n, 2]
  std::array<float, kSide * kSide> out{};
  const auto a = [](int64_t m, int64_t k) { return (3 * m + k) % 7; };
  const auto b = [](int64_t k, int64_t n) { return (5 * k + n) % 11; };
  for (int64_t i = 0; i < kSide; ++i) {
    for (int64_t j = 0; j < kSide; ++j) {
      left[i * kSide + j] = at::BFloat16(static_cast<float>(a(i, j)));
      right[(i / 2 * kSide + j) * 2 + i % 2] = at::BFloat16(static_cast<float>(b(i, j)));
    }
  }
  try {
    for (const bool add : {false, true}) {
      at::native::cpublas::brgemm(kSide, kSide, kSide, kSide, kSide, kSide, add, left.data(), right.data(), out.data());
    }
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) {  // this build or CPU has no such product
    return false;
  }
  for (int64_t m = 0; m < kSide; ++m) {
    for (int64_t n = 0; n < kSide; ++n) {
      int64_t want = 0;
      for (int64_t k = 0; k < kSide; ++k) want += 2 * a(m, k) * b(k, n);
      if (out[m * kSide + n] != static_cast<float>(want)) return false;
    }
  }
  return true;
}

}  // namespace

bool has_bf16_units() {
#if defined(__x86_64__)
  // The user's switch may change; what the CPU does may not, and is asked while the switch is on.
  if (!at::globalContext().userEnabledMkldnn() || !__builtin_cpu_supports("avx512bf16")) return false;
  static const bool answer = multiplies();
  return answer;
#else
  return false;
#endif
}

}  // namespace luffy
