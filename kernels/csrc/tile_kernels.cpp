// See tile_kernels.h. Compiled once per instruction set (LUFFY_VARIANT), so it includes nothing whose inline functions
// another translation unit could pick up: no ATen, no containers.
#include "tile_kernels.h"

#include <cstring>

#define LUFFY_JOIN(a, b) a##b
#define LUFFY_NAME(variant) LUFFY_JOIN(tile_kernels_, variant)
#define LUFFY_QUOTE(variant) #variant
#define LUFFY_STRING(variant) LUFFY_QUOTE(variant)

namespace luffy {
namespace {

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using IntVec = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using HalfVec = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

template <typename To, typename From>
inline To load_as(const From* from) {
  To x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline Vec load(const float* from) { return load_as<Vec>(from); }
template <typename V, typename T>
inline void store(T* to, const V& x) {
  std::memcpy(to, &x, sizeof(x));
}
// One instruction each, which gives b where either is NaN.
inline Vec vec_max(const Vec& a, const Vec& b) { return a > b ? a : b; }
inline Vec vec_min(const Vec& a, const Vec& b) { return a < b ? a : b; }

// x = n ln 2 + r, |r| <= ln 2 / 2, and e^r = 1 + r + r^2 q(r) with q fitted to a relative error of 3e-9. Within 1 ulp
// with fused multiply-add, 1.25 without; 0 below -87, e^88 above 88, and NaN stays NaN.
inline Vec fast_exp(const Vec& argument) {
  const Vec x = vec_min(Vec{} + 88.0f, argument);
  const Vec round = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the low bits
  const Vec shifted = x * 1.44269504088896341f + round;
  const Vec n = shifted - round;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.3814539415761828e-3f;
  p = p * r + 8.36874544620514e-3f;
  p = p * r + 4.166838899254799e-2f;
  p = p * r + 1.666652113199234e-1f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec two_n = (Vec)(((IntVec)shifted << 23) + 0x3f800000);
  return x < -87.0f ? Vec{} : p * two_n;
}

// Of positive normal numbers; anything in other lanes. x = 2^n m, 1/sqrt 2 <= m < sqrt 2, and with s = (m-1)/(m+1):
// log m = 2 (s + s^3/3 + s^5/5 + s^7/7 + s^9/9).
inline Vec fast_log(const Vec& x) {
  const IntVec bits = (IntVec)x - 0x3f3504f3;  // of sqrt(1/2)
  const IntVec n = bits >> 23;
  const Vec m = (Vec)((IntVec)x - (n << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  Vec p = Vec{} + 2.0f / 9;
  p = p * s2 + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  p = p * s2 * s + 2.0f * s;
  const Vec whole = __builtin_convertvector(n, Vec);
  return whole * 0.693359375f + (p - whole * 2.12194440e-4f);
}

// tanh(x) = 1 - 2 / (exp(2x) + 1), saturated where fp32 cannot tell it from 1, and near 0, where that cancels, x + x^3
// q with q fitted to a relative error of 4e-9.
inline Vec fast_tanh(Vec x) {
  x = x > 10.0f ? Vec{} + 10.0f : x;
  x = x < -10.0f ? Vec{} - 10.0f : x;
  const Vec square = x * x;
  Vec q = Vec{} - 5.704986862838268e-3f;
  q = q * square + 2.063908614218235e-2f;
  q = q * square - 5.373971536755562e-2f;
  q = q * square + 1.3331441581249237e-1f;
  q = q * square - 3.333328068256378e-1f;
  return square < 0.390625f ? x + x * square * q : 1.0f - 2.0f / (fast_exp(2.0f * x) + 1.0f);
}

// The bits of a bfloat16, rounded to nearest even, in the upper half of each lane (the lower is junk).
inline IntVec rounded(const Vec& x) {
  const IntVec bits = (IntVec)x;
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : IntVec{} + 0x7fc00000;  // a NaN must not round to infinity
}
inline IntVec pair(const Vec& low, const Vec& high) {
  return ((rounded(low) >> 16) & 0xffff) | (rounded(high) & (int32_t)0xffff0000);
}
inline Vec low_half(const IntVec& words) { return (Vec)(words << 16); }
inline Vec high_half(const IntVec& words) { return (Vec)(words & (int32_t)0xffff0000); }

void transform(float* tile, int64_t count, int64_t first, int64_t token, const Transform& how) {
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    const Vec cool = 1.0f / load(how.temperature + token + lane);
    for (int64_t v = 0; v < count; ++v) {
      float* at = tile + v * kTokens + lane;
      Vec z = load(at);
      if (how.bias != nullptr) {
        z = z + how.bias[first + v];
        z = z < kLowest ? Vec{} + kLowest : z;
      }
      z = z * how.logit_scale;
      // A masked entry (bias -inf) stays masked: the cap would bring it back as -softcap.
      if (how.softcap > 0) z = z <= kLowest * how.logit_scale ? z : how.softcap * fast_tanh(z / how.softcap);
      store(at, z * cool);
    }
  }
}

// The statistics of a tile for a vector of tokens: one pass for the maximum, one for the rest.
struct Column {
  Vec max{}, sum{}, weighted{};

  Column(const float* column, int64_t count) : max(Vec{} + kOutside) {
    for (int64_t v = 0; v < count; ++v) max = vec_max(load(column + v * kTokens), max);
  }
  Vec add(const Vec& z) {
    const Vec c = z - max, e = fast_exp(c);
    sum += e;
    weighted += e * c;
    return e;
  }
  void write(const Stats& out, int64_t lane) const {
    store(out.max() + lane, max);
    store(out.sum() + lane, sum);
    store(out.weighted() + lane, weighted);
  }
};

void stats(const float* tile, int64_t count, const Stats& out) {
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    Column column(tile + lane, count);
    for (int64_t v = 0; v < count; ++v) column.add(load(tile + v * kTokens + lane));
    column.write(out, lane);
  }
}

void exps_fp32(const float* tile, int64_t count, const float* reference, const Stats& out, float* exps) {
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    Column column(tile + lane, count);
    const Vec factor = fast_exp(column.max - load(reference + lane));
    for (int64_t v = 0; v < count; ++v) {
      store(exps + v * kTokens + lane, factor * column.add(load(tile + v * kTokens + lane)));
    }
    column.write(out, lane);
  }
}

void exps_bf16(const float* tile, int64_t count, const float* reference, const Stats& out, uint32_t* exps) {
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    Column column(tile + lane, count);
    const Vec factor = fast_exp(column.max - load(reference + lane));
    for (int64_t v = 0; v < count; v += 2) {
      const float* at = tile + v * kTokens + lane;
      const Vec low = factor * column.add(load(at));
      const Vec high = v + 1 < count ? factor * column.add(load(at + kTokens)) : Vec{};
      store(exps + v / 2 * kTokens + lane, pair(low, high));
    }
    column.write(out, lane);
  }
}

void flat(const float* tile, int64_t count, const Stats& out) {
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    Vec sum{};
    for (int64_t v = 0; v < count; ++v) sum += load(tile + v * kTokens + lane);
    store(out.flat() + lane, sum);
  }
}

void merge(const float* partial, int64_t pieces, int64_t stride, const float* reference, double* out) {
  using WideVec = double __attribute__((vector_size(kLanes * sizeof(double))));
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    const float* const from = partial + lane;
    Vec max = load(from);
    for (int64_t i = 1; i < pieces; ++i) max = vec_max(load(from + i * stride), max);
    const Vec origin = load(reference + lane);
    WideVec sum{}, weighted{}, flat{}, exps{};
    for (int64_t i = 0; i < pieces; ++i) {
      const float* const at = from + i * stride;
      // Moving the centre by d <= 0: s -> s e^d and w -> (w + d s) e^d.
      const Vec shift = load(at) - max, scale = fast_exp(shift), part = load(at + kTokens);
      sum += __builtin_convertvector(part * scale, WideVec);
      weighted += __builtin_convertvector((load(at + 2 * kTokens) + shift * part) * scale, WideVec);
      flat += __builtin_convertvector(load(at + 3 * kTokens), WideVec);
      exps += __builtin_convertvector(part * fast_exp(load(at) - origin), WideVec);
    }
    store(out + lane, __builtin_convertvector(max, WideVec));
    store(out + kTokens + lane, sum);
    store(out + 2 * kTokens + lane, weighted);
    store(out + 3 * kTokens + lane, flat);
    store(out + 4 * kTokens + lane, exps);
  }
}

// log x, 0 where x is 0: it is only ever multiplied by x. Subnormal x count as 0.
inline Vec log_or_zero(const Vec& x) { return x > 1.17549435e-38f ? fast_log(x) : Vec{}; }

// Sums of stretches join totals, so that the error does not grow with the tile.
constexpr int64_t kStretch = 128;

template <typename Read>
void logs(int64_t count, const float* factor, float* sum, float* weighted, int64_t step, const Read& read) {
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    const Vec by = load(factor + lane);
    Vec total{}, total_weighted{};
    for (int64_t start = 0; start < count; start += kStretch) {
      Vec part{}, part_weighted{};
      for (int64_t v = start; v < count && v < start + kStretch; v += step) {
        read(v, lane, [&](const Vec& e) {
          part += e;
          part_weighted += e * log_or_zero(e * by);
        });
      }
      total += part;
      total_weighted += part_weighted;
    }
    store(sum + lane, total);
    store(weighted + lane, total_weighted);
  }
}

void logs_fp32(const float* exps, int64_t count, const float* factor, float* sum, float* weighted) {
  logs(count, factor, sum, weighted, 1,
       [&](int64_t v, int64_t lane, const auto& add) { add(load(exps + v * kTokens + lane)); });
}

void logs_bf16(const uint32_t* exps, int64_t count, const float* factor, float* sum, float* weighted) {
  logs(count, factor, sum, weighted, 2, [&](int64_t v, int64_t lane, const auto& add) {
    const IntVec words = load_as<IntVec>(exps + v / 2 * kTokens + lane);  // past an odd end: 0
    add(low_half(words));
    add(high_half(words));
  });
}

// E -> dz for a vector of tokens. An entry that is 0 has no logarithm and needs none; it counts as capped.
struct Shaper {
  Vec offset, slope, uniform, factor, max, inner;
  bool capped;

  Shaper(const Shape& shape, int64_t lane)
      : offset(load(shape.offset + lane)),
        slope(load(shape.slope + lane)),
        uniform(load(shape.uniform + lane)),
        factor(load(shape.factor + lane)),
        max(load(shape.max + lane)),
        inner(load(shape.temperature + lane)),
        capped(shape.softcap > 0) {
    if (capped) inner = inner / shape.softcap;
  }
  Vec operator()(const Vec& e) const {
    const Vec c = log_or_zero(e * factor);
    Vec dz = e * (offset + slope * c) + uniform;
    if (capped) {
      const Vec tanh = (c + max) * inner;
      const Vec slope_of_cap = vec_max(1.0f - tanh * tanh, Vec{});
      dz = e > 0.0f ? dz * slope_of_cap : Vec{};
    }
    return e == e ? dz : e;
  }
};

void shape_fp32(float* tile, int64_t count, const Shape& shape) {
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    const Shaper shaper(shape, lane);
    for (int64_t v = 0; v < count; ++v) {
      float* at = tile + v * kTokens + lane;
      store(at, shaper(load(at)));
    }
  }
}

void shape_bf16(uint32_t* tile, int64_t count, const Shape& shape) {
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    const Shaper shaper(shape, lane);
    for (int64_t v = 0; v < count; v += 2) {
      uint32_t* at = tile + v / 2 * kTokens + lane;
      const IntVec words = load_as<IntVec>(at);
      const Vec high = v + 1 < count ? shaper(high_half(words)) : Vec{};
      store(at, pair(shaper(low_half(words)), high));
    }
  }
}

void unpair(const uint32_t* tile, int64_t count, uint16_t* out, int64_t ld) {
  for (int64_t v = 0; v < count; v += 2) {
    for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
      const IntVec words = load_as<IntVec>(tile + v / 2 * kTokens + lane);
      store(out + v * ld + lane, __builtin_convertvector(words, HalfVec));
      if (v + 1 < count) store(out + (v + 1) * ld + lane, __builtin_convertvector(words >> 16, HalfVec));
    }
  }
}

// One stage of a 16 x 16 transpose: exchanges the off-diagonal blocks of side `kSide`.
template <int kSide>
inline void exchange(IntVec* rows) {
  IntVec upper, lower;
  for (int j = 0; j < kLanes; ++j) {
    upper[j] = (j & kSide) == 0 ? j : kLanes + j - kSide;
    lower[j] = (j & kSide) == 0 ? j + kSide : kLanes + j;
  }
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kSide) != 0) continue;
    const IntVec a = rows[i], b = rows[i + kSide];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kSide] = __builtin_shuffle(a, b, lower);
  }
}

inline void transpose_block(IntVec* rows) {
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
}

void transpose_32(const uint32_t* in, int64_t rows, int64_t columns, int64_t in_ld, uint32_t* out, int64_t ld) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  for (int64_t r = 0; r < whole_rows; r += kLanes) {
    for (int64_t c = 0; c < whole_columns; c += kLanes) {
      IntVec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load_as<IntVec>(in + (r + i) * in_ld + c);
      transpose_block(block);
      for (int i = 0; i < kLanes; ++i) store(out + (c + i) * ld + r, block[i]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) out[c * ld + r] = in[r * in_ld + c];
  }
}

void transpose_16(const uint16_t* in, int64_t rows, int64_t columns, int64_t in_ld, uint16_t* out, int64_t ld) {
  constexpr int64_t kWide = 2 * kLanes;  // two columns to a word
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kWide * kWide;
  for (int64_t r = 0; r < whole_rows; r += kLanes) {
    for (int64_t c = 0; c < whole_columns; c += kWide) {
      IntVec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load_as<IntVec>(in + (r + i) * in_ld + c);
      transpose_block(block);
      for (int i = 0; i < kLanes; ++i) {
        store(out + (c + 2 * i) * ld + r, __builtin_convertvector(block[i], HalfVec));
        store(out + (c + 2 * i + 1) * ld + r, __builtin_convertvector(block[i] >> 16, HalfVec));
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) out[c * ld + r] = in[r * in_ld + c];
  }
}

inline float total(const Vec& x) {
  float sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

void dots_fp32(const float* rows, int64_t count, int64_t n, int64_t ld, const float* scale, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    Vec sum{};
    for (int64_t j = 0; j < n; j += kLanes) sum += load(rows + i * ld + j) * load(scale + j);
    out[i] = total(sum);
  }
}

void dots_bf16(const uint16_t* rows, int64_t count, int64_t n, int64_t ld, const float* scale, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    Vec sum{};
    for (int64_t j = 0; j < n; j += kLanes) {
      const IntVec words = __builtin_convertvector(load_as<HalfVec>(rows + i * ld + j), IntVec);
      sum += low_half(words) * load(scale + j);
    }
    out[i] = total(sum);
  }
}

void scale_bf16(const float* in, int64_t n, float factor, uint16_t* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    Vec x{};
    std::memcpy(&x, in + i, count * sizeof(float));
    const HalfVec y = __builtin_convertvector(rounded(x * factor) >> 16, HalfVec);
    std::memcpy(out + i, &y, count * sizeof(uint16_t));
  }
}

template <Vec (*kFunction)(const Vec&)>
void each(const float* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    Vec x{};
    std::memcpy(&x, in + i, count * sizeof(float));
    const Vec y = kFunction(x);
    std::memcpy(out + i, &y, count * sizeof(float));
  }
}

}  // namespace

const TileKernels& LUFFY_NAME(LUFFY_VARIANT)() {
  static constexpr TileKernels kernels{LUFFY_STRING(LUFFY_VARIANT),
                                       transform,
                                       stats,
                                       exps_fp32,
                                       exps_bf16,
                                       flat,
                                       merge,
                                       logs_fp32,
                                       logs_bf16,
                                       shape_fp32,
                                       shape_bf16,
                                       unpair,
                                       transpose_32,
                                       transpose_16,
                                       dots_fp32,
                                       dots_bf16,
                                       scale_bf16,
                                       each<fast_exp>,
                                       each<fast_log>};
  return kernels;
}

}  // namespace luffy
