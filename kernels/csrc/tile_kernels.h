// The arithmetic on a tile of logits, compiled once per instruction set; `tile_kernels()` picks at run time.
#pragma once

#include <cstdint>

namespace luffy {

constexpr int64_t kLanes = 16;           // tokens of a vector
constexpr int64_t kTokens = 64;          // tokens of a tile
constexpr float kLowest = -1e30f;        // stands for -inf: exp gives 0 and 0 * kLowest is 0, not NaN
constexpr float kOutside = 2 * kLowest;  // no entry at all, even for a token all of whose entries are kLowest

struct Transform {
  const float* bias;         // [V] or null
  const float* temperature;  // [padded N]
  float logit_scale;
  float softcap;  // 0: none
};

// Statistics of one tile, or of some entries of it, [kTokens] each. They are centred by their own maximum: in another
// reference the small terms would be lost beside a large one.
constexpr int64_t kFields = 4, kMerged = kFields + 1;
struct Stats {
  float* data;                                            // [kFields, kTokens]
  float* max() const { return data; }                     // m = max z
  float* sum() const { return data + kTokens; }           // sum exp(z - m)
  float* weighted() const { return data + 2 * kTokens; }  // sum exp(z - m) (z - m)
  float* flat() const { return data + 3 * kTokens; }      // sum z, where asked for
};

// dz = E (offset + slope c) + uniform, times the softcap's derivative, with c = log(E factor) = z - max: a logarithm of
// E alone would spend its digits on the distance of the reference from the maximum. [kTokens] each; softcap 0: none.
struct Shape {
  const float *offset, *slope, *uniform, *factor, *max, *temperature;
  float softcap;
};

// Tiles are [count, kTokens], a token per column. 16-bit ones hold two vocabulary entries per word, the even one in the
// low half: [ceil(count / 2), kTokens] words, which is the VNNI layout of a product's right operand. Matrix units and
// dot products of bfloat16 both read it.
struct TileKernels {
  const char* name;
  // Scales, biases, caps and cools a tile in place; `first` is its first vocabulary entry, `token` its first token.
  void (*transform)(float* tile, int64_t count, int64_t first, int64_t token, const Transform& how);
  void (*stats)(const float* tile, int64_t count, const Stats& out);
  // The same, and exp(z - reference) into `exps`.
  void (*exps_fp32)(const float* tile, int64_t count, const float* reference, const Stats& out, float* exps);
  void (*exps_bf16)(const float* tile, int64_t count, const float* reference, const Stats& out, uint32_t* exps);
  void (*flat)(const float* tile, int64_t count, const Stats& out);
  // Statistics of `pieces` tiles, `stride` apart, as one, and the sum of the exponentials that exps_* wrote with this
  // reference, in fp32 as they were before a conversion to bfloat16: out [kMerged, kTokens] fp64.
  void (*merge)(const float* partial, int64_t pieces, int64_t stride, const float* reference, double* out);
  // sum E and sum E log(E factor) of a tile of exponentials, [kTokens] each.
  void (*logs_fp32)(const float* exps, int64_t count, const float* factor, float* sum, float* weighted);
  void (*logs_bf16)(const uint32_t* exps, int64_t count, const float* factor, float* sum, float* weighted);
  // E -> dz in place.
  void (*shape_fp32)(float* tile, int64_t count, const Shape& shape);
  void (*shape_bf16)(uint32_t* tile, int64_t count, const Shape& shape);
  // Words of a tile -> its entries as rows, out [count, ld] from column 0 on.
  void (*unpair)(const uint32_t* tile, int64_t count, uint16_t* out, int64_t ld);
  // out [columns, rows] = in [rows, columns]^T. 16-bit `columns` are even.
  void (*transpose_32)(const uint32_t* in, int64_t rows, int64_t columns, int64_t in_ld, uint32_t* out, int64_t ld);
  void (*transpose_16)(const uint16_t* in, int64_t rows, int64_t columns, int64_t in_ld, uint16_t* out, int64_t ld);
  // out[i] = sum_j row_i[j] scale[j], rows of n entries (a multiple of kLanes).
  void (*dots_fp32)(const float* rows, int64_t count, int64_t n, int64_t ld, const float* scale, float* out);
  void (*dots_bf16)(const uint16_t* rows, int64_t count, int64_t n, int64_t ld, const float* scale, float* out);
  void (*scale_bf16)(const float* in, int64_t n, float factor, uint16_t* out);  // out = in factor, rounded to even
  void (*exp)(const float* in, int64_t n, float* out);                          // for tests of their accuracy
  void (*log)(const float* in, int64_t n, float* out);
};

const TileKernels& tile_kernels_base();
#ifdef LUFFY_X86_VARIANTS
const TileKernels& tile_kernels_v3();  // AVX2, FMA
const TileKernels& tile_kernels_v4();  // AVX-512
#endif

// The best that this CPU has, or what the environment's LUFFY_KERNELS_ISA names (base, v3, v4) if it has that.
const TileKernels& tile_kernels();

}  // namespace luffy
