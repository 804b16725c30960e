// AVX2, for CPUs without the AVX-512 of avx512.cpp: from Haswell (2013) and Zen on. There is no expand instruction.
// Instead, one byte of the mask at a time, a table of 256 shuffles spreads the next values over eight 32-bit lanes, as
// float32.
//
// The eight lanes are the bits of the byte: 4 rows x 2 columns of bfloat16, 2 rows x 4 columns of int8. They are
// multiplied by a register that repeats the word's activations, and every byte of a word has sums of its own; the
// columns of a row are added up once a strip. A byte costs a population count, two loads, a shuffle and, for each
// token, a multiply-add: 7 cycles for a word of 32 bfloat16 weights on Zen 4. An int8 is also shifted and converted, 15
// cycles for a word of 64.
#include "block.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "target.h"
LOSA_TARGET_BEGIN("avx2,fma,bmi,bmi2,popcnt")
#include "feed.h"

namespace losa {
namespace {

constexpr int64_t kAhead = 2048;  // bytes of values prefetched ahead, as in avx512.cpp

// Shuffle controls: row m sends the next values, in order, to the lanes whose bit of m is set, and zero to the others.
// A value fills the last kValue bytes of its lane of kLane, which makes a bfloat16 a float32 and an int8 an int32 times
// 2^24.
template <int kValue, int kLane>
struct Controls {
  alignas(32) uint8_t row[256][8 * kLane];
  constexpr Controls() : row() {
    for (int m = 0; m < 256; ++m)
      for (int lane = 0, from = 0; lane < 8; ++lane) {
        const bool stored = (m >> lane) & 1;
        for (int b = 0; b < kLane; ++b) {
          const int byte = b - (kLane - kValue);
          row[m][lane * kLane + b] =
              stored && byte >= 0 ? uint8_t(from * kValue + byte) : 0x80;  // the high bit means zero
        }
        from += stored;
      }
  }
};
constexpr Controls<2, 4> kFloat16;  // 8 KiB each
constexpr Controls<1, 4> kInt8;
constexpr Controls<2, 2> kPlain16;  // bfloat16 stays bfloat16, for tiles

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
template <typename T>
inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// What differs between the kinds of values; int4 become int8 first. `expand` makes eight float32 of the up to eight
// values at v; shuffles stay within 128 bits, so both halves get all of them. `activations` is the register that
// repeats one token's for one word.
struct Bf16 {
  using Value = bf16;
  using Mask = uint32_t;
  static constexpr int kGroup = 2;
  static inline __m256 expand(const bf16* v, uint64_t byte) {
    return _mm256_castsi256_ps(
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(v)), load256(kFloat16.row[byte])));
  }
  static inline __m256 activations(const bf16* pairs, int64_t word, int64_t tokens, int64_t t) {  // x0 x1 x0 x1 ...
    const __m256i x = _mm256_set1_epi32(load<int32_t>(pairs + (word * tokens + t) * 2));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(x, _mm256_set1_epi64x(0x0302808001008080)));
  }
};
struct Int8 {
  using Value = int8_t;
  using Mask = uint64_t;
  static constexpr int kGroup = 4;
  static inline __m256 expand(const int8_t* v, uint64_t byte) {
    const __m256i upper = _mm256_shuffle_epi8(_mm256_set1_epi64x(load<int64_t>(v)), load256(kInt8.row[byte]));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(upper, 24));
  }
  static inline __m256 activations(const bf16* pairs, int64_t word, int64_t tokens, int64_t t) {  // x0 x1 x2 x3 x0 ...
    const __m256i x_01 = _mm256_set1_epi32(load<int32_t>(pairs + (2 * word * tokens + t) * 2));
    const __m256i x_23 = _mm256_set1_epi32(load<int32_t>(pairs + ((2 * word + 1) * tokens + t) * 2));
    const __m256i control = _mm256_broadcastsi128_si256(_mm_setr_epi32(0x01008080, 0x03028080, 0x05048080, 0x07068080));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_blend_epi32(x_01, x_23, 0xaa), control));
  }
};

// Takes one word of a strip after another, and says where its values are. Every mask byte loads eight from where its
// own begin, so as many as the word has bits must be there to read. `kSafe` checks the word against the end of the
// values and copies them, zeros if they are missing; otherwise the caller knows that enough follow.
template <typename Kind, bool kSafe>
struct Reader {
  using Value = typename Kind::Value;
  using Mask = typename Kind::Mask;
  const Value* v;
  const Value* end;
  bool ok = true;
  Value copy[kSafe ? 8 * sizeof(Mask) : 1] = {};
  inline const Value* next(const uint8_t* mask) {
    const int64_t n = __builtin_popcountll(load<Mask>(mask));
    const Value* word = v;
    if constexpr (kSafe) {
      word = copy;
      if (end - v < n) {
        ok = false;
        std::fill(std::begin(copy), std::end(copy), Value(0));
        return word;
      }
      std::copy_n(v, n, copy);
    }
    v += n;
    return word;
  }
  inline void ahead() const { _mm_prefetch(reinterpret_cast<const char*>(v) + kAhead, _MM_HINT_T0); }
};

// ---- one to four tokens ------------------------------------------------------------------------------------------

template <typename Kind, int T>
struct Sums {
  static constexpr int kBytes = sizeof(typename Kind::Mask);
  // Mask bytes of a word that one walk over a block takes. More tokens walk over it twice, so that their sums stay in
  // registers: one that is stored and loaded at every word takes as long as that takes.
  static constexpr int kPart = T <= 2 ? kBytes : kBytes / 2;
  alignas(32) float a[T][8 * kBytes] = {};  // in the order of a word's bits
};

// `n` words whose masks begin at `mask`; the first one's activations are those of word `first` of the strip.
template <typename Kind, int T, bool kSafe>
inline void words(Reader<Kind, kSafe>& reader, const uint8_t* mask, int64_t first, int64_t n, const Activations& in,
                  Sums<Kind, T>& sums) {
  constexpr int kBytes = Sums<Kind, T>::kBytes, kPart = Sums<Kind, T>::kPart;
  const auto start = reader.v;
  for (int part = 0; part < kBytes; part += kPart) {
    reader.v = start;
    __m256 a[T][kPart];
    for (int t = 0; t < T; ++t)
      for (int b = 0; b < kPart; ++b) a[t][b] = _mm256_load_ps(sums.a[t] + 8 * (part + b));
    for (int64_t i = 0; i < n; ++i) {
      if (part == 0) reader.ahead();
      const uint8_t* word = mask + i * kBytes;
      const auto* v = reader.next(word);
      if (part > 0) v += __builtin_popcountll(_bzhi_u64(load<typename Kind::Mask>(word), unsigned(8 * part)));
      __m256 x[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) x[t] = Kind::activations(in.pairs, first + i, T, t);
#pragma GCC unroll 8
      for (int b = 0; b < kPart; ++b) {
        const uint64_t byte = word[part + b];
        const __m256 w = Kind::expand(v, byte);
        v += __builtin_popcountll(byte);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) a[t][b] = _mm256_fmadd_ps(w, x[t], a[t][b]);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int b = 0; b < kPart; ++b) _mm256_store_ps(sums.a[t] + 8 * (part + b), a[t][b]);
  }
}

template <typename Kind, int T>
inline void add_columns(const Sums<Kind, T>& sums, float* out) {
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < kStrip; ++r) {
      float total = 0;
      for (int c = 0; c < Kind::kGroup; ++c) total += sums.a[t][r * Kind::kGroup + c];
      out[t * kStrip + r] = total;
    }
}

// The levels of `n` bytes of nibbles, in order; reads and writes up to 15 and 31 too many.
inline void unpack4(const uint8_t* nibbles, int64_t n, int8_t* out) {
  const __m128i table = load128(kLevels4), low = _mm_set1_epi8(15);
  for (int64_t i = 0; i < n; i += 16) {
    const __m128i both = load128(nibbles + i);
    const __m128i first = _mm_shuffle_epi8(table, _mm_and_si128(both, low));
    const __m128i second = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i), _mm_unpacklo_epi8(first, second));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i + 16), _mm_unpackhi_epi8(first, second));
  }
}

// int4 is int8 once it is unpacked, with a scale for every block of 64 columns.
template <int T>
bool stream4(const Packed& p, const Activations& in, int64_t strip, float* out) {
  Sums<Int8, T> total;
  Feed feed(p, p.offsets[strip]);
  for (int64_t i = 0; i < p.words; i += kBlock) {
    const int64_t n = std::min(kBlock, p.words - i);
    feed.next<ValueType::kInt4>(p.mask_of(strip, i), n, unpack4);
    _mm_prefetch(static_cast<const char*>(p.values) + feed.value / 2 + kAhead, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(p.mask_of(strip, i)) + 1024, _MM_HINT_T0);
    Sums<Int8, T> block;
    Reader<Int8, false> reader{feed.values, nullptr};
    words<Int8, T>(reader, feed.mask, i, n, in, block);
    const uint8_t* groups = p.groups_of(strip, i / kBlock);
    for (int r = 0; r < kStrip; ++r)
      for (int t = 0; t < T; ++t)
        for (int c = 0; c < 4; ++c) total.a[t][4 * r + c] += block.a[t][4 * r + c] * level_of(groups[r]);
  }
  add_columns<Int8, T>(total, out);
  return feed.ok && feed.value == p.offsets[strip + 1];
}

template <typename Kind, int T>
bool stream_as(const Packed& p, const Activations& in, int64_t strip, float* out) {
  constexpr int kBytes = Sums<Kind, T>::kBytes;
  const uint8_t* mask = p.mask + strip * p.words * kBytes;
  const auto* values = static_cast<const typename Kind::Value*>(p.values);
  Sums<Kind, T> sums;
  Reader<Kind, false> fast{values + p.offsets[strip], values + p.count};
  int64_t i = 0;
  for (; i + kBlock <= p.words && fast.end - fast.v >= kBlock * 8 * kBytes; i += kBlock) {
    for (int64_t b = 0; b < kBlock * kBytes; b += 64)
      _mm_prefetch(reinterpret_cast<const char*>(mask + i * kBytes) + 1024 + b, _MM_HINT_T0);
    words<Kind, T>(fast, mask + i * kBytes, i, kBlock, in, sums);
  }
  Reader<Kind, true> safe{fast.v, fast.end};
  words<Kind, T>(safe, mask + i * kBytes, i, p.words - i, in, sums);
  add_columns<Kind, T>(sums, out);
  return safe.ok && safe.v == values + p.offsets[strip + 1];
}

using Stream = bool (*)(const Packed&, const Activations&, int64_t, float*);
constexpr Stream kStream[kTypes][4] = {{stream_as<Bf16, 1>, stream_as<Bf16, 2>, stream_as<Bf16, 3>, stream_as<Bf16, 4>},
                                       {stream_as<Int8, 1>, stream_as<Int8, 2>, stream_as<Int8, 3>, stream_as<Int8, 4>},
                                       {stream4<1>, stream4<2>, stream4<3>, stream4<4>}};

bool stream(const Packed& p, const Activations& in, int64_t strip, float* out) {
  return kStream[int64_t(p.type)][in.tokens - 1](p, in, strip, out);
}

// ---- more tokens: decode a tile, then multiply -------------------------------------------------------------------

// One word as a tile, [16 rows, 2 columns]: a mask byte is 4 rows.
inline void put(const bf16* v, const uint8_t* word, bf16* tile) {
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const uint64_t byte = word[b];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + 8 * b),
                     _mm_shuffle_epi8(load128(v), load128(kPlain16.row[byte])));
    v += __builtin_popcountll(byte);
  }
}

// Eight int8 as 32-bit lanes of bfloat16, exact: an integer of 8 bits is its float's upper half.
inline __m256i half_floats(const int8_t* v, uint64_t byte) {
  return _mm256_srli_epi32(_mm256_castps_si256(Int8::expand(v, byte)), 16);
}

// One word as two tiles, of its first and its last two columns: two mask bytes are 4 rows.
inline void put(const int8_t* v, const uint8_t* word, bf16* tile) {
#pragma GCC unroll 4
  for (int b = 0; b < 8; b += 2) {
    const uint64_t byte_0 = word[b], byte_1 = word[b + 1];
    const __m256i rows_01 = half_floats(v, byte_0);
    v += __builtin_popcountll(byte_0);
    const __m256i rows_23 = half_floats(v, byte_1);
    v += __builtin_popcountll(byte_1);
    // Packing leaves 32-bit lanes, two columns each, of rows 0 0 2 2 1 1 3 3: even lanes first columns, odd lanes last
    // columns.
    const __m256i both =
        _mm256_permutevar8x32_epi32(_mm256_packus_epi32(rows_01, rows_23), _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + 4 * b), _mm256_castsi256_si128(both));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + kWordBits16 + 4 * b), _mm256_extracti128_si256(both, 1));
  }
}

template <typename Kind, bool kSafe>
inline void decode_words(Reader<Kind, kSafe>& reader, const uint8_t* mask, int64_t n, bf16* tile) {
  constexpr int kBytes = sizeof(typename Kind::Mask);
  for (int64_t i = 0; i < n; ++i) {
    reader.ahead();
    put(reader.next(mask + i * kBytes), mask + i * kBytes, tile + i * 8 * kBytes);
  }
}

template <typename Kind>
void decode_as(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  constexpr int64_t kBytes = sizeof(typename Kind::Mask), kPairs = Kind::kGroup / 2;
  const auto* values = static_cast<const typename Kind::Value*>(p.values);
  const uint8_t* mask = p.mask + (strip * p.words + first / kPairs) * kBytes;
  const int64_t words = pairs / kPairs;
  Reader<Kind, false> fast{values + cursor.value, values + p.count};
  int64_t i = 0;
  for (; i + kBlock <= words && fast.end - fast.v >= kBlock * 8 * kBytes; i += kBlock)
    decode_words(fast, mask + i * kBytes, kBlock, tile + i * 8 * kBytes);
  Reader<Kind, true> safe{fast.v, fast.end};
  decode_words(safe, mask + i * kBytes, words - i, tile + i * 8 * kBytes);
  cursor = {safe.v - values, cursor.ok && safe.ok};
}

void decode4(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  Feed feed(p, cursor.value);
  for (int64_t i = 0; i < pairs / 2; i += kBlock) {
    const int64_t word = first / 2 + i, n = std::min(kBlock, pairs / 2 - i);
    feed.next<ValueType::kInt4>(p.mask_of(strip, word), n, unpack4);
    Reader<Int8, false> reader{feed.values, nullptr};
    bf16* block = tile + i * kWordBits8;
    decode_words(reader, feed.mask, n, block);
    const uint8_t* groups = p.groups_of(strip, word / kBlock);
    float level[2 * kStrip];
    for (int r = 0; r < 2 * kStrip; ++r) level[r] = level_of(groups[r / 2]);
    for (int64_t j = 0; j < 2 * n; ++j)  // exact: five significant bits times three
      for (int r = 0; r < 2 * kStrip; ++r) {
        const float w = to_float(block[j * kWordBits16 + r]) * level[r];
        uint32_t bits;
        std::memcpy(&bits, &w, 4);
        block[j * kWordBits16 + r] = bf16(bits >> 16);
      }
  }
  cursor = {feed.value, cursor.ok && feed.ok};
}

constexpr decltype(Kernels::decode) kDecode[kTypes] = {decode_as<Bf16>, decode_as<Int8>, decode4};

void decode(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  kDecode[int64_t(p.type)](p, cursor, strip, first, pairs, tile);
}

// N tokens by the 16 rows of one strip: 2 N sums in registers, every weight register used N times, every broadcast
// twice. The first columns of all rows go before the second ones, which leaves registers for five tokens; with six gcc
// 12 spills.
constexpr int64_t kTokens = 5;

template <int N>
void multiply_strip(const bf16* tile, int64_t pairs, const float* x, bool accumulate, float* sum) {
  const __m256i second = _mm256_set1_epi32(int(0xffff0000));
  __m256 a[N][2];
#pragma GCC unroll 5
  for (int t = 0; t < N; ++t)
    for (int h = 0; h < 2; ++h) a[t][h] = accumulate ? _mm256_loadu_ps(sum + t * 32 + 8 * h) : _mm256_setzero_ps();
  for (int64_t i = 0; i < pairs; ++i)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {  // a column's bfloat16, moved or masked to the upper half, are float32
      __m256 w[2];
      for (int h = 0; h < 2; ++h) {
        const __m256i both = load256(tile + i * kWordBits16 + 16 * h);
        w[h] = _mm256_castsi256_ps(c == 0 ? _mm256_slli_epi32(both, 16) : _mm256_and_si256(both, second));
      }
#pragma GCC unroll 5
      for (int t = 0; t < N; ++t) {
        const __m256 x_t = _mm256_set1_ps(x[t * 2 * kTilePairs + 2 * i + c]);
        for (int h = 0; h < 2; ++h) a[t][h] = _mm256_fmadd_ps(w[h], x_t, a[t][h]);
      }
    }
#pragma GCC unroll 5
  for (int t = 0; t < N; ++t)
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(sum + t * 32 + 8 * h, a[t][h]);
}

using Multiply = void (*)(const bf16*, int64_t, const float*, bool, float*);
constexpr Multiply kMultiply[kTokens] = {multiply_strip<1>, multiply_strip<2>, multiply_strip<3>, multiply_strip<4>,
                                         multiply_strip<5>};

void multiply(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, int64_t tokens, bool accumulate,
              float* sum) {
  constexpr int64_t kRow = 2 * kTilePairs;
  alignas(32) float floats[kTokens * kRow];  // x of a block of tokens
  const int64_t blocks = (tokens + kTokens - 1) / kTokens;
  for (int64_t b = 0; b < blocks; ++b) {  // even blocks: 8 tokens are 4 + 4
    const int64_t from = tokens * b / blocks, n = tokens * (b + 1) / blocks - from;
    for (int64_t i = 0; i < n * kRow; i += 8)
      _mm256_store_si256(reinterpret_cast<__m256i*>(floats + i),
                         _mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(x + from * kRow + i)), 16));
    kMultiply[n - 1](tile_0, pairs, floats, accumulate, sum + from * 32);
    kMultiply[n - 1](tile_1, pairs, floats, accumulate, sum + from * 32 + kStrip);
  }
}

void round(const float* sum, const float* scale, const float* shift, bf16* y) {
  for (int r = 0; r < kStrip; ++r) y[r] = to_bf16(sum[r] * scale[r] + shift[r]);
}

void gate(const bf16* gate, const bf16* up, int64_t n, bf16* out) { gate_block(gate, up, n, out); }

void attend(const bf16* q, const bf16* keys, const bf16* values, int64_t n, int64_t width, float scaling, float* scores,
            float* sums, bf16* out) {
  attend_block(q, keys, values, n, width, scaling, scores, sums, out);
}

}  // namespace

// Tiles for any number of tokens: the library's float32 GEMM multiplies no faster, and wants decoded and converted
// weights besides.
const Kernels& avx2_kernels() {
  static constexpr Kernels kernels{"avx2", {4, 4, 4}, 1 << 30, false, false, stream,
                                   decode, multiply,  nullptr, round, gate,  attend};
  return kernels;
}

}  // namespace losa
LOSA_TARGET_END
#endif
