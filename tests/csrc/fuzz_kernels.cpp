// Random packed weights, good and corrupt, through every function of every kernel that runs here. Built with sanitizers by
// tests/test_csrc.py: a read out of bounds ends the program. All numbers are small integers, whose sums are exact in any order, so
// every kernel must also agree with the portable one to the bit, on what a corrupt weight decodes to as well.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/kernels.h"

using namespace losa;

namespace {

std::mt19937 randomness;
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(randomness); }

// Exactly `size` bytes. From malloc, where the address sanitizer sees every ordinary access; or up against a page that may not be
// touched, where the processor sees the rest, such as loads under a mask.
class Exact {
 public:
  Exact(size_t size, bool guarded) {
    if (!guarded) {
      p_ = std::malloc(size);
      return;
    }
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t pages = (size + page - 1) / page * page;
    mapped_ = pages + page;
    map_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED || mprotect(static_cast<char*>(map_) + pages, page, PROT_NONE) != 0) std::abort();
    p_ = static_cast<char*>(map_) + pages - size;
  }
  ~Exact() {
    if (mapped_ > 0)
      munmap(map_, mapped_);
    else
      std::free(p_);
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(p_);
  }

 private:
  void* p_ = nullptr;
  void* map_ = nullptr;
  size_t mapped_ = 0;
};

std::vector<const Kernels*> kernels_here() {
  std::vector<const Kernels*> found{&portable_kernels()};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) found.push_back(&avx2_kernels());
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  avx512 = avx512 && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  avx512 = avx512 && __builtin_cpu_supports("avx512vpopcntdq");
  if (avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
    found.insert(found.end(), {&avx512_kernels(), &avx512_a8_kernels()});
#endif
  return found;
}

[[noreturn]] void fail(const char* what, const Kernels& k, int64_t round) {
  std::printf("round %ld: %s of %s differs from portable\n", long(round), what, k.name);
  std::exit(1);
}

// Activations of `tokens` tokens, as bfloat16 pairs and as a kernel's digits of fixed-point numbers of unit 1; one digit of a kernel
// that rounds is a byte with a scale, which is 1 because the largest of every 64 is 127.
struct Inputs {
  Exact pairs, bytes;
  std::vector<int32_t> sums;
  std::vector<float> unit, scales;
  Activations in;
  Inputs(const Kernels& k, ValueType type, int64_t tokens, int64_t words, int64_t group, int64_t digits, bool guarded)
      : pairs(size_t(words * group * tokens) * sizeof(bf16), guarded),
        bytes(size_t(blocks(words * group) * digits * tokens * kGroup * k.digit_bytes), guarded),
        sums(size_t(blocks(words * group, span_of(type, digits)) * digits * tokens)), unit(size_t(tokens), 1.0f), scales(sums.size()),
        in{tokens, pairs.as<bf16>(), digits, bytes.as<int8_t>(), sums.data(), unit.data(), scales.data()} {
    const int64_t columns = words * group;
    const bool rounds = k.bytes && digits == 1;
    std::vector<bf16> x(size_t(tokens * columns));
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < columns; ++c)
        pairs.as<bf16>()[(c / 2 * tokens + t) * 2 + c % 2] = x[size_t(t * columns + c)] =
            to_bf16(rounds && c % kGroup == 0 ? 127 : float(pick(-8, 8)));
    for (int64_t t = 0; t < tokens && rounds; ++t) k.bytes(&x[size_t(t * columns)], columns, tokens, bytes.as<int8_t>() + t * kGroup, &sums[size_t(t)], &scales[size_t(t)]);
    for (int64_t t = 0; t < tokens && k.digits && !rounds; ++t)
      k.digits(&x[size_t(t * columns)], columns, 1.0f, digits, tokens, span_of(type, digits), bytes.as<int8_t>() + t * kGroup * k.digit_bytes, &sums[size_t(t)]);
  }
  static int64_t blocks(int64_t columns, int64_t span = 1) { return (columns + span * kGroup - 1) / (span * kGroup); }
};

void multiply_tiles(int64_t round, const Kernels& k, const bf16* tile_0, const bf16* tile_1, int64_t pairs, bool guarded) {
  const int64_t tokens = pick(1, 20), row = 2 * kTilePairs;
  const bool accumulate = pick(0, 1);
  const Exact x(size_t(tokens * row) * sizeof(bf16), guarded);
  for (int64_t i = 0; i < tokens * row; ++i) x.as<bf16>()[i] = to_bf16(float(pick(-8, 8)));
  const size_t sums = size_t(tokens * 2 * kStrip);
  const Exact found(sums * sizeof(float), guarded), expected(sums * sizeof(float), guarded);
  for (size_t i = 0; i < sums; ++i) found.as<float>()[i] = expected.as<float>()[i] = float(pick(-1000, 1000));
  k.multiply(tile_0, tile_1, pairs, x.as<bf16>(), tokens, accumulate, found.as<float>());
  portable_kernels().multiply(tile_0, tile_1, pairs, x.as<bf16>(), tokens, accumulate, expected.as<float>());
  for (size_t i = 0; i < sums; ++i)
    if (found.as<float>()[i] != expected.as<float>()[i]) fail("a product", k, round);
}

// Sums that need rounding up, down and to even, and those that are no numbers: any NaN will do for a NaN.
void round_sums(int64_t round, const Kernels& k) {
  const float special[] = {0.0f, -0.0f, HUGE_VALF, -HUGE_VALF, NAN, -NAN, 3.4e38f, -3.4e38f};
  float sum[kStrip], scale[kStrip], shift[kStrip];
  for (int64_t r = 0; r < kStrip; ++r) {
    sum[r] = pick(0, 3) > 0 ? float(pick(-5000, 5000)) : special[pick(0, 7)];
    scale[r] = pick(0, 1) ? 1.0f : 0.5f;
    shift[r] = float(pick(-100, 100));
  }
  bf16 found[kStrip], expected[kStrip];
  k.round(sum, scale, shift, found);
  portable_kernels().round(sum, scale, shift, expected);
  for (int64_t r = 0; r < kStrip; ++r)
    if (found[r] != expected[r] && !(std::isnan(to_float(found[r])) && std::isnan(to_float(expected[r])))) fail("a rounded sum", k, round);
}

// Rows of a dense matrix times one token, within their memory.
void multiply_rows(int64_t round, const Kernels& k, bool guarded) {
  const int64_t n = pick(1, 40), width = pick(0, 1) ? 8 * pick(1, 40) : pick(1, 100);
  const Exact x(size_t(width) * sizeof(bf16), guarded), rows(size_t(n * width) * sizeof(bf16), guarded);
  for (int64_t i = 0; i < width; ++i) x.as<bf16>()[i] = to_bf16(float(pick(-8, 8)));
  for (int64_t i = 0; i < n * width; ++i) rows.as<bf16>()[i] = to_bf16(float(pick(-8, 8)));  // integers: sums are exact
  const Exact wide(size_t(width) * sizeof(float), guarded), found(size_t(n) * sizeof(float), guarded), expected(size_t(n) * sizeof(float), guarded);
  k.dots(x.as<bf16>(), rows.as<bf16>(), n, width, found.as<float>(), wide.as<float>());
  portable_kernels().dots(x.as<bf16>(), rows.as<bf16>(), n, width, expected.as<float>(), wide.as<float>());
  for (int64_t i = 0; i < n; ++i)
    if (found.as<float>()[i] != expected.as<float>()[i]) fail("rows", k, round);
}

// Heads over a cache: as far from the portable ones as rounding to bfloat16 goes, within their memory, and the same bits whether
// they come together or one by one, for threads divide them.
void attend_to_cache(int64_t round, const Kernels& k, bool guarded) {
  const int64_t heads = pick(1, 9), n = pick(1, 70), width = pick(0, 1) ? 8 * pick(1, 18) : pick(1, 40);
  const Exact q(size_t(heads * width) * sizeof(bf16), guarded), keys(size_t(n * width) * sizeof(bf16), guarded), values(size_t(n * width) * sizeof(bf16), guarded);
  for (int64_t i = 0; i < heads * width; ++i) q.as<bf16>()[i] = to_bf16(float(pick(-100, 100)) / 64);
  for (int64_t i = 0; i < n * width; ++i) {
    keys.as<bf16>()[i] = to_bf16(float(pick(-100, 100)) / 64);
    values.as<bf16>()[i] = to_bf16(float(pick(-100, 100)) / 64);
  }
  const float scaling = 1.0f / std::sqrt(float(width));
  const size_t size = size_t(heads * width) * sizeof(bf16);
  const Exact found(size, guarded), single(size, guarded), expected(size, guarded), sums(size_t(width) * sizeof(float), guarded);
  const auto attend = [&](const Kernels& by, int64_t from, int64_t some, const Exact& out) {
    const Exact scores(size_t(some * score_room(n)) * sizeof(float), guarded);
    by.attend(q.as<bf16>() + from * width, some, keys.as<bf16>(), values.as<bf16>(), n, width, scaling, scores.as<float>(), sums.as<float>(), out.as<bf16>() + from * width);
  };
  attend(k, 0, heads, found);
  attend(portable_kernels(), 0, heads, expected);
  for (int64_t h = 0; h < heads; ++h) attend(k, h, 1, single);
  if (std::memcmp(found.as<bf16>(), single.as<bf16>(), size) != 0) fail("a head by itself", k, round);
  for (int64_t i = 0; i < heads * width; ++i)
    if (!(std::abs(to_float(found.as<bf16>()[i]) - to_float(expected.as<bf16>()[i])) < 0.02f)) fail("attention", k, round);
}

void one_round(int64_t round, const std::vector<const Kernels*>& kernels) {
  const ValueType type = ValueType(pick(0, kTypes - 1));
  const bool guarded = pick(0, 1), corrupt = pick(0, 2) > 0;
  const int64_t group = row_of(type).columns, bytes = 2 * group, strips = pick(1, 3), words = pick(0, 3) > 0 ? pick(1, 40) : pick(1, 200);
  const Exact mask(size_t(strips * words * bytes), guarded);
  const int64_t density = pick(0, 8);  // eighths; 0 and 8 are words without and with every weight
  std::vector<int64_t> offsets(size_t(strips + 1));
  for (int64_t s = 0, n = 0; s < strips; ++s) {
    for (int64_t i = s * words * bytes; i < (s + 1) * words * bytes; ++i) {
      uint8_t byte = 0;
      for (int64_t bit = 0; bit < 8; ++bit) byte = uint8_t(byte | (pick(0, 7) < density) << bit);
      mask.as<uint8_t>()[i] = byte;
      n += __builtin_popcount(byte);
    }
    offsets[size_t(s + 1)] = n;
  }
  int64_t count = offsets.back();
  if (corrupt) {  // fewer values than bits, random bytes, random offsets
    if (pick(0, 1)) count = pick(0, count);
    for (int64_t flips = pick(0, 4); flips > 0; --flips) mask.as<uint8_t>()[pick(0, strips * words * bytes - 1)] = uint8_t(pick(0, 255));
    for (int64_t& o : offsets) o = pick(0, 1) ? pick(0, count) : std::min(o, count);
  }
  count += -count & (row_of(type).shared() - 1);  // as the operator counts them
  const int64_t stored = count * row_of(type).bits / 8, blocks = Inputs::blocks(words * group);
  const Exact values(size_t(stored), guarded), groups(size_t(strips * blocks * kStrip), guarded);
  for (int64_t i = 0; i < stored; ++i) values.as<uint8_t>()[i] = uint8_t(pick(0, 255));
  for (int64_t i = 0; i < count && type == ValueType::kBFloat16; ++i) values.as<bf16>()[i] = to_bf16(float(pick(-128, 127)));
  for (int64_t i = 0; i < strips * blocks * kStrip; ++i) groups.as<uint8_t>()[i] = uint8_t(pick(0xe0, 0xff));  // 0.5 to 1.94: sums stay exact
  const std::vector<float> scale(size_t(strips * kStrip), 1.0f);
  const Packed p{type, strips * kStrip, words * group, words, mask.as<uint8_t>(), values.as<void>(), count, offsets.data(),
                 row_of(type).scaled ? scale.data() : nullptr, row_of(type).grouped ? groups.as<uint8_t>() : nullptr};

  for (const Kernels* k : kernels) {
    round_sums(round, *k);
    attend_to_cache(round, *k, guarded);
    multiply_rows(round, *k, guarded);
    const bool rounds = k->bytes && pick(0, 1);
    const Inputs inputs(*k, type, pick(1, rounds ? kByteTokens : k->stream_tokens(type)), words, group, rounds ? 1 : pick(2, 3) + 1 - k->digit_bytes, guarded);
    const size_t room = size_t(kStrips * inputs.in.tokens * kStrip);
    for (int64_t s = 0; s < strips; ++s) {
      const Exact found(room * sizeof(float), guarded), expected(room * sizeof(float), guarded);
      const int64_t together = pick(1, std::min(kStrips, strips - s));
      const bool found_ok = k->stream(p, inputs.in, s, together, found.as<float>());
      const bool expected_ok = portable_kernels().stream(p, inputs.in, s, together, expected.as<float>());
      if (found_ok != expected_ok || (!corrupt && !found_ok)) fail("the verdict", *k, round);
      for (size_t i = 0; i < size_t(together * inputs.in.tokens * kStrip); ++i)
        if (found.as<float>()[i] != expected.as<float>()[i]) fail("a sum", *k, round);

      Cursor cursor{p.offsets[s], true}, expected_cursor = cursor;
      const int64_t pairs = words * group / 2;
      for (int64_t first = 0; first < pairs; first += kTilePairs) {
        const int64_t n = std::min(kTilePairs, pairs - first);
        const size_t size = size_t(n * kWordBits16) * sizeof(bf16);
        const Exact tile(size, guarded), expected_tile(size, guarded);
        k->decode(p, cursor, s, first, n, tile.as<bf16>());
        portable_kernels().decode(p, expected_cursor, s, first, n, expected_tile.as<bf16>());
        if (std::memcmp(tile.as<bf16>(), expected_tile.as<bf16>(), size) != 0) fail("a tile", *k, round);
        if (cursor.value != expected_cursor.value || cursor.ok != expected_cursor.ok) fail("the cursor", *k, round);
        const int64_t half = n / 2;  // two tiles of different numbers
        if (half > 0) multiply_tiles(round, *k, tile.as<bf16>(), tile.as<bf16>() + half * kWordBits16, half, guarded);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atol(argv[1]) : 1000;
  const auto kernels = kernels_here();
  for (int64_t round = 0; round < rounds; ++round) {
    randomness.seed(uint32_t(round));
    one_round(round, kernels);
  }
  std::printf("%ld rounds:", long(rounds));
  for (const Kernels* k : kernels) std::printf(" %s", k->name);
  std::puts("");
}
