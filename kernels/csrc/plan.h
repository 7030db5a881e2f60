// How the work on a chunk is cut into tasks. Only sizes that no result depends on may depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "exps.h"
#include "tile_kernels.h"

namespace luffy {

constexpr int64_t kHeight = 256;             // vocabulary entries of a tile, fewer where H is large
constexpr int64_t kWeightBytes = 512 << 10;  // of the weight's rows for a tile: half of a 1 MiB L2
constexpr int64_t kDepth = 512;              // entries of the inner dimension of a product
constexpr int64_t kSpan = 4096;              // vocabulary entries of a span, at most, per kSpanThreads threads
constexpr int64_t kSpanBytes = 8 << 20;      // of a span's transposed weight, likewise
constexpr int64_t kSpanThreads = 8;
constexpr int64_t kScratchBytes = 256 << 10;  // of a dW task's exponentials, a fraction of L2
constexpr int64_t kPad = 32;                  // keeps leading dimensions off powers of two, which share cache sets
constexpr int64_t kGroup = 4;                 // token blocks of a dH task
constexpr int64_t kPerThread = 2;             // tasks that each thread should find

inline int64_t pieces_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Plan {
  // First sweep: `pieces` tiles of `height` entries, each for one of `parts` shares of the tokens.
  int64_t height, pieces, parts;
  // Second sweep: spans of the vocabulary. A dH task is one of `groups` of token blocks and `dh_width` of H; a dW task
  // `dw_height` entries of the vocabulary and `dw_width` of H.
  int64_t span, groups, dh_width, dw_height, dw_width;

  Plan(int64_t tokens, int64_t width, int64_t vocabulary, int64_t word, int64_t threads) {
    const int64_t blocks = token_blocks(tokens), many = kPerThread * threads;
    height = std::clamp(kWeightBytes / (width * word) / kLanes * kLanes, kLanes, kHeight);
    pieces = pieces_of(vocabulary, height);
    parts = std::clamp<int64_t>(2 * many / pieces, 1, blocks);
    const int64_t scale = pieces_of(threads, kSpanThreads);
    const int64_t fitting = scale * kSpanBytes / (width * word) / kDepth * kDepth;
    span =
        std::min(vocabulary, std::clamp(fitting, kDepth, scale * kSpan));  // multiples of kDepth: sums keep their order
    groups = pieces_of(blocks, kGroup);
    const int64_t row = (blocks * kTokens + kPad) * word;
    dw_height = std::clamp<int64_t>(kScratchBytes / row / kLanes * kLanes, kLanes, 2 * kTokens);
    dh_width = share(width, kTokens, many, groups);
    dw_width = share(width, 4 * kTokens, many, pieces_of(span, dw_height));
  }

 private:
  // Of H, so that `others` tasks of a kind become enough for all threads: whole tiles, of about `least` or more.
  static int64_t share(int64_t width, int64_t least, int64_t many, int64_t others) {
    const int64_t wanted = std::clamp<int64_t>(pieces_of(many, others), 1, pieces_of(width, least));
    return round_up(pieces_of(width, wanted), kTokens);
  }
};

}  // namespace luffy
