// The packed weight and the table of kernels that every instruction set fills in.
//
// Layout (docs/packed-format.md). A weight [rows, columns] is cut into strips of 16 rows. Within a strip, a *word* covers
// 16 rows x `group` columns: group 2 for bfloat16 values (32 mask bits), group 4 for int8 values (64 mask bits). Bit
// row * group + column of a word says whether that weight is stored; the stored values follow one another in the order of
// the words and of their bits. So one expanded word is exactly one 64-byte register, in the order that the bf16 and int8 dot
// product instructions want, and a strip is read front to back, once.
//
// Every kernel stays inside `values` whatever the masks say: a corrupt file costs wrong numbers or an error, never a read
// out of bounds.
#pragma once

#include <cstdint>
#include <cstring>

namespace losa {

constexpr int64_t kStrip = 16;        // rows of a strip
constexpr int64_t kBlock = 16;        // words decoded between two bounds checks
constexpr int64_t kTilePairs = 128;   // column pairs of a decoded tile: 8 KiB per strip, so that two fit in the L1 cache
constexpr int64_t kTileTokens = 256;  // tokens that share a decoded tile; the next ones decode it again
constexpr int64_t kWordBits16 = 32;   // weights of a word of bfloat16 values: 16 rows x 2 columns
constexpr int64_t kWordBits8 = 64;    // weights of a word of int8 values: 16 rows x 4 columns

using bf16 = uint16_t;  // bfloat16 by its bits

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

// One packed weight, borrowed from tensors.
struct Packed {
  int64_t rows;
  int64_t columns;
  int64_t words;           // mask words of a strip
  const uint8_t* mask;     // [strips, words * 4] (bfloat16) or [strips, words * 8] (int8) bytes, little endian
  const void* values;      // [count] bf16 or int8_t
  int64_t count;
  const int64_t* offsets;  // [strips + 1] first value of each strip
  const float* scale;      // [rows] for int8 values, null for bfloat16
  bool is_int8() const { return scale != nullptr; }
  // Ask for the values of the next `pairs` column pairs, half of them expected to be zero.
  void prefetch(int64_t value, int64_t pairs) const {
    const int64_t size = is_int8() ? 1 : 2;
    const char* from = static_cast<const char*>(values) + value * size;
    for (int64_t b = 0; b < pairs * kStrip * size; b += 64) __builtin_prefetch(from + b, 0, 2);
  }
};

// Where a strip's reader stands: the next value. Words are numbered by the caller.
struct Cursor {
  int64_t value;
  bool ok;  // false once the masks asked for more values than there are
};

// Activations as the kernels read them: by words, so that one word's activations of all tokens are neighbours in memory. (Rows
// of a power of two bytes would all fall on the same few cache sets.) Columns past the last are zero.
struct Activations {
  int64_t tokens;
  const bf16* pairs;       // [pairs of columns, tokens, 2]
  // int8 where Kernels::fixed_point: the same numbers as integers of three signed digits, x = unit * (256 * (256 * high + middle) + low).
  const int8_t* digits;       // [words, tokens, 3 (low first), 4 columns]
  const int32_t* digit_sums;  // [tokens, 3]
  const float* unit;       // [tokens] value of one fixed-point step
};

struct Kernels {
  const char* name;
  int64_t stream_tokens;       // up to here: decode and multiply in registers
  int64_t stream_tokens_int8;  // the same for int8 values
  int64_t tile_tokens;    // up to here: decode a tile once, multiply every token by it; past it the library's GEMM
  bool bf16_gemm;         // the library's bfloat16 GEMM is fast on this instruction set; otherwise its float32 one is used
  bool fixed_point;       // stream wants int8's activations in fixed point
  // out_TS [tokens, 16] = x_TI W_SI^T for one strip, unscaled, float32. Returns false if masks and values disagree.
  bool (*stream)(const Packed&, const Activations&, int64_t strip, float* out_TS);
  // Decode `pairs` column pairs from pair `first` on, as [pairs, 16 rows, 2 columns] bfloat16; int8 values unscaled.
  void (*decode)(const Packed&, Cursor&, int64_t strip, int64_t first, int64_t pairs, bf16* tile);
  // sum_TS [tokens, 32] (+)= x [tokens, 2 * kTilePairs] times two decoded strips. `accumulate` false overwrites.
  void (*multiply)(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, int64_t tokens, bool accumulate, float* sum_TS);
  // y of 16 rows: sum * scale + shift, rounded to nearest, ties to even.
  void (*round)(const float* sum, const float* scale, const float* shift, bf16* y);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
bool amx_permitted();  // asks the kernel for the tile state, once per process
#endif

}  // namespace losa
