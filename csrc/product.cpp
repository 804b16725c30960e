#include "product.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

namespace losa {
namespace {

// ---- activations in fixed point ----------------------------------------------------------------------------------

// What a token's activations can be turned into.
enum Road : int64_t {
  kExact = 0,    // bfloat16, multiplied with every weight, zeros too
  kPairs = 1,    // bfloat16, multiplied while the weight streams by
  kByte = 7,     // bits of bytes, each 64 columns' with a scale of their own
  kNarrow = 15,  // bits of fixed-point numbers
  kWide = 23,
};

constexpr int64_t kJudged = 16;  // activations that are judged by their largest

// How many bits leave errors that bfloat16 outputs do not show, for any rows: none if outliers tower above all
// others. Rows that do not meet an outlier have outputs of the size of the other activations, so what counts is the
// ratio of the largest to a typical one: rounding to a step u errs by 0.3 u, which must be well below 2^-9 of the root
// mean square. That is taken as half of the median of the largest of every 16 that are not all zero.
Road bits_of(const bf16* x, int64_t columns) {
  constexpr int64_t kLanes = 32, kMost = 1 << 14;
  int16_t largest[kMost];
  const int64_t slabs = divide_up(columns, kLanes * kJudged);
  if (slabs * kLanes > kMost) return kExact;
  int64_t n = 0;
  int16_t top = 0;
  for (int64_t s = 0; s < slabs; ++s) {
    int16_t most[kLanes] = {};
    const int64_t begin = s * kLanes * kJudged, end = std::min(columns, begin + kLanes * kJudged);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t l = 0; l < kLanes; ++l)
        most[l] = std::max(most[l], int16_t(x[i + l] & 0x7fff));  // orders like the number
    for (int64_t l = 0; i < end; ++i, ++l) most[l] = std::max(most[l], int16_t(x[i] & 0x7fff));
    for (int16_t m : most) {
      top = std::max(top, m);
      if (m > 0) largest[n++] = m;
    }
  }
  if (top >= 0x7f80) return kExact;  // not finite
  if (n == 0) return kNarrow;
  if (columns < 128 || to_float(bf16(top)) < std::ldexp(1.0f, -100))
    return kExact;  // too few to tell; too small for a unit
  std::nth_element(largest, largest + n / 2, largest + n);
  const float ratio = to_float(bf16(top)) / to_float(bf16(largest[n / 2]));
  return ratio <= float(1 << (kNarrow - 9)) ? kNarrow : ratio <= float(1 << (kWide - 9)) ? kWide : kExact;
}

// Tokens a thread looks at, at least.
int64_t token_grain(int64_t columns) { return std::max<int64_t>(1, 8192 / (columns + 1)); }

struct FixedPoint {
  int64_t digits;
  std::vector<int8_t> bytes;
  std::vector<int32_t> starts;
  std::vector<float> unit, scales;

  FixedPoint(const Kernels& k, ValueType type, const bf16* x, int64_t tokens, int64_t columns, int bits,
             const Parallel& parallel)
      : digits(divide_up(bits, 8 * k.digit_bytes)),
        bytes(size_t(divide_up(columns, kGroup) * digits * tokens * kGroup * k.digit_bytes)),
        starts(size_t(divide_up(columns, kGroup * span_of(type, digits)) * digits * tokens)),
        unit(size_t(tokens), 1.0f),
        scales(bits == kByte ? starts.size() : 0) {
    parallel(0, tokens, token_grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (bits == kByte) {
          k.bytes(x + t * columns, columns, tokens, bytes.data() + t * kGroup, starts.data() + t, scales.data() + t);
          continue;
        }
        int16_t top = 0;
        for (int64_t i = 0; i < columns; ++i) top = std::max(top, int16_t(x[t * columns + i] & 0x7fff));
        int exponent = 0;
        std::frexp(to_float(bf16(top)), &exponent);  // |x| < 2^exponent
        exponent = std::max(exponent, -100);         // of zeros: keeps the unit and its inverse normal floats
        unit[size_t(t)] = std::ldexp(1.0f, exponent - bits);
        k.digits(x + t * columns, columns, std::ldexp(1.0f, bits - exponent), digits, tokens, span_of(type, digits),
                 bytes.data() + t * kGroup * k.digit_bytes, starts.data() + t);
      }
    });
  }
};

// ---- the ways to multiply ----------------------------------------------------------------------------------------

struct Job {
  const Part* parts;
  int64_t n_parts;
  const Kernels& k;
  const Parallel& parallel;
  std::atomic<bool> ok{true};

  // What all parts have alike.
  int64_t columns() const { return parts->p.columns; }
  bool integers() const { return k.digits && is_integer(parts->p.type); }

  // y of 16 rows from their float32 sums [tokens, sum_stride].
  void store(const Part& part, int64_t strip, int64_t tokens, const float* sums, int64_t sum_stride) const {
    const Packed& p = part.p;
    const int64_t from = strip * kStrip, n = std::min(kStrip, p.rows - from);
    float scale[kStrip], shift[kStrip];
    for (int64_t r = 0; r < kStrip; ++r) {
      scale[r] = p.scale && r < n ? p.scale[from + r] : 1.0f;
      shift[r] = part.bias && r < n ? to_float(part.bias[from + r]) : 0.0f;
    }
    bf16 rounded[kStrip];
    for (int64_t t = 0; t < tokens; ++t, sums += sum_stride) {
      bf16* out = part.y + t * p.rows + from;
      k.round(sums, scale, shift, n == kStrip ? out : rounded);
      if (n < kStrip) std::memcpy(out, rounded, size_t(n) * sizeof(bf16));
    }
  }

  // The strips of all parts, one part's after the other's, are shared out evenly.
  void stream(const Activations& in) {
    int64_t strips = 0;
    for (const Part* part = parts; part < parts + n_parts; ++part) strips += divide_up(part->p.rows, kStrip);
    parallel(0, strips, grain(parts->p, kStrip), [&](int64_t begin, int64_t end) {
      std::vector<float> out(size_t(kStrips * in.tokens * kStrip));
      for (const Part* part = parts; part < parts + n_parts; ++part) {
        const int64_t mine = divide_up(part->p.rows, kStrip);
        for (int64_t s = std::max<int64_t>(0, begin); s < std::min(mine, end); s += kStrips) {
          const int64_t n = std::min(kStrips, std::min(mine, end) - s);
          if (!k.stream(part->p, in, s, n, out.data())) ok = false;
          for (int64_t i = 0; i < n; ++i) store(*part, s + i, in.tokens, &out[size_t(i * in.tokens * kStrip)], kStrip);
        }
        begin -= mine;
        end -= mine;
      }
    });
  }

  void by_digits(const bf16* x, int64_t tokens, int bits) {
    const FixedPoint fixed(k, parts->p.type, x, tokens, columns(), bits, parallel);
    stream({tokens, nullptr, fixed.digits, fixed.bytes.data(), fixed.starts.data(), fixed.unit.data(),
            fixed.scales.data()});
  }

  void by_pairs(const bf16* x, int64_t tokens) {
    const int64_t pairs = parts->p.padded_pairs();
    if (tokens == 1 && columns() == 2 * pairs) return stream({tokens, x, 0, nullptr, nullptr, nullptr, nullptr});
    std::vector<bf16> interleaved(size_t(2 * pairs * tokens), 0);
    parallel(0, divide_up(columns(), 2), std::max<int64_t>(1, 8192 / tokens), [&](int64_t begin, int64_t end) {
      for (int64_t t = 0; t < tokens; ++t) {
        const bf16* row = x + t * columns();
        for (int64_t i = begin; i < std::min(end, columns() / 2); ++i)
          std::memcpy(&interleaved[size_t((i * tokens + t) * 2)], row + 2 * i, 2 * sizeof(bf16));
        if (end > columns() / 2)
          interleaved[size_t((columns() / 2 * tokens + t) * 2)] = row[columns() - 1];  // an odd last column
      }
    });
    stream({tokens, interleaved.data(), 0, nullptr, nullptr, nullptr, nullptr});
  }

  // `x` is by blocks of columns: [blocks, tokens, 2 * kTilePairs], see by_tiles.
  void tiles(const Part& part, int64_t begin, int64_t end, const bf16* x, int64_t tokens) {  // in pairs of strips
    const Packed& p = part.p;
    alignas(64) bf16 tile[2][kTilePairs * kWordBits16];
    alignas(64) float sums[kTileTokens * 2 * kStrip] = {};  // what a weight of no columns sums to
    const int64_t strips = divide_up(p.rows, kStrip), pairs = p.padded_pairs();
    for (int64_t s = 2 * begin; s < std::min(2 * end, strips); s += 2) {
      const int64_t n_strips = std::min<int64_t>(2, strips - s);
      Cursor cursor[2] = {{p.offsets[s], true}, {p.offsets[s + n_strips - 1], true}};
      for (int64_t first = 0; first < pairs; first += kTilePairs) {
        const int64_t n = std::min(kTilePairs, pairs - first);
        for (int64_t j = 0; j < n_strips; ++j) k.decode(p, cursor[j], s + j, first, n, tile[j]);
        for (int64_t j = 0; j < n_strips; ++j)
          p.prefetch(cursor[j].value, n);  // memory works on the next tile meanwhile
        k.multiply(tile[0], tile[n_strips - 1], n, x + 2 * first * tokens, tokens, first > 0, sums);
      }
      for (int64_t j = 0; j < n_strips; ++j) {
        if (!cursor[j].ok || cursor[j].value != p.offsets[s + j + 1]) ok = false;
        store(part, s + j, tokens, sums + j * kStrip, 2 * kStrip);
      }
    }
  }

  // x by blocks of columns, [blocks, tokens, 2 * kTilePairs], zeros past the last column: rows of a block are
  // neighbours in memory. Rows 2^n bytes apart would fall on the same few cache sets.
  void by_tiles(const bf16* x, int64_t tokens) {
    const int64_t width = 2 * kTilePairs, blocks = divide_up(columns(), width), chunks = divide_up(tokens, kTileTokens);
    const std::unique_ptr<bf16[]> blocked(new bf16[size_t(blocks * width * divide_up(tokens, chunks))]);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t from = tokens * c / chunks, n = tokens * (c + 1) / chunks - from;
      parallel(0, blocks, std::max<int64_t>(1, 64 / n), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const int64_t filled = std::min(width, columns() - b * width);
          for (int64_t t = 0; t < n; ++t) {
            bf16* row = blocked.get() + (b * n + t) * width;
            std::memcpy(row, x + (from + t) * columns() + b * width, size_t(filled) * sizeof(bf16));
            std::memset(row + filled, 0, size_t(width - filled) * sizeof(bf16));
          }
        }
      });
      for (int64_t i = 0; i < n_parts; ++i) {
        const Part part{parts[i].p, parts[i].bias, parts[i].y + from * parts[i].p.rows};
        parallel(0, divide_up(part.p.rows, 2 * kStrip), grain(part.p, 2 * kStrip),
                 [&](int64_t begin, int64_t end) { tiles(part, begin, end, blocked.get(), n); });
      }
    }
  }

  void by(Road road, const bf16* x, int64_t tokens) {
    if (road == kExact) return by_tiles(x, tokens);
    if (road == kPairs) return by_pairs(x, tokens);
    by_digits(x, tokens, int(road));
  }

  Road road_of(const bf16* x) const {
    if (integers()) return bits_of(x, columns());
    for (int64_t i = 0; k.skips_zeros && i < columns(); ++i)
      if ((x[i] & 0x7f80) == 0x7f80) return kExact;
    return kPairs;
  }
};

}  // namespace

bool multiply(const Part* parts, int64_t n_parts, const Kernels& k, const bf16* x, int64_t tokens,
              const Parallel& parallel) {
  Job job{parts, n_parts, k, parallel};
  const int64_t columns = job.columns();
  if (tokens > k.stream_tokens(parts->p.type)) {
    job.by_tiles(x, tokens);
    return job.ok;
  }
  std::vector<int64_t> exact, others;  // tokens; one that takes the exact road changes nothing for its neighbours
  Road road = job.integers() ? kNarrow : kPairs;
  std::vector<Road> roads(static_cast<size_t>(tokens));
  parallel(0, tokens, token_grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) roads[size_t(t)] = job.road_of(x + t * columns);
  });
  for (int64_t t = 0; t < tokens; ++t) {
    const Road found = roads[size_t(t)];
    (found == kExact ? exact : others).push_back(t);
    road = std::max(road, found);
  }
  if (road == kNarrow && k.bytes && tokens <= kByteTokens) road = kByte;
  if (exact.empty() || others.empty()) {
    job.by(others.empty() ? kExact : road, x, tokens);
    return job.ok;
  }
  for (const auto* some : {&exact, &others}) {
    std::vector<bf16> x_some(some->size() * size_t(columns));
    for (size_t i = 0; i < some->size(); ++i)
      std::memcpy(&x_some[i * size_t(columns)], x + (*some)[i] * columns, size_t(columns) * sizeof(bf16));
    for (const Part* part = parts; part < parts + n_parts; ++part) {
      const size_t rows = size_t(part->p.rows);
      std::vector<bf16> y_some(some->size() * rows);
      const Part of_some{part->p, part->bias, y_some.data()};
      job.parts = &of_some;
      job.n_parts = 1;
      job.by(some == &exact ? kExact : road, x_some.data(), int64_t(some->size()));
      for (size_t i = 0; i < some->size(); ++i)
        std::memcpy(part->y + (*some)[i] * part->p.rows, &y_some[i * rows], rows * sizeof(bf16));
    }
  }
  return job.ok;
}

template <typename T>
bool expand(const Packed& p, const Kernels& k, int64_t first_strip, int64_t begin, int64_t end, T* panel) {
  alignas(64) bf16 tile[kTilePairs * kWordBits16];
  bool ok = true;
  for (int64_t s = begin; s < end; ++s) {
    Cursor cursor{p.offsets[s], true};
    const int64_t rows = std::min(kStrip, p.rows - s * kStrip);
    for (int64_t first = 0; first < p.padded_pairs(); first += kTilePairs) {
      const int64_t n = std::min(kTilePairs, p.padded_pairs() - first),
                    columns = std::min(2 * n, p.columns - 2 * first);
      k.decode(p, cursor, s, first, n, tile);
      for (int64_t r = 0; r < rows; ++r) {
        T* out = panel + ((s - first_strip) * kStrip + r) * p.columns + 2 * first;
        const float scale = p.scale ? p.scale[s * kStrip + r] : 1.0f;
        for (int64_t c = 0; c < columns; ++c) {
          const bf16 w = tile[(c / 2 * kStrip + r) * 2 + c % 2];
          if constexpr (sizeof(T) == sizeof(float))
            out[c] = to_float(w) * scale;
          else
            out[c] = p.scale ? to_bf16(to_float(w) * scale) : w;
        }
      }
    }
    ok = ok && cursor.ok && cursor.value == p.offsets[s + 1];
  }
  return ok;
}
template bool expand(const Packed&, const Kernels&, int64_t, int64_t, int64_t, bf16*);
template bool expand(const Packed&, const Kernels&, int64_t, int64_t, int64_t, float*);

}  // namespace losa
