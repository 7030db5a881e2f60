// The arithmetic on a tile of logits, compiled once per instruction set; `tile_kernels()` picks at run time.
#pragma once

#include <cstdint>

namespace luffy {

constexpr int64_t kLanes = 16;     // tokens of a vector
constexpr int64_t kTokens = 64;    // tokens of a tile
constexpr float kLowest = -1e30f;  // stands for -inf: exp gives 0 and 0 * kLowest is 0, not NaN

struct Transform {
  const float* bias;         // [V] or null
  const float* temperature;  // [padded N]
  float logit_scale;
  float softcap;  // 0: none
};

struct Stats {  // [padded N] each
  float *max, *sum, *weighted, *target;
};

struct TileKernels {
  // Scales, biases, caps and cools a tile in place. tile: [count, kTokens]; `first` is its first vocabulary entry.
  void (*transform)(float* tile, int64_t count, int64_t first, int64_t token, const Transform& how);
  // Folds a tile into the running statistics of its tokens.
  void (*accumulate)(const float* tile, int64_t count, int64_t token, const Stats& stats);
  // Centres a row of n logits at its maximum, in place. out: max, sum exp(c), sum exp(c) c over the centred logits c.
  void (*center_row)(float* row, int64_t n, float* out);
  // out[v] = exp(c[v]) (offset + slope c[v]), as fp32 or, rounded to nearest even, as the bits of a bf16.
  void (*grad_row)(const float* row, int64_t n, float offset, float slope, float* out);
  void (*grad_row_bf16)(const float* row, int64_t n, float offset, float slope, uint16_t* out);
};

const TileKernels& tile_kernels_base();
#ifdef LUFFY_X86_VARIANTS
const TileKernels& tile_kernels_v3();  // AVX2, FMA
const TileKernels& tile_kernels_v4();  // AVX-512
#endif

inline const TileKernels& tile_kernels() {
#ifdef LUFFY_X86_VARIANTS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2")) {
    return tile_kernels_v4();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return tile_kernels_v3();
  }
#endif
  return tile_kernels_base();
}

}  // namespace luffy
