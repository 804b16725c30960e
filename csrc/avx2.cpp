// AVX2, for CPUs without the AVX-512 of avx512.cpp: from Haswell (2013) and Zen on. There is no expand instruction.
// Instead, one byte of the mask at a time, a table of 256 shuffles spreads the next values over eight 32-bit lanes, as
// float32.
//
// The eight lanes are the bits of the byte: 4 rows x 2 columns. They are multiplied by a register that repeats the
// word's activations, and every byte of a word has sums of its own; the columns of a row are added up once a strip. A
// byte costs a population count, two loads, a shuffle and, for each token, a multiply-add: 7 cycles for a word of 32
// weights on Zen 4. Integers: avx2_integer.cpp.
#include "kernels.h"

#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <iterator>

#include "avx2.h"
LOSA_TARGET_BEGIN(LOSA_AVX2)
#include "block.h"

namespace losa {
namespace {

// Shuffle controls: row m sends the next values, in order, to the lanes whose bit of m is set, and zero to the others.
// A value fills the last two bytes of its lane of kLane, which makes a bfloat16 a float32.
template <int kLane>
struct Controls {
  alignas(32) uint8_t row[256][8 * kLane];
  constexpr Controls() : row() {
    for (int m = 0; m < 256; ++m)
      for (int lane = 0, from = 0; lane < 8; ++lane) {
        const bool stored = (m >> lane) & 1;
        for (int b = 0; b < kLane; ++b) {
          const int byte = b - (kLane - 2);
          row[m][lane * kLane + b] = stored && byte >= 0 ? uint8_t(from * 2 + byte) : 0x80;  // the high bit means zero
        }
        from += stored;
      }
  }
};
constexpr Controls<4> kWide;   // 8 KiB
constexpr Controls<2> kPlain;  // 4 KiB; bfloat16 stays bfloat16, for tiles

constexpr int kBytes = 4;  // of a word's mask

// Eight float32 of the up to eight values at v; shuffles stay within 128 bits, so both halves get all of them.
inline __m256 expand(const bf16* v, uint64_t byte) {
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(v)), load256(kWide.row[byte])));
}
// x0 x1 x0 x1 ... of one token's activations for one word.
inline __m256 repeated(const bf16* pairs, int64_t word, int64_t tokens, int64_t t) {
  const __m256i x = _mm256_set1_epi32(load<int32_t>(pairs + (word * tokens + t) * 2));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(x, _mm256_set1_epi64x(0x0302808001008080)));
}

// Takes one word of a strip after another, and says where its values are. Every mask byte loads eight from where its
// own begin, so as many as the word has bits must be there to read. `kSafe` checks the word against the end of the
// values and copies them, zeros if they are missing; otherwise the caller knows that enough follow.
template <bool kSafe>
struct Reader {
  const bf16* v;
  const bf16* end;
  bool ok = true;
  bf16 copy[kSafe ? kWordBits16 : 1] = {};
  inline const bf16* next(const uint8_t* mask) {
    const int64_t n = __builtin_popcount(load<uint32_t>(mask));
    const bf16* word = v;
    if constexpr (kSafe) {
      word = copy;
      if (end - v < n) {
        ok = false;
        std::fill(std::begin(copy), std::end(copy), bf16(0));
        return word;
      }
      std::copy_n(v, n, copy);
    }
    v += n;
    return word;
  }
  inline void ahead() const { ask_for(reinterpret_cast<const char*>(v) + kAhead); }
};

// ---- one to four tokens ------------------------------------------------------------------------------------------

template <int T>
struct Sums {
  // Mask bytes of a word that one walk over a block takes. More tokens walk over it twice, so that their sums stay in
  // registers: one that is stored and loaded at every word takes as long as that takes.
  static constexpr int kPart = T <= 2 ? kBytes : kBytes / 2;
  alignas(32) float a[T][8 * kBytes] = {};  // in the order of a word's bits
};

// `n` words whose masks begin at `mask`; the first one's activations are those of word `first` of the strip.
template <int T, bool kSafe>
inline void words(Reader<kSafe>& reader, const uint8_t* mask, int64_t first, int64_t n, const Activations& in,
                  Sums<T>& sums) {
  constexpr int kPart = Sums<T>::kPart;
  const auto start = reader.v;
  for (int part = 0; part < kBytes; part += kPart) {
    reader.v = start;
    __m256 a[T][kPart];
    for (int t = 0; t < T; ++t)
      for (int b = 0; b < kPart; ++b) a[t][b] = _mm256_load_ps(sums.a[t] + 8 * (part + b));
    for (int64_t i = 0; i < n; ++i) {
      if (part == 0) reader.ahead();
      const uint8_t* word = mask + i * kBytes;
      const bf16* v = reader.next(word);
      if (part > 0) v += __builtin_popcount(_bzhi_u32(load<uint32_t>(word), unsigned(8 * part)));
      __m256 x[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) x[t] = repeated(in.pairs, first + i, T, t);
#pragma GCC unroll 4
      for (int b = 0; b < kPart; ++b) {
        const uint64_t byte = word[part + b];
        const __m256 w = expand(v, byte);
        v += __builtin_popcountll(byte);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) a[t][b] = _mm256_fmadd_ps(w, x[t], a[t][b]);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int b = 0; b < kPart; ++b) _mm256_store_ps(sums.a[t] + 8 * (part + b), a[t][b]);
  }
}

template <int T>
inline void add_columns(const Sums<T>& sums, float* out) {
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < kStrip; ++r) out[t * kStrip + r] = sums.a[t][2 * r] + sums.a[t][2 * r + 1];
}

template <int T>
bool stream_as(const Packed& p, const Activations& in, int64_t strip, float* out) {
  Sums<T> sums;
  const Cursor end = by_blocks<Reader>(p, {p.offsets[strip], true}, p.words, [&](auto& reader, int64_t i, int64_t n) {
    const uint8_t* mask = p.mask_of(strip, i);
    ask_for(mask + 1024);
    words<T>(reader, mask, i, n, in, sums);
  });
  add_columns<T>(sums, out);
  return end.ok && end.value == p.offsets[strip + 1];
}

constexpr StripStream kStream[4] = {stream_as<1>, stream_as<2>, stream_as<3>, stream_as<4>};

bool stream(const Packed& p, const Activations& in, int64_t strip, float* out) {
  if (is_integer(p.type)) return avx2_stream_integers(p, in, strip, out);
  return kStream[in.tokens - 1](p, in, strip, out);
}

// ---- more tokens: decode a tile, then multiply -------------------------------------------------------------------

// One word as a tile, [16 rows, 2 columns]: a mask byte is 4 rows.
inline void put(const bf16* v, const uint8_t* word, bf16* tile) {
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const uint64_t byte = word[b];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + 8 * b), _mm_shuffle_epi8(load128(v), load128(kPlain.row[byte])));
    v += __builtin_popcountll(byte);
  }
}

template <bool kSafe>
inline void decode_words(Reader<kSafe>& reader, const uint8_t* mask, int64_t n, bf16* tile) {
  for (int64_t i = 0; i < n; ++i) {
    reader.ahead();
    put(reader.next(mask + i * kBytes), mask + i * kBytes, tile + i * kWordBits16);
  }
}

void decode(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  if (is_integer(p.type)) return avx2_decode_integers(p, cursor, strip, first, pairs, tile);
  cursor = by_blocks<Reader>(p, cursor, pairs, [&](auto& reader, int64_t i, int64_t n) {
    decode_words(reader, p.mask_of(strip, first + i), n, tile + i * kWordBits16);
  });
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
  alignas(32) float wide[kTokens * kRow];  // x of a block of tokens
  const int64_t blocks = divide_up(tokens, kTokens);
  for (int64_t b = 0; b < blocks; ++b) {  // even blocks: 8 tokens are 4 + 4
    const int64_t from = tokens * b / blocks, n = tokens * (b + 1) / blocks - from;
    for (int64_t i = 0; i < n * kRow; i += 8) _mm256_store_ps(wide + i, floats(x + from * kRow + i));
    kMultiply[n - 1](tile_0, pairs, wide, accumulate, sum + from * 32);
    kMultiply[n - 1](tile_1, pairs, wide, accumulate, sum + from * 32 + kStrip);
  }
}

void round(const float* sum, const float* scale, const float* shift, bf16* y) {
  for (int r = 0; r < kStrip; ++r) y[r] = to_bf16(sum[r] * scale[r] + shift[r]);
}

// Scores of four tokens: q [width] float32 times their keys.
inline __m128 scores_of(const float* q, const bf16* const keys[4], int64_t width) {
  __m256 a[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t i = 0; i < width; i += 8)
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) a[t] = _mm256_fmadd_ps(_mm256_loadu_ps(q + i), floats(keys[t] + i), a[t]);
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

// out = sum of the tokens' weights times 8 N columns of their values, over `total`.
template <int N>
inline void mean_of(const float* weights, const bf16* values, int64_t n, int64_t width, float total, bf16* out) {
  __m256 a[N];
  for (__m256& sum : a) sum = _mm256_setzero_ps();
  for (int64_t t = 0; t < n; ++t) {
    const __m256 weight = _mm256_set1_ps(weights[t]);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) a[i] = _mm256_fmadd_ps(weight, floats(values + t * width + 8 * i), a[i]);
  }
  alignas(32) float sums[8 * N];
  for (int i = 0; i < N; ++i) _mm256_store_ps(sums + 8 * i, a[i]);
  for (int i = 0; i < 8 * N; ++i) out[i] = to_bf16(sums[i] / total);
}

// As attend_block, whose sums of one token after the other go through memory; more than twice as fast.
void attend(const bf16* q, const bf16* keys, const bf16* values, int64_t n, int64_t width, float scaling, float* scores,
            float* sums, bf16* out) {
  if (width % 8 != 0) return attend_block(q, keys, values, n, width, scaling, scores, sums, out);
  for (int64_t i = 0; i < width; i += 8) _mm256_storeu_ps(sums + i, floats(q + i));
  float largest = -INFINITY;
  for (int64_t t = 0; t < n; t += 4) {
    const bf16* four[4];
    for (int64_t j = 0; j < 4; ++j) four[j] = keys + std::min(t + j, n - 1) * width;
    float found[4];
    _mm_storeu_ps(found, _mm_mul_ps(scores_of(sums, four, width), _mm_set1_ps(scaling)));
    for (int64_t j = 0; j < std::min<int64_t>(4, n - t); ++j) {
      scores[t + j] = found[j];
      largest = found[j] > largest ? found[j] : largest;
    }
  }
  for (int64_t t = 0; t < n; ++t) scores[t] = exponential(scores[t] - largest);
  float total = 0;
  for (int64_t t = 0; t < n; ++t) total += scores[t];
  for (int64_t t = 0; t < n; ++t) scores[t] = to_float(to_bf16(scores[t]));  // as torch rounds them
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) mean_of<8>(scores, values + i, n, width, total, out + i);
  for (; i < width; i += 8) mean_of<1>(scores, values + i, n, width, total, out + i);
}

// As dots_block, of rows that are read front to back.
void dots(const bf16* x, const bf16* rows, int64_t n, int64_t width, float* found, float* wide) {
  if (width % 8 != 0) return dots_block(x, rows, n, width, found, wide);
  for (int64_t i = 0; i < width; i += 8) _mm256_storeu_ps(wide + i, floats(x + i));
  for (int64_t t = 0; t < n; ++t) {
    const bf16* row = rows + t * width;
    __m256 a[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) {
      ask_for(reinterpret_cast<const char*>(row + i) + kAhead);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        a[j] = _mm256_fmadd_ps(_mm256_loadu_ps(wide + i + 8 * j), floats(row + i + 8 * j), a[j]);
    }
    for (; i < width; i += 8) a[0] = _mm256_fmadd_ps(_mm256_loadu_ps(wide + i), floats(row + i), a[0]);
    const __m256 lanes = _mm256_add_ps(_mm256_add_ps(a[0], a[1]), _mm256_add_ps(a[2], a[3]));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    found[t] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
}

}  // namespace

// Tiles for any number of tokens: the library's float32 GEMM multiplies no faster, and wants decoded and converted
// weights besides.
const Kernels& avx2_kernels() {
  static constexpr Kernels kernels{
      "avx2",      4,     kAvx2IntegerTokens, 1 << 30,           false, 2, false, each_strip<stream>, decode, multiply,
      avx2_digits, round, gate_block,         each_head<attend>, dots};
  return kernels;
}

}  // namespace losa
LOSA_TARGET_END
#endif
