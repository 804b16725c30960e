// int8 and int4 values on AVX-512. The 64 weights of a word are multiplied by the two or three bytes of fixed-point
// activations: integer sums are exact, and no weight is ever converted to float. int4 values become int8 by a look-up
// of 16 levels, 64 *stored* values at a time, which at 70 % zeros is a third of the words; their sums are scaled once
// for each 64 columns.
//
// Cost of a word and one token on Zen 4, in cycles by instruction: moving its mask 1.0, expanding 1.3, two dot products
// 2.0, which compete for the same ports: 4.4, or 1.2 ns. Unpacking int4 adds 1. From the L2 cache int8 takes 1.3 ns and
// int4 1.55 (70 %), from memory 1.43 and 1.64; memory delivers 27 or 18 bytes to one thread in 1.0 or 0.7. Where the
// user allows it, activations of few tokens are one byte with a scale for 64 columns: one dot product less.
#include "kernels.h"

#if defined(__x86_64__)
#include <algorithm>

#include "avx512.h"
LOSA_TARGET_BEGIN(LOSA_AVX512)

namespace losa {
namespace {

// Reads codes for Feed, in order; numbers come xor `flip`.
struct Unpack {
  __m512i flip;
  inline void operator()(Bits<4>, const uint8_t* codes, int64_t n, int8_t* out) const {
    const __m512i table = _mm512_xor_si512(
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNumbers<4>.of))), flip);
    for (int64_t i = 0; i < n; i += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(codes) + i + kAhead, _MM_HINT_T0);
      const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
      const __m512i apart = _mm512_and_si512(_mm512_or_si512(both, _mm512_slli_epi16(both, 4)), _mm512_set1_epi8(15));
      _mm512_storeu_si512(out + 2 * i, _mm512_shuffle_epi8(table, apart));
    }
  }
};

// The next word, expanded, every weight xor `flip`; and asks for values that come later. What shares bytes was flipped
// when it was unpacked, and its codes were asked for then.
template <ValueType V>
inline __m512i expanded(const uint8_t* mask, const int8_t*& v, __m512i flip) {
  const uint64_t m = load64(mask);
  __m512i packed = _mm512_loadu_si512(v);
  if constexpr (row_of(V).bits == 8) {
    _mm_prefetch(reinterpret_cast<const char*>(v) + kAhead, _MM_HINT_T0);
    packed = _mm512_xor_si512(opaque(packed), flip);
  }
  v += __builtin_popcountll(m);
  return _mm512_mask_expand_epi8(opaque(flip), m, opaque(packed));
}

// Asks for masks that come after those of a block, further on than Feed counts next.
inline void masks_ahead(const uint8_t* mask) {
  _mm_prefetch(reinterpret_cast<const char*>(mask) + 2304, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(mask) + 2304 + 64, _MM_HINT_T0);
}

// Sums of the digits as one float, times the group's scales.
template <ValueType V, int D>
inline __m512 drained(const __m512i* a, __m512 level, __m512 total) {
  __m512 sum = _mm512_cvtepi32_ps(a[D - 1]);
  for (int d = D - 2; d >= 0; --d) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(a[d]));
  if constexpr (row_of(V).grouped) return _mm512_fmadd_ps(sum, level, total);
  return _mm512_add_ps(sum, total);
}

template <ValueType V>
inline __m512 levels_of(const Packed& p, int64_t strip, int64_t word) {  // level_of of 16 rows
  if constexpr (!row_of(V).grouped) return _mm512_setzero_ps();
  const __m512i bytes =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p.groups_of(strip, word / kBlock))));
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(bytes, 19), _mm512_set1_epi32((127 - 15) << 23)));
}

// The instruction multiplies unsigned by signed bytes: the weights become w + 128, which is w xor -128, the activations
// stay signed, and what 128 added, 128 times the sum of the activations' digits, is known before the weight is read:
// sums begin at its negative, Activations::starts.
inline __m512i unsigned_flip() { return _mm512_set1_epi8(-128); }

// ---- one to four tokens: sums in registers -----------------------------------------------------------------------

// Adds a block of up to 16 words, whose digits are `x`, to the tokens' totals.
template <ValueType V, int T, int D>
inline void add_block(const uint8_t* mask, const int8_t*& v, int64_t n, const int8_t* x, const int32_t* starts,
                      const float* scales, __m512 level, __m512 (&total)[T]) {
  constexpr int kChains = T == 1 ? 2 : 1;  // enough independent sums to hide the dot product's latency
  const __m512i flip = unsigned_flip();
  __m512i a[kChains][T][D];
  for (int t = 0; t < T; ++t)
    for (int d = 0; d < D; ++d) {
      a[0][t][d] = _mm512_set1_epi32(starts[d * T + t]);
      if constexpr (kChains == 2) a[1][t][d] = _mm512_setzero_si512();
    }
  const auto add = [&](int64_t word, int chain) __attribute__((always_inline)) {
    const __m512i weights = expanded<V>(mask + 8 * word, v, flip);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 3
      for (int d = 0; d < D; ++d) {
        const int32_t digits = int32_t(load32(x + (d * T + t) * kGroup + 4 * word));
        a[chain][t][d] = _mm512_dpbusd_epi32(a[chain][t][d], weights, _mm512_set1_epi32(digits));
      }
  };
  if (n == kBlock) {
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) add(i, i % kChains);
  } else {
    for (int64_t i = 0; i < n; ++i) add(i, 0);
  }
  for (int t = 0; t < T; ++t) {
    if constexpr (kChains == 2)
      for (int d = 0; d < D; ++d) a[0][t][d] = _mm512_add_epi32(a[0][t][d], a[1][t][d]);
    if constexpr (D == 1) {
      const __m512 scale = _mm512_set1_ps(scales[t]);
      total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[0][t][0]),
                                 row_of(V).grouped ? _mm512_mul_ps(level, scale) : scale, total[t]);
    } else {
      total[t] = drained<V, D>(a[0][t], level, total[t]);
    }
  }
}

template <ValueType V, int T, int D>
bool stream_few(const Packed& p, const Activations& in, int64_t strip, float* out) {
  Feed feed(p, p.offsets[strip]);
  __m512 total[T];
  for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
  for (int64_t first = 0; first < p.words; first += kFedMost) {
    const int64_t end = std::min(p.words, first + kFedMost);
    feed.next<V>(p.mask_of(strip, first), end - first, Unpack{unsigned_flip()});
    const int8_t* v = feed.values;
    for (int64_t w = first; w < end; w += kBlock) {
      const uint8_t* mask = feed.mask + 8 * (w - first);
      const int64_t block = w / kBlock * D * T;
      masks_ahead(mask);
      add_block<V, T, D>(mask, v, std::min(kBlock, end - w), in.bytes + block * kGroup, in.starts + block,
                         D == 1 ? in.scales + block : nullptr, levels_of<V>(p, strip, w), total);
    }
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + t * kStrip, _mm512_mul_ps(total[t], _mm512_set1_ps(in.unit[t])));
  return feed.ok && feed.value == p.offsets[strip + 1];
}

// ---- up to sixteen: words expanded once, into the L1 cache -------------------------------------------------------

template <ValueType V>
inline void expand(Feed& feed, const uint8_t* from, int64_t words, int8_t* bytes, __m512i flip) {
  feed.next<V>(from, words, Unpack{flip});
  const int8_t* v = feed.values;
  for (int64_t i = 0; i < words; ++i) {
    if (i % kBlock == 0) masks_ahead(from + 8 * i);
    _mm512_store_si512(bytes + i * kWordBits8, expanded<V>(feed.mask + 8 * i, v, flip));
  }
}

// Words between two conversions of so many tokens' integer sums to floats: a group of int4 values, all that was fed of
// int8.
template <ValueType V>
constexpr int64_t kDrain = row_of(V).grouped ? kBlock : kFeed;

// N tokens from token t on, by the words [w, end) of which `bytes` are the first.
template <ValueType V, int N, int D>
void add_words(const int8_t* bytes, int64_t w, int64_t end, const Activations& in, int64_t t_0, __m512 level,
               float* out) {
  __m512i a[N][D];
  for (int t = 0; t < N; ++t)
    for (int d = 0; d < D; ++d) {
      int32_t start = 0;
      for (int64_t block = w / kBlock; block * kBlock < end; ++block)
        start += in.starts[(block * D + d) * in.tokens + t_0 + t];
      a[t][d] = _mm512_set1_epi32(start);
    }
  const int64_t digit = in.tokens * kGroup;
  for (; w < end; w += kBlock) {
    const int8_t* x = in.bytes + (w / kBlock * D * in.tokens + t_0) * kGroup;
    for (const int8_t* last = bytes + std::min(kBlock, end - w) * kWordBits8; bytes < last;
         bytes += kWordBits8, x += 4) {
      const __m512i weights = _mm512_load_si512(bytes);
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t)
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d)
          a[t][d] =
              opaque(_mm512_dpbusd_epi32(a[t][d], weights, _mm512_set1_epi32(int(load32(x + d * digit + t * kGroup)))));
    }
  }
  for (int t = 0; t < N; ++t)
    _mm512_storeu_ps(out + (t_0 + t) * kStrip, drained<V, D>(a[t], level, _mm512_loadu_ps(out + (t_0 + t) * kStrip)));
}

template <ValueType V, int D>
bool stream_many(const Packed& p, const Activations& in, int64_t strip, float* out) {
  constexpr int kTokens = 8;
  using Add = void (*)(const int8_t*, int64_t, int64_t, const Activations&, int64_t, __m512, float*);
  static constexpr Add kAdd[kTokens] = {add_words<V, 1, D>, add_words<V, 2, D>, add_words<V, 3, D>, add_words<V, 4, D>,
                                        add_words<V, 5, D>, add_words<V, 6, D>, add_words<V, 7, D>, add_words<V, 8, D>};
  alignas(64) int8_t bytes[kFeed * kWordBits8];
  Feed feed(p, p.offsets[strip]);
  std::fill(out, out + in.tokens * kStrip, 0.0f);
  const int64_t parts = (in.tokens + kTokens - 1) / kTokens;
  for (int64_t first = 0; first < p.words; first += kFeed) {
    const int64_t fed = std::min(kFeed, p.words - first);
    expand<V>(feed, p.mask_of(strip, first), fed, bytes, unsigned_flip());
    for (int64_t w = first; w < first + fed; w += kDrain<V>) {
      const __m512 level = levels_of<V>(p, strip, w);
      for (int64_t part = 0; part < parts; ++part) {  // even parts: 10 tokens are 5 + 5
        const int64_t from = in.tokens * part / parts, n = in.tokens * (part + 1) / parts - from;
        kAdd[n - 1](bytes + (w - first) * kWordBits8, w, std::min(first + fed, w + kDrain<V>), in, from, level, out);
      }
    }
  }
  times_units(in, out);
  return feed.ok && feed.value == p.offsets[strip + 1];
}

template <ValueType V, int D>
void add_sums_as(const Packed& p, const Activations& in, int64_t strip, int64_t word, const int32_t* sums, float* out) {
  const __m512 level = levels_of<V>(p, strip, word);
  for (int64_t t = 0; t < in.tokens; ++t) {
    __m512i a[D];
    for (int d = 0; d < D; ++d) a[d] = _mm512_load_si512(sums + (d * kIntegerTokens + t) * kStrip);
    _mm512_storeu_ps(out + t * kStrip, drained<V, D>(a, level, _mm512_loadu_ps(out + t * kStrip)));
  }
}

using Stream = bool (*)(const Packed&, const Activations&, int64_t, float*);

template <ValueType V>
bool stream_bytes(const Packed& p, const Activations& in, int64_t strip, float* out) {
  static constexpr Stream kFew[kByteTokens] = {stream_few<V, 1, 1>, stream_few<V, 2, 1>, stream_few<V, 3, 1>};
  return kFew[in.tokens - 1](p, in, strip, out);
}

template <ValueType V, int D>
bool stream_as(const Packed& p, const Activations& in, int64_t strip, float* out) {
  static constexpr Stream kFew[4] = {stream_few<V, 1, D>, stream_few<V, 2, D>, stream_few<V, 3, D>,
                                     stream_few<V, 4, D>};
  return in.tokens <= 4 ? kFew[in.tokens - 1](p, in, strip, out) : stream_many<V, D>(p, in, strip, out);
}

// Sixteen activations from `from` on, zeros past the last column.
inline __m512 activations_at(const bf16* x, int64_t columns, int64_t from) {
  const int64_t left = std::max<int64_t>(0, std::min<int64_t>(16, columns - from));
  const __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << left) - 1), x + (left > 0 ? from : 0));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// What sums over a block begin with: -128 times the sum of its digits.
inline int32_t start_of(__m512i digits) {
  return -128 * _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), digits));
}

// ---- tiles of bfloat16 -------------------------------------------------------------------------------------------

// 32 int8 -> 32 bfloat16, times the scales of their rows. Exact: every integer of 8 bits is a bfloat16, and so are the
// products.
template <ValueType V>
inline __m512i widen(__m256i q, __m512 level_low, __m512 level_high) {
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(q)));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(q, 1)));
  if constexpr (row_of(V).grouped) {
    low = _mm512_mul_ps(low, level_low);
    high = _mm512_mul_ps(high, level_high);
  }
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

template <ValueType V>
void decode_as(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  const __m512i low_rows = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  alignas(64) int8_t bytes[kFeed * kWordBits8];
  Feed feed(p, cursor.value);
  for (int64_t i = 0; i < pairs / 2; i += kFeed) {
    const int64_t fed = std::min(kFeed, pairs / 2 - i);
    expand<V>(feed, p.mask_of(strip, first / 2 + i), fed, bytes, _mm512_setzero_si512());
    for (int64_t j = 0; j < fed; j += kBlock) {
      const __m512 level = levels_of<V>(p, strip, first / 2 + i + j);
      const __m512 low = _mm512_permutexvar_ps(low_rows, level);
      const __m512 high = _mm512_permutexvar_ps(_mm512_add_epi32(low_rows, _mm512_set1_epi32(8)), level);
      for (int64_t k = j; k < std::min(fed, j + kBlock); ++k) {
        const __m512i w =
            _mm512_load_si512(bytes + k * kWordBits8);  // row by row, four columns: the first two, then the last two
        bf16* out = tile + (i + k) * kWordBits8;
        _mm512_storeu_si512(out, widen<V>(_mm512_cvtepi32_epi16(w), low, high));
        _mm512_storeu_si512(out + kWordBits16, widen<V>(_mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)), low, high));
      }
    }
  }
  cursor = {feed.value, cursor.ok && feed.ok};
}

}  // namespace

bool stream_integers(const Packed& p, const Activations& in, int64_t strip, float* out) {
  return with_type<ValueType::kInt8>(p.type, [&](auto type) {
    static constexpr Stream kBy[3] = {stream_bytes<type>, stream_as<type, 2>, stream_as<type, 3>};
    return kBy[in.digits - 1](p, in, strip, out);
  });
}

void decode_integers(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  with_type<ValueType::kInt8>(p.type, [&](auto type) { decode_as<type>(p, cursor, strip, first, pairs, tile); });
}

void add_sums(const Packed& p, const Activations& in, int64_t strip, int64_t word, const int32_t* sums, float* out) {
  with_type<ValueType::kInt8>(p.type, [&](auto type) {
    (in.digits == 2 ? add_sums_as<type, 2> : add_sums_as<type, 3>)(p, in, strip, word, sums, out);
  });
}

void times_units(const Activations& in, float* out) {
  for (int64_t t = 0; t < in.tokens; ++t)
    _mm512_storeu_ps(out + t * kStrip, _mm512_mul_ps(_mm512_loadu_ps(out + t * kStrip), _mm512_set1_ps(in.unit[t])));
}

void integer_digits(const bf16* x, int64_t columns, float steps, int64_t digits, int64_t tokens, int8_t* bytes,
                    int32_t* starts) {
  const float most =
      digits == 2 ? 127 * 256 + 127 : 127 * 65536 + 127 * 256 + 127;  // a largest activation may round to a step more
  const __m512 low = _mm512_set1_ps(-most), high = _mm512_set1_ps(most), times = _mm512_set1_ps(steps);
  for (int64_t b = 0; b * kGroup < columns; ++b) {
    __m512i q[4];
    for (int64_t i = 0; i < 4; ++i) {
      const __m512 f = activations_at(x, columns, b * kGroup + 16 * i);
      q[i] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(f, times), low), high));
    }
    for (int64_t d = 0; d < digits; ++d) {
      const int64_t place = (b * digits + d) * tokens;
      for (int64_t i = 0; i < 4; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + place * kGroup + 16 * i),
                         _mm512_cvtepi32_epi8(q[i]));  // the low bytes
        q[i] = _mm512_srai_epi32(_mm512_add_epi32(q[i], _mm512_set1_epi32(128)), 8);
      }
      starts[place] = start_of(_mm512_loadu_si512(bytes + place * kGroup));
    }
  }
}

void integer_bytes(const bf16* x, int64_t columns, int64_t tokens, int8_t* bytes, int32_t* starts, float* scales) {
  for (int64_t b = 0; b * kGroup < columns; ++b) {
    __m512 f[4], largest = _mm512_set1_ps(0x1p-100f);  // of zeros: keeps the scale and its inverse normal floats
    for (int64_t i = 0; i < 4; ++i) {
      f[i] = activations_at(x, columns, b * kGroup + 16 * i);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(f[i]));
    }
    const float most = _mm512_reduce_max_ps(largest);
    const int64_t place = b * tokens;
    for (int64_t i = 0; i < 4; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + place * kGroup + 16 * i),
                       _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(f[i], _mm512_set1_ps(127 / most)))));
    scales[place] = most / 127;
    starts[place] = start_of(_mm512_loadu_si512(bytes + place * kGroup));
  }
}

void expand_integers(const Packed& p, Cursor& cursor, const uint8_t* mask, int64_t words, int8_t* bytes) {
  Feed feed(p, cursor.value);
  with_type<ValueType::kInt8>(p.type,
                              [&](auto type) { expand<type>(feed, mask, words, bytes, _mm512_setzero_si512()); });
  cursor = {feed.value, cursor.ok && feed.ok};
}

}  // namespace losa
LOSA_TARGET_END
#endif
