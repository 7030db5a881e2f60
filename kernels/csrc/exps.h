// Chunks of exp(z - reference): how they lie in memory, for the sweep that writes them and the products that read them.
//
//   [blocks of kTokens tokens, V rounded up, kTokens], words of bfloat16 (VNNI pairs of vocabulary entries, see
//   tile_kernels.h) where the CPU multiplies bfloat16, of float32 elsewhere
//
// The entry of a token's own target is 0: it is handled in scalars, so that 1 - p does not cancel.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

#include "tile_kernels.h"

namespace luffy {

// Entries that lie side by side in the right operand of a product.
template <typename Word>
constexpr int64_t kPair = sizeof(Word) == 2 ? 2 : 1;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t token_blocks(int64_t tokens) { return (tokens + kTokens - 1) / kTokens; }

template <typename Word>
struct Exps {
  Word* data;
  int64_t vocabulary;

  int64_t rows() const { return round_up(vocabulary, kPair<Word>); }
  // The tile of a block of tokens that begins at vocabulary entry v, even for words of two.
  Word* tile(int64_t block, int64_t v) const { return data + (block * rows() + v) * kTokens; }
  Word& at(int64_t token, int64_t v) const {
    constexpr int64_t pair = kPair<Word>;
    return tile(token / kTokens, v / pair * pair)[token % kTokens * pair + v % pair];
  }
};

// Whether chunks of this head are bfloat16 words: products need an even width.
bool bf16_words(const at::Tensor& weight);

// [n, H] -> [padded, H] of this dtype, zeros below.
inline at::Tensor padded_rows(const at::Tensor& rows, at::ScalarType dtype) {
  auto out = at::zeros({token_blocks(rows.size(0)) * kTokens, rows.size(1)}, rows.options().dtype(dtype));
  out.narrow(0, 0, rows.size(0)).copy_(rows);
  return out;
}

}  // namespace luffy
