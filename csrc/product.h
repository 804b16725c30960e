// y = x W^T + b of a packed weight, in plain C++: what the torch operator calls, and what a decoding step may call by
// itself.
#pragma once

#include <functional>

#include "kernels.h"

namespace losa {

// Runs `work(from, to)` over parts of [begin, end) on as many threads as the caller has; parts are at least `grain`
// long.
using Work = std::function<void(int64_t, int64_t)>;
using Parallel = std::function<void(int64_t begin, int64_t end, int64_t grain, const Work& work)>;

// Whether `multiply` is the fast way for so many tokens; past that, a dense panel and a GEMM (ops.cpp) are.
inline bool multiplies(const Kernels& k, ValueType type, int64_t tokens) {
  return tokens <= k.tile_tokens || tokens <= k.stream_tokens(type);
}

// A weight, and where its product goes.
struct Part {
  Packed p;
  const bf16* bias;  // [rows] or null
  bf16* y;           // [tokens, rows]
};

// y [tokens, rows] = x [tokens, columns] W^T + bias, of every part; parts have the same columns and type, and share
// what is made of x and the threads that are woken. Few tokens are multiplied while the weights stream by; more share
// tiles that are decoded into the L1 cache. The bits of y do not depend on the number of threads, nor on which parts
// come together. Returns false if masks and values disagree.
bool multiply(const Part* parts, int64_t n_parts, const Kernels& k, const bf16* x, int64_t tokens,
              const Parallel& parallel);

// Strips [begin, end) as rows of the dense panel [rows, columns] that begins with strip `first_strip`; bf16 or float.
template <typename T>
bool expand(const Packed& p, const Kernels& k, int64_t first_strip, int64_t begin, int64_t end, T* panel);

// Strips a thread gets at least: below some 64 thousand weights, waking a thread costs more than it does.
inline int64_t grain(const Packed& p, int64_t rows) {
  const int64_t strips = 65536 / (rows * p.columns + 1);
  return strips > 1 ? strips : 1;
}

}  // namespace losa
