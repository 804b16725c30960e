// int8 and int4 values on AVX-512. The 64 weights of a word are multiplied by the two or three bytes of fixed-point
// activations: integer sums are exact, and no weight is ever converted to float. int4 values become int8 by a look-up
// of 16 levels, 64 *stored* values at a time, which at 70 % zeros is a third of the words; their sums are scaled once
// for each 64 columns.
//
// Cost of a word and one token on Zen 4, in cycles by instruction: moving its mask 1.0, expanding 1.3, two dot products
// 2.0, which compete for the same ports: 4.4, or 1.2 ns. Unpacking int4 adds 1. From the L2 cache int8 takes 1.3 ns and
// int4 1.55 (70 %), from memory 1.43 and 1.64; memory delivers 27 or 18 bytes to one thread in 1.0 or 0.7. Where the
// user allows it, activations of few tokens are one byte with a scale for 64 columns: one dot product less.
//
// On Zen 5, two dot products a cycle, int8 takes 0.73 ns for one token, 2.3 for eight and 4.3 for sixteen, whose 32 dot
// products alone take 4.0: as many of them as loads, each a broadcast of digits, so two strips share what is loaded.
#include "kernels.h"

#if defined(__x86_64__)
#include <algorithm>

#include "avx512.h"
LOSA_TARGET_BEGIN(LOSA_AVX512)
#include "avx512_sums.h"

namespace losa {
namespace {

// Reads codes for Feed, in order, and asks for later ones; numbers come xor `flip`.
template <bool kAsk = true>
struct Unpack {
  __m512i flip;
  inline void operator()(Bits<4>, const uint8_t* codes, int64_t n, int8_t* out) const {
    const __m512i table = _mm512_xor_si512(
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNumbers<4>.of))), flip);
    for (int64_t i = 0; i < n; i += 32) {
      if constexpr (kAsk) _mm_prefetch(reinterpret_cast<const char*>(codes) + i + kAhead, _MM_HINT_T0);
      const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
      const __m512i apart = _mm512_and_si512(_mm512_or_si512(both, _mm512_slli_epi16(both, 4)), _mm512_set1_epi8(15));
      _mm512_storeu_si512(out + 2 * i, _mm512_shuffle_epi8(table, apart));
    }
  }
};

// The next word, expanded, every weight xor `flip`. What shares bytes was flipped when it was unpacked.
template <ValueType V>
inline __m512i expanded(const uint8_t* mask, const int8_t*& v, __m512i flip) {
  const uint64_t m = load64(mask);
  __m512i packed = _mm512_loadu_si512(v);
  if constexpr (row_of(V).bits == 8) packed = _mm512_xor_si512(opaque(packed), flip);
  v += __builtin_popcountll(m);
  return _mm512_mask_expand_epi8(opaque(flip), m, opaque(packed));
}

// Asks for what comes after word i of a block: for masks further on than Feed counts next, and for values that it does
// not unpack, a cache line for two words. (Inlined late, it would be gone: gcc 12 takes a function that only prefetches
// for one that does nothing.)
template <ValueType V>
LOSA_ALWAYS inline void ask_after(int64_t i, const uint8_t* mask, const int8_t* v) {
  if (i == 0) {
    _mm_prefetch(reinterpret_cast<const char*>(mask) + 2304, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(mask) + 2304 + 64, _MM_HINT_T0);
  }
  if (row_of(V).bits == 8 && i % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(v) + kAhead, _MM_HINT_T0);
}

// What a strip reads next, in shares. Asked for at once, while words are expanded, it would fill the queue of cache
// misses, and nothing while others are multiplied by them.
struct Ahead {
  const char *values, *masks;
  int64_t value_lines, mask_lines;  // cache lines of a share
  LOSA_ALWAYS inline void ask() {
    for (int64_t i = 0; i < value_lines; ++i, values += 64) _mm_prefetch(values, _MM_HINT_T0);
    for (int64_t i = 0; i < mask_lines; ++i, masks += 64) _mm_prefetch(masks, _MM_HINT_T0);
  }
};

// Shares of kMost words that come kLead words after `end`, in this strip or in the next one that is read, if they have
// as many values a word as those from `first` on before them had, `n`.
template <ValueType V, int64_t kMost, int64_t kLead>
inline Ahead ahead_of(const Packed& p, int64_t strip, int64_t first, int64_t end, int64_t value, int64_t n,
                      int64_t shares) {
  constexpr int64_t kBits = row_of(V).bits, kLine = 64, kMaskLines = kMost * kWordBits8 / 8 / kLine;
  const int64_t fed = end - first;
  int64_t word = end + kLead, known = end;
  if (word >= p.words) {
    strip = std::min(strip + kStrips, divide_up(p.rows, kStrip));
    value = p.offsets[strip];
    word = std::min(word - p.words, p.words);
    known = 0;
  }
  value += (word - known) * n / fed;
  const int64_t value_lines = n * kMost / fed * kBits / 8 / kLine + 1;
  return {static_cast<const char*>(p.values) + value * kBits / 8, reinterpret_cast<const char*>(p.mask_of(strip, word)),
          divide_up(value_lines, shares), divide_up(kMaskLines, shares)};
}

// The instruction multiplies unsigned by signed bytes: the weights become w + 128, which is w xor -128, the activations
// stay signed, and what 128 added, 128 times the sum of the activations' digits, is known before the weight is read:
// sums begin at its negative, Activations::starts.
inline __m512i unsigned_flip() { return _mm512_set1_epi8(-128); }

// ---- sums in registers -------------------------------------------------------------------------------------------

constexpr int64_t kTogether = 4;  // tokens at once

// More are multiplied part by part, the largest first: 9 tokens are 3 + 3 + 3, 10 are 4 + 3 + 3.
constexpr int64_t parts_of(int64_t tokens) { return divide_up(tokens, kTogether); }
constexpr int64_t part_of(int64_t tokens, int64_t part) {  // its first token
  return divide_up(tokens * part, parts_of(tokens));
}

// Tokens from t_0 on by words of two strips that were kept, expanded, when the first ones were multiplied by them.
template <ValueType V, int T, int D>
void add_kept(const int8_t* kept, Ahead* ahead, int64_t first, int64_t end, const Packed& p, const int64_t* strips,
              const Activations& in, int64_t t_0, float* out) {
  Product<V, kStrips, T, D> product(p, strips, in, t_0, out);
  const auto next = [&](auto s, int64_t b, int64_t i) LOSA_ALWAYS {
    if (i == 0) ahead[s].ask();
    return _mm512_load_si512(kept + (s * kFeed + b * kBlock - first + i) * kWordBits8);
  };
  product.add(next, first, end);
  product.store();
}

// T tokens, and more of them part by part, T or T - 1 at a time. One token: a strip after the other. More: two at once,
// so that what is loaded of a token serves both. Words are expanded for the first part, whose dot products hide it, and
// kept for the others. Without a second strip `last` is `strip`, which is multiplied twice.
template <ValueType V, int T, int D>
bool stream_as(const Packed& p, const Activations& in, int64_t strip, int64_t last, float* out) {
  constexpr int S = T > 1 ? kStrips : 1;
  constexpr bool kKeep = T > 2;  // 5 tokens are 3 + 2
  constexpr int64_t kMost = kKeep ? kFeed : kFedMost, kLead = kFedMost - kMost;
  alignas(64) int8_t kept[kKeep ? S * kMost * kWordBits8 : 1];
  const __m512i flip = unsigned_flip();
  const int64_t strips[kStrips] = {strip, last}, parts = parts_of(in.tokens);
  Feed feeds[kStrips] = {{p, p.offsets[strip]}, {p, p.offsets[last]}};
  std::fill(out, out + S * in.tokens * kStrip, 0.0f);
  Product<V, S, T, D> product(p, strips, in, 0, out);
  for (int64_t first = 0; first < p.words; first += kMost) {
    const int64_t end = std::min(p.words, first + kMost);
    const int8_t* v[S];
    const uint8_t* masks[S];
    Ahead ahead[kStrips];
    each<S>([&](auto s) LOSA_ALWAYS {
      Feed& feed = feeds[s];
      const int64_t n = feed.template next<V>(p.mask_of(strips[s], first), end - first, Unpack<S == 1>{flip});
      v[s] = feed.values;
      masks[s] = feed.mask;
      if constexpr (S > 1)
        ahead[s] = ahead_of<V, kMost, kLead>(p, strips[s], first, end, feed.value, n, parts * kMost / kBlock);
    });
    const auto next = [&](auto s, int64_t b, int64_t i) LOSA_ALWAYS {
      const uint8_t* mask = masks[s] + 8 * (b * kBlock - first);
      if constexpr (S == 1)
        ask_after<V>(i, mask, v[s]);
      else if (i == 0)
        ahead[s].ask();
      const __m512i weights = expanded<V>(mask + 8 * i, v[s], flip);
      if constexpr (kKeep) _mm512_store_si512(kept + (s * kMost + b * kBlock - first + i) * kWordBits8, weights);
      return weights;
    };
    product.add(next, first, end);
    if constexpr (kKeep)
      for (int64_t part = 1; part < parts; ++part) {
        const int64_t t = part_of(in.tokens, part);
        const auto add = part_of(in.tokens, part + 1) - t == T ? add_kept<V, T, D> : add_kept<V, T - 1, D>;
        add(kept, ahead, first, end, p, strips, in, t, out);
      }
  }
  product.store();
  bool ok = true;
  each<S>([&](auto s) LOSA_ALWAYS {
    times_units(in, out + s * in.tokens * kStrip);
    ok = ok && feeds[s].ok && feeds[s].value == p.offsets[strips[s] + 1];
  });
  return ok;
}

template <ValueType V, int D>
void add_sums_as(const Packed& p, const Activations& in, int64_t strip, int64_t word, const int32_t* sums, float* out) {
  const __m512 level = levels_of<V>(p, strip, word / kBlock);
  for (int64_t t = 0; t < in.tokens; ++t) {
    __m512i a[D];
    for (int d = 0; d < D; ++d) a[d] = _mm512_load_si512(sums + (d * kIntegerTokens + t) * kStrip);
    _mm512_storeu_ps(out + t * kStrip, drained<V, D>(a, level, _mm512_loadu_ps(out + t * kStrip)));
  }
}

template <ValueType V, int D>
bool stream_token(const Packed& p, const Activations& in, int64_t strip, float* out) {
  return stream_as<V, 1, D>(p, in, strip, strip, out);
}

template <ValueType V, int D>
bool stream_digits(const Packed& p, const Activations& in, int64_t strip, int64_t n, float* out) {
  if (in.tokens == 1) return each_strip<stream_token<V, D>>(p, in, strip, n, out);
  static constexpr decltype(&stream_as<V, 2, D>) kBy[] = {stream_as<V, 2, D>, stream_as<V, 3, D>, stream_as<V, 4, D>};
  return kBy[part_of(in.tokens, 1) - 2](p, in, strip, strip + n - 1, out);
}

// Sixteen activations from `from` on, zeros past the last column.
inline __m512 activations_at(const bf16* x, int64_t columns, int64_t from) {
  const int64_t left = std::max<int64_t>(0, std::min<int64_t>(16, columns - from));
  const __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << left) - 1), x + (left > 0 ? from : 0));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512i sum_of(const __m512i (&q)[4]) {
  return _mm512_add_epi32(_mm512_add_epi32(q[0], q[1]), _mm512_add_epi32(q[2], q[3]));
}

// ---- tiles of bfloat16 -------------------------------------------------------------------------------------------

template <ValueType V>
inline void expand(Feed& feed, const uint8_t* from, int64_t words, int8_t* bytes, __m512i flip) {
  feed.next<V>(from, words, Unpack<>{flip});
  const int8_t* v = feed.values;
  for (int64_t i = 0; i < words; ++i) {
    ask_after<V>(i % kBlock, from + 8 * i, v);
    _mm512_store_si512(bytes + i * kWordBits8, expanded<V>(feed.mask + 8 * i, v, flip));
  }
}

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
      const __m512 level = levels_of<V>(p, strip, (first / 2 + i + j) / kBlock);
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

bool stream_integers(const Packed& p, const Activations& in, int64_t strip, int64_t n, float* out) {
  return with_type<ValueType::kInt8>(p.type, [&](auto type) {
    static constexpr decltype(Kernels::stream) kBy[3] = {stream_digits<type, 1>, stream_digits<type, 2>,
                                                         stream_digits<type, 3>};
    return kBy[in.digits - 1](p, in, strip, n, out);
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

void integer_digits(const bf16* x, int64_t columns, float steps, int64_t digits, int64_t tokens, int64_t span,
                    int8_t* bytes, int32_t* starts) {
  const float most =
      digits == 2 ? 127 * 256 + 127 : 127 * 65536 + 127 * 256 + 127;  // a largest activation may round to a step more
  const __m512 low = _mm512_set1_ps(-most), high = _mm512_set1_ps(most), times = _mm512_set1_ps(steps);
  for (int64_t b = 0; b * kGroup < columns; ++b) {
    __m512i q[4];
    for (int64_t i = 0; i < 4; ++i) {
      const __m512 f = activations_at(x, columns, b * kGroup + 16 * i);
      q[i] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(f, times), low), high));
    }
    __m512i sum = sum_of(q);
    for (int64_t d = 0; d < digits; ++d) {  // q is its low byte and 256 times what is above it
      for (int64_t i = 0; i < 4; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + (b * digits + d) * tokens * kGroup + 16 * i),
                         _mm512_cvtepi32_epi8(q[i]));
        q[i] = _mm512_srai_epi32(_mm512_add_epi32(q[i], _mm512_set1_epi32(128)), 8);
      }
      const __m512i above = sum_of(q);
      starts[(b / span * digits + d) * tokens] +=
          -128 * _mm512_reduce_add_epi32(_mm512_sub_epi32(sum, _mm512_slli_epi32(above, 8)));
      sum = above;
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
    __m512i q[4];
    for (int64_t i = 0; i < 4; ++i) {
      q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(f[i], _mm512_set1_ps(127 / most)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + place * kGroup + 16 * i), _mm512_cvtepi32_epi8(q[i]));
    }
    scales[place] = most / 127;
    starts[place] = -128 * _mm512_reduce_add_epi32(sum_of(q));
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
