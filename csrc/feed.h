// The words of a strip, some at a time, with bounds checked once for all of those words: `by_blocks` for bfloat16
// values, `Feed` for integers, which come as int8: what is next in memory where that will do, else a copy.
//
// Include it after LOSA_TARGET_BEGIN, so that it is compiled for that instruction set: without its population counts
// this takes longer than all the rest. Everything here has internal linkage, so that no other file gets that copy.
#pragma once

#include "kernels.h"

namespace losa {
namespace {

constexpr int64_t kFeed = 64;      // words at a time: 256 columns, as in a tile
constexpr int64_t kFedMost = 128;  // and at most: from memory, int4 in words of 64 and of 256 is 7 and 18 % slower
template <int64_t N>
using Bits = std::integral_constant<int64_t, N>;  // what `unpack` is found by

// Visits words of bfloat16 values by blocks, visit(reader, first, n): with Reader<false>, which looks at no bounds, as
// long as every word of a block may be full, and with Reader<true> what is left.
template <template <bool> class Reader, typename Visit>
inline Cursor by_blocks(const Packed& p, Cursor cursor, int64_t words, Visit visit) {
  const auto* values = static_cast<const bf16*>(p.values);
  Reader<false> fast{values + cursor.value, values + p.count};
  int64_t i = 0;
  for (; i + kBlock <= words && fast.end - fast.v >= kBlock * kWordBits16; i += kBlock) visit(fast, i, kBlock);
  Reader<true> safe{fast.v, fast.end};
  visit(safe, i, words - i);
  return {safe.v - values, cursor.ok && safe.ok};
}

class Feed {
 public:
  Feed(const Packed& p, int64_t value) : value(value), p_(p) {}

  const uint8_t* mask = nullptr;   // of the words
  const int8_t* values = nullptr;  // of the words; 64 more bytes may be read
  int64_t value;                   // the one after those of the words
  bool ok = true;                  // false once the masks asked for more values than there are

  // Moves on to the next `words` and returns how many values they have. `unpack(Bits<N>(), codes, n, out)` makes int8
  // of n bytes of codes of so many bits, and may read 64 and write 128 too many; a type of eight bits needs none.
  template <ValueType V, typename Unpack>
  inline int64_t next(const uint8_t* from, int64_t words, Unpack unpack) {
    constexpr TypeRow row = row_of(V);
    int64_t n = 0;
    for (int64_t i = 0; i < words; ++i) n += __builtin_popcountll(word_of(from, i));
    const int64_t left = p_.count - value;
    if (left < n) return copy<V>(from, words, unpack);
    const bool last = left < n + 128;  // others may read further than their own
    mask = from;
    if constexpr (row.bits == 8) {
      values = static_cast<const int8_t*>(p_.values) + value;
      if (last) values = static_cast<const int8_t*>(std::memcpy(copied_, values, size_t(n)));
    } else {
      const uint8_t* codes = static_cast<const uint8_t*>(p_.values) + value / row.shared();
      const int64_t early = value % row.shared(), bytes = divide_up(early + n, row.shared());
      if (last) codes = static_cast<const uint8_t*>(std::memcpy(codes_, codes, size_t(bytes)));
      unpack(Bits<row.bits>(), codes, bytes, copied_);
      values = copied_ + early;
    }
    value += n;
    return n;
  }

 private:
  static inline uint64_t word_of(const uint8_t* from, int64_t i) {
    uint64_t m;
    std::memcpy(&m, from + 8 * i, 8);
    return m;
  }
  // More values than there are: one by one. A word that they do not suffice for counts as empty.
  template <ValueType V, typename Unpack>
  int64_t copy(const uint8_t* from, int64_t words, Unpack unpack) {
    int8_t* out = copied_;
    for (int64_t i = 0; i < words; ++i) {
      uint64_t m = word_of(from, i);
      int64_t n = __builtin_popcountll(m);
      if (p_.count - value < n) {
        ok = false;
        m = 0;
        n = 0;
      }
      std::memcpy(masks_ + 8 * i, &m, 8);
      for (int64_t j = 0; j < n; ++j, ++value) *out++ = one<V>(unpack, value);
    }
    mask = masks_;
    values = copied_;
    return out - copied_;
  }

  template <ValueType V, typename Unpack>
  int8_t one(Unpack unpack, int64_t i) {
    constexpr TypeRow row = row_of(V);
    if constexpr (row.bits == 8)
      return static_cast<const int8_t*>(p_.values)[i];
    else {
      int8_t some[256];
      codes_[0] = static_cast<const uint8_t*>(p_.values)[i / row.shared()];
      unpack(Bits<row.bits>(), codes_, 1, some);
      return some[i % row.shared()];
    }
  }

  const Packed& p_;
  alignas(64) uint8_t masks_[8 * kFedMost];
  alignas(64) int8_t copied_[kWordBits8 * kFedMost + 256];
  uint8_t codes_[kWordBits8 * kFedMost / 2 + 128];
};

}  // namespace
}  // namespace losa
