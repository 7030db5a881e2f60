// See tile_kernels.h. Compiled once per instruction set (LUFFY_VARIANT), so it includes nothing whose inline functions
// another translation unit could pick up: no ATen, no containers.
#include "tile_kernels.h"

#include <cstring>

#define LUFFY_JOIN(a, b) a##b
#define LUFFY_NAME(variant) LUFFY_JOIN(tile_kernels_, variant)

namespace luffy {
namespace {

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using IntVec = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

// exp for x <= 0 (or small x > 0), relative error about 1e-7: x = n ln 2 + r, |r| <= ln 2 / 2, Taylor to r^7.
inline Vec fast_exp(const Vec& x) {
  const Vec round = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the low bits
  const Vec shifted = x * 1.44269504088896341f + round;
  const Vec n = shifted - round;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec two_n = (Vec)(((IntVec)shifted << 23) + 0x3f800000);
  return x < -87.0f ? Vec{} : p * two_n;
}

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline void store(float* to, const Vec& x) { std::memcpy(to, &x, sizeof(x)); }

inline Vec vec_max(const Vec& a, const Vec& b) { return a > b ? a : b; }

// tanh(x) = 1 - 2 / (exp(2x) + 1), saturated where fp32 cannot tell it from 1.
inline Vec fast_tanh(Vec x) {
  x = x > 10.0f ? Vec{} + 10.0f : x;
  x = x < -10.0f ? Vec{} - 10.0f : x;
  return 1.0f - 2.0f / (fast_exp(2.0f * x) + 1.0f);
}

// Scales, biases, caps and cools a tile in place. tile: [count, kTokens]; `first` is its first vocabulary entry.
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

// Folds a tile into the running statistics of its tokens.
void accumulate(const float* tile, int64_t count, int64_t token, const Stats& stats) {
  for (int64_t lane = 0; lane < kTokens; lane += kLanes) {
    const float* column = tile + lane;
    const int64_t at = token + lane;
    const Vec before = load(stats.max + at);
    Vec peak = before;
    for (int64_t v = 0; v < count; ++v) peak = vec_max(load(column + v * kTokens), peak);
    // Moving the reference point from `before` to `peak`: with d <= 0, s -> s e^d and t -> (t + d s) e^d.
    const Vec shift = before - peak, rescale = fast_exp(shift);
    Vec sum = load(stats.sum + at);
    Vec weighted = (load(stats.weighted + at) + shift * sum) * rescale;
    sum = sum * rescale;
    Vec tile_sum{}, tile_weighted{};
    for (int64_t v = 0; v < count; ++v) {
      const Vec centred = load(column + v * kTokens) - peak;
      const Vec e = fast_exp(centred);
      tile_sum += e;
      tile_weighted += e * centred;
    }
    store(stats.max + at, peak);
    store(stats.sum + at, sum + tile_sum);
    store(stats.weighted + at, weighted + tile_weighted);
  }
}

constexpr float kOutside = 2 * kLowest;  // no entry at all: exp gives 0 even in a row whose entries are all kLowest
constexpr int64_t kBlock = 4096;  // entries summed in fp32 before they join a double: the error does not grow with V

// The last, partial vector of a row, filled up with `fill`.
inline Vec load_tail(const float* from, int64_t count, float fill) {
  Vec x = Vec{} + fill;
  std::memcpy(&x, from, count * sizeof(float));
  return x;
}

void center_row(float* row, int64_t n, float* out) {
  const int64_t whole = n / kLanes * kLanes;
  Vec peaks = load_tail(row + whole, n - whole, kLowest);
  for (int64_t v = 0; v < whole; v += kLanes) peaks = vec_max(load(row + v), peaks);
  float peak = peaks[0];
  for (int64_t i = 1; i < kLanes; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
  double sum = 0, weighted = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < n ? start + kBlock : n;
    Vec sums{}, products{};
    for (int64_t v = start; v < end; v += kLanes) {
      const int64_t count = end - v < kLanes ? end - v : kLanes;
      const Vec c = (count == kLanes ? load(row + v) : load_tail(row + v, count, kOutside)) - peak;
      const Vec e = fast_exp(c);
      std::memcpy(row + v, &c, count * sizeof(float));
      sums += e;
      products += e * c;
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      sum += sums[i];
      weighted += products[i];
    }
  }
  out[0] = peak;
  out[1] = static_cast<float>(sum);
  out[2] = static_cast<float>(weighted);
}

void grad_row(const float* row, int64_t n, float offset, float slope, float* out) {
  for (int64_t v = 0; v < n; v += kLanes) {
    const int64_t count = n - v < kLanes ? n - v : kLanes;
    const Vec c = count == kLanes ? load(row + v) : load_tail(row + v, count, kLowest);
    const Vec dz = fast_exp(c) * (offset + slope * c);
    std::memcpy(out + v, &dz, count * sizeof(float));
  }
}

void grad_row_bf16(const float* row, int64_t n, float offset, float slope, uint16_t* out) {
  using ShortVec = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  for (int64_t v = 0; v < n; v += kLanes) {
    const int64_t count = n - v < kLanes ? n - v : kLanes;
    const Vec c = count == kLanes ? load(row + v) : load_tail(row + v, count, kLowest);
    const Vec dz = fast_exp(c) * (offset + slope * c);
    const IntVec bits = (IntVec)dz;
    IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = dz == dz ? rounded : IntVec{} + 0x7fc0;  // rounding must not turn a NaN into an infinity
    const ShortVec half = __builtin_convertvector(rounded, ShortVec);
    std::memcpy(out + v, &half, count * sizeof(uint16_t));
  }
}

}  // namespace

const TileKernels& LUFFY_NAME(LUFFY_VARIANT)() {
  static constexpr TileKernels kernels{transform, accumulate, center_row, grad_row, grad_row_bf16};
  return kernels;
}

}  // namespace luffy
