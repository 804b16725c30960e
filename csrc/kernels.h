// The packed weight and the table of kernels that every instruction set fills in.
//
// Layout (docs/packed-format.md). A weight [rows, columns] is cut into strips of 16 rows. Within a strip, a *word*
// covers 16 rows x `columns of a word`: 2 for bfloat16 values (32 mask bits), 4 for int8 and int4 values (64 mask
// bits). Bit row * columns + column of a word says whether that weight is stored; the stored values follow one another
// in the order of the words and of their bits. So one expanded word is exactly one 64-byte register, in the order that
// the bf16 and int8 dot product instructions want, and a strip is read front to back, once.
//
// Every kernel stays inside `values` whatever the masks say: a corrupt file costs wrong numbers or an error, never a
// read out of bounds.
#pragma once

#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

namespace losa {

constexpr int64_t kStrip = 16;       // rows of a strip
constexpr int64_t kStrips = 2;       // strips that few tokens are multiplied by at once
constexpr int64_t kBlock = 16;       // words decoded between two bounds checks; 64 columns of int8 and int4 values
constexpr int64_t kTilePairs = 128;  // column pairs of a decoded tile: 8 KiB per strip, so that two fit in the L1 cache
constexpr int64_t kTileTokens = 256;  // tokens that share a decoded tile; the next ones decode it again
constexpr int64_t kWordBits16 = 32;   // weights of a word of bfloat16 values: 16 rows x 2 columns
constexpr int64_t kWordBits8 = 64;    // weights of a word of int8 and int4 values: 16 rows x 4 columns
constexpr int64_t kByteTokens = 3;    // up to which activations come as bytes, where the kernels make them
constexpr int64_t kGroup = 64;        // columns of a row that share a scale of int4 values, and of a block of digits

using bf16 = uint16_t;  // bfloat16 by its bits

constexpr int64_t score_room(int64_t tokens) { return (tokens + 15) / 16 * 16; }  // floats, of a head in attention

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline float to_float(bf16 v) {
  const uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline bf16 to_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return bf16(f != f ? 0x7fc0 : nearest);
}

// What the values are: src/losa/runtime/values.py has the same rows. The first integers are kInt8.
enum class ValueType : int64_t { kBFloat16, kInt8, kInt4 };
struct TypeRow {
  int64_t bits;     // of a value
  int64_t columns;  // of a word
  bool scaled;      // they are integers, and rows have a float32 scale
  bool grouped;     // kGroup columns of a row share a scale of one byte, too
  constexpr int64_t shared() const { return bits < 8 ? 8 / bits : 1; }  // values of an element of their tensor
};
constexpr TypeRow kTypeRows[] = {{16, 2, false, false}, {8, 4, true, false}, {4, 4, true, true}};
constexpr int64_t kTypes = std::size(kTypeRows);
constexpr TypeRow row_of(ValueType type) { return kTypeRows[int64_t(type)]; }
constexpr bool is_integer(ValueType type) { return row_of(type).scaled; }

// Blocks of kGroup columns that are summed as integers, weights times so many bytes: one, where a group of either has a
// scale. Of four, sums are below 2^24, so that they are exact as floats too.
constexpr int64_t span_of(ValueType type, int64_t digits) { return row_of(type).grouped || digits == 1 ? 1 : 4; }

// f(the type, as a constant): for what is compiled once for every type from kFirst on.
template <ValueType kFirst, typename F>
auto with_type(ValueType type, F f) {
  constexpr int64_t kNext = int64_t(kFirst) + 1;
  if constexpr (kNext < kTypes)
    if (type != kFirst) return with_type<ValueType(kNext)>(type, f);
  return f(std::integral_constant<ValueType, kFirst>());
}

// Integers of fewer than eight bits are codes without a zero, the first one of a byte lowest: of four bits -8 ... -1,
// 1 ... 8 (src/losa/runtime/integers.py).
template <int64_t kBits>
struct Numbers {
  alignas(16) int8_t of[1 << kBits];
  constexpr Numbers() : of() {
    constexpr int half = 1 << (kBits - 1);
    for (int code = 0; code < 2 * half; ++code) of[code] = int8_t(code < half ? code - half : code - half + 1);
  }
};
template <int64_t kBits>
constexpr Numbers<kBits> kNumbers;
template <ValueType V>
static inline int8_t number(const void* values, uint64_t i) {  // the integer at `i`
  constexpr uint64_t bits = row_of(V).bits, shared = row_of(V).shared();
  if constexpr (bits == 8)
    return static_cast<const int8_t*>(values)[i];
  else
    return kNumbers<bits>.of[static_cast<const uint8_t*>(values)[i / shared] >> (bits * (i % shared)) &
                             ((1 << bits) - 1)];
}
static inline float level_of(uint8_t byte) {  // of a group: 2^(byte / 16 - 15) * (1 + byte % 16 / 16)
  const uint32_t bits = (uint32_t(byte) << 19) + ((127 - 15) << 23);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// One packed weight, borrowed from tensors.
struct Packed {
  ValueType type;
  int64_t rows;
  int64_t columns;
  int64_t words;        // mask words of a strip
  const uint8_t* mask;  // [strips, words * 2 * columns of a word] bytes, little endian
  const void* values;   // [count] bf16, int8_t, or codes, the first one of a byte lowest
  int64_t count;
  const int64_t* offsets;  // [strips + 1] first value of each strip
  const float* scale;      // [rows], null where the type has none
  const uint8_t* groups;   // [strips, groups, 16] scales of groups, null where the type has none
  int64_t word_bytes() const { return 2 * row_of(type).columns; }  // of a word's mask
  int64_t padded_pairs() const { return words * row_of(type).columns / 2; }
  const uint8_t* mask_of(int64_t strip, int64_t word) const { return mask + (strip * words + word) * word_bytes(); }
  // The 16 scales of a block of kBlock words.
  const uint8_t* groups_of(int64_t strip, int64_t block) const {
    return groups + (strip * divide_up(words, kBlock) + block) * kStrip;
  }
  // Ask for the values of the next `pairs` column pairs, half of them expected to be zero.
  void prefetch(int64_t value, int64_t pairs) const {
    const int64_t bits = row_of(type).bits;
    const char* from = static_cast<const char*>(values) + value * bits / 8;
    for (int64_t b = 0; b < pairs * kStrip * bits / 8; b += 64) __builtin_prefetch(from + b, 0, 2);
  }
};

// Where a strip's reader stands: the next value. Words are numbered by the caller.
struct Cursor {
  int64_t value;
  bool ok;  // false once the masks asked for more values than there are
};

// Activations as the kernels read them. Columns past the last are zero.
struct Activations {
  int64_t tokens;
  // By words, so that one word's activations of all tokens are neighbours in memory. (Rows of a power of two bytes
  // would all fall on the same few cache sets.)
  const bf16* pairs;  // [pairs of columns, tokens, 2]
  // Values that are integers, where Kernels::digits is there: the same numbers in fixed point, as `digits` signed
  // integers of Kernels::digit_bytes, lowest first. Of one byte: x = unit * (digit_0 + 256 * (digit_1 + 256 *
  // digit_2)); of two: x = unit * (digit_0 + 32768 * digit_1).
  int64_t digits;         // for numbers of 15 and of 23 bits: 2 or 3 of one byte, 1 or 2 of two
  const int8_t* bytes;    // [blocks of 64 columns, digits, tokens, 64 of digit_bytes]
  const int32_t* starts;  // [spans, digits, tokens] -128 times the sum of a span's digits, where they are bytes
  const float* unit;      // [tokens] value of one fixed-point step
  // Or as one byte, rounded, with a scale for 64 columns: digits is 1, x = scale * byte, unit is 1.
  const float* scales;  // [blocks, tokens]
};

struct Kernels {
  const char* name;
  int64_t bf16_tokens;     // up to here, of bfloat16 values: decode and multiply in registers
  int64_t integer_tokens;  // the same of integers
  int64_t tile_tokens;     // up to here: decode a tile once, multiply every token by it; past it the library's GEMM
  bool bf16_gemm;  // the library's bfloat16 GEMM is fast on this instruction set; otherwise its float32 one is used
  int64_t digit_bytes;  // of a digit of activations in fixed point
  bool skips_zeros;     // stream does not multiply weights that are zero, so that NaN and infinity would get lost
  int64_t stream_tokens(ValueType type) const { return is_integer(type) ? integer_tokens : bf16_tokens; }
  // out [strips, tokens, 16] = x_TI W_SI^T for `n` strips from `strip` on, up to kStrips, without the rows' scales,
  // float32; there is room for kStrips. Returns false if masks and values disagree.
  bool (*stream)(const Packed&, const Activations&, int64_t strip, int64_t n, float* out);
  // Decode `pairs` column pairs from pair `first` on, as [pairs, 16 rows, 2 columns] bfloat16, without the rows'
  // scales. `first` is a multiple of kTilePairs.
  void (*decode)(const Packed&, Cursor&, int64_t strip, int64_t first, int64_t pairs, bf16* tile);
  // sum_TS [tokens, 32] (+)= x [tokens, 2 * kTilePairs] times two decoded strips. `accumulate` false overwrites.
  void (*multiply)(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, int64_t tokens,
                   bool accumulate, float* sum_TS);
  // One token as `digits` digits of `steps` * x, rounded to nearest: bytes [blocks, digits, tokens, 64] and starts
  // [spans of so many blocks, digits, tokens], zeros before, of Activations, from the token's own places on. Null:
  // stream takes bfloat16 only.
  void (*digits)(const bf16* x, int64_t columns, float steps, int64_t digits, int64_t tokens, int64_t span,
                 int8_t* bytes, int32_t* starts);
  // y of 16 rows: sum * scale + shift, rounded to nearest, ties to even.
  void (*round)(const float* sum, const float* scale, const float* shift, bf16* y);
  // What else a decoder computes, for one token: see block.h.
  void (*gate)(const bf16* gate, const bf16* up, int64_t n, bf16* out);
  void (*attend)(const bf16* q, int64_t heads, const bf16* keys, const bf16* values, int64_t n, int64_t width,
                 float scaling, float* scores, float* sums, bf16* out);
  void (*dots)(const bf16* x, const bf16* rows, int64_t n, int64_t width, float* dots, float* wide);
  // One token's activations as bytes with scales, to the places of Activations as `digits` does. Null: activations are
  // not rounded to bytes.
  void (*bytes)(const bf16* x, int64_t columns, int64_t tokens, int8_t* bytes, int32_t* starts,
                float* scales) = nullptr;
};

// Kernels::stream, by what takes one strip at a time.
using StripStream = bool (*)(const Packed&, const Activations&, int64_t strip, float* out_TS);
template <StripStream kOne>
bool each_strip(const Packed& p, const Activations& in, int64_t strip, int64_t n, float* out) {
  bool ok = true;
  for (int64_t i = 0; i < n; ++i) ok = kOne(p, in, strip + i, out + i * in.tokens * kStrip) && ok;
  return ok;
}

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
const Kernels& avx512_a8_kernels();  // these two round activations of few tokens to bytes
const Kernels& amx_a8_kernels();
bool amx_permitted();  // asks the kernel for the tile state, once per process
#endif

}  // namespace losa
