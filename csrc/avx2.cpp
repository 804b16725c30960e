// AVX2, for CPUs from Haswell (2013) and Zen on that lack the AVX-512 of avx512.cpp. There is no expand instruction: one byte of
// the mask at a time, a table of 256 shuffles spreads the next values over eight 32-bit lanes, where they become float32.
//
// The eight lanes of byte b are bits 8b to 8b + 7 of the word: 4 rows x 2 columns of bfloat16, 2 rows x 4 columns of int8. They are
// multiplied by a register that repeats the word's activations, and every byte has its own sum; a row's columns are added up
// only once a strip. A word of 32 bfloat16 weights and one token: 4 population counts, 4 loads, 4 shuffles, 4 multiply-adds.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "target.h"
LOSA_TARGET_BEGIN("avx2,fma,bmi,bmi2,popcnt")

namespace losa {
namespace {

constexpr int64_t kAhead = 2048;  // bytes of values prefetched ahead, as in avx512.cpp

// Shuffle controls: row m sends the next values, in order, to the lanes whose bit of m is set, and zero to the others. A value
// fills the last kValue bytes of its kLane bytes, which makes a bfloat16 a float32 and an int8 a multiple of 2^24.
template <int kValue, int kLane>
struct Controls {
  alignas(32) uint8_t row[256][8 * kLane];
  constexpr Controls() : row() {
    for (int m = 0; m < 256; ++m)
      for (int lane = 0, from = 0; lane < 8; ++lane) {
        const bool stored = (m >> lane) & 1;
        for (int b = 0; b < kLane; ++b) {
          const int byte = b - (kLane - kValue);
          row[m][lane * kLane + b] = stored && byte >= 0 ? uint8_t(from * kValue + byte) : 0x80;  // the high bit means zero
        }
        from += stored;
      }
  }
};
constexpr Controls<2, 4> kFloats16;  // bfloat16 to float32
constexpr Controls<2, 2> kPlain16;   // bfloat16 as it is, for tiles
constexpr Controls<1, 4> kInts8;     // int8 to int32, times 2^24

template <typename T>
inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// What differs between the two kinds of values.
struct Bf16 {
  using Value = bf16;
  using Mask = uint32_t;
  static constexpr int kGroup = 2;
  // Eight float32 from the at most eight values at v. The shuffle works within 128 bits, so both halves get all eight values.
  static inline __m256 expand(const bf16* v, uint32_t byte) {
    const __m256i eight = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(eight, load<__m256i>(kFloats16.row[byte])));
  }
  // The word's activations of one token as float32, over and over: x0 x1 x0 x1 ...
  static inline __m256 activations(const bf16* pairs, int64_t word, int64_t tokens, int64_t t) {
    const __m256i x = _mm256_set1_epi32(load<int32_t>(pairs + (word * tokens + t) * 2));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(x, _mm256_set1_epi64x(int64_t(0x0302808001008080))));
  }
};
struct Int8 {
  using Value = int8_t;
  using Mask = uint64_t;
  static constexpr int kGroup = 4;
  static inline __m256 expand(const int8_t* v, uint32_t byte) {
    const __m256i eight = _mm256_set1_epi64x(load<int64_t>(v));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_shuffle_epi8(eight, load<__m256i>(kInts8.row[byte])), 24));
  }
  static inline __m256 activations(const bf16* pairs, int64_t word, int64_t tokens, int64_t t) {  // x0 x1 x2 x3 x0 ...
    const __m256i x_01 = _mm256_set1_epi32(load<int32_t>(pairs + (2 * word * tokens + t) * 2));
    const __m256i x_23 = _mm256_set1_epi32(load<int32_t>(pairs + ((2 * word + 1) * tokens + t) * 2));
    const __m256i control = _mm256_broadcastsi128_si256(_mm_setr_epi32(0x01008080, 0x03028080, 0x05048080, 0x07068080));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_blend_epi32(x_01, x_23, 0xaa), control));
  }
};

// The next word of a strip: its mask, and a pointer from which each of its bytes may load eight values. `kSafe` checks the word
// against the end of the values and copies its own to a buffer; otherwise the caller knows that a full word of values follows.
template <typename Kind, bool kSafe>
struct Reader {
  using Value = typename Kind::Value;
  using Mask = typename Kind::Mask;
  const Value* v;
  const Value* end;
  bool ok = true;
  Value buffer[kSafe ? 8 * sizeof(Mask) + 8 : 1];
  inline Mask next(const uint8_t* mask, const Value*& from) {
    Mask m = load<Mask>(mask);
    int64_t n = __builtin_popcountll(m);
    from = v;
    if constexpr (kSafe) {
      if (end - v < n) {
        ok = false;
        m = 0;
        n = 0;
      }
      std::memcpy(buffer, v, size_t(n) * sizeof(Value));
      from = buffer;
    }
    v += n;
    return m;
  }
};
