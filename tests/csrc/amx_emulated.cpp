// csrc/amx.cpp on an emulated matrix unit, against the portable kernels. Prints the largest relative error, fails if it is large.
#if defined(__x86_64__)
#include "amx_emulator.h"

#include "../../csrc/amx.cpp"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

using namespace losa;

// Weights and activations of small integers, whose sums are exact in any order: equal to the portable kernels to the bit.
bool streams(std::mt19937& random, ValueType type, int64_t tokens, int64_t words, int64_t digits) {
  const int64_t blocks = (words + kBlock - 1) / kBlock, columns = 4 * words;
  std::vector<uint8_t> mask(size_t(8 * words)), groups(size_t(blocks * kStrip));
  for (uint8_t& byte : mask) byte = uint8_t(random());
  for (uint8_t& byte : groups) byte = uint8_t(0xe0 + random() % 32);
  int64_t offsets[2] = {0, 0};
  for (uint8_t byte : mask) offsets[1] += __builtin_popcount(byte);
  std::vector<uint8_t> values(size_t(offsets[1]), 0);  // more than codes need
  for (uint8_t& byte : values) byte = uint8_t(random());
  const std::vector<float> scale(kStrip, 1.0f), unit(size_t(tokens), 1.0f);
  const Packed p{type, kStrip, columns, words, mask.data(), values.data(), offsets[1], offsets, scale.data(), row_of(type).grouped ? groups.data() : nullptr};
  std::vector<bf16> pairs(size_t(columns * tokens));
  std::vector<int8_t> bytes(size_t(blocks * digits * tokens * kGroup));
  std::vector<int32_t> sums(size_t(blocks * digits * tokens));
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t t = 0; t < tokens; ++t) {
      const int x = int(random() % 17) - 8;
      pairs[size_t((c / 2 * tokens + t) * 2 + c % 2)] = to_bf16(float(x));
      const int64_t place = c / kGroup * digits * tokens + t;
      bytes[size_t(place * kGroup + c % kGroup)] = int8_t(x);
      sums[size_t(place)] += x;
    }
  const Activations in{tokens, pairs.data(), digits, bytes.data(), sums.data(), unit.data(), nullptr};
  std::vector<float> found(size_t(kStrips * tokens * kStrip)), expected(found);
  const bool ok = amx_kernels().stream(p, in, 0, 1, found.data()) && portable_kernels().stream(p, in, 0, 1, expected.data());
  return ok && found == expected && !amx_emulator::state.configured;
}

int main() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<bf16>& numbers) {
    for (bf16& v : numbers) v = to_bf16(normal(random));
  };
  for (auto type = ValueType::kInt8; int64_t(type) < kTypes; type = ValueType(int64_t(type) + 1))
    for (const int64_t tokens : {5, 8, 15, 16})
      for (const int64_t words : {1, 15, 16, 17, 63, 64, 65, 200})
        for (const int64_t digits : {2, 3})
          if (!streams(random, type, tokens, words, digits)) {
            std::printf("type %ld, tokens %ld, words %ld, digits %ld: other sums\n", long(type), long(tokens), long(words), long(digits));
            return 1;
          }
  const int64_t row = 2 * kTilePairs;
  const bf16 nan = 0x7fc0;
  double worst = 0;
  for (const int64_t pairs : {1, 2, 15, 16, 17, 31, 32, 64, 100, 127, 128})
    for (const int64_t tokens : {1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 100, 128})
      for (const bool accumulate : {false, true}) {
        // Sizes are exact, so that a sanitizer sees a read past them. Tiles hold the pairs and no more; x is zero past them.
        std::vector<bf16> tile_0(size_t(pairs * kWordBits16)), tile_1(tile_0), x(size_t(tokens * row));
        fill(tile_0);
        fill(tile_1);
        fill(x);
        for (int64_t t = 0; t < tokens; ++t) std::fill(x.begin() + t * row + 2 * pairs, x.begin() + (t + 1) * row, bf16(0));
        // What is overwritten may be anything; what is accumulated is a sum of earlier products.
        std::vector<float> expected(size_t(tokens * 2 * kStrip), std::numeric_limits<float>::quiet_NaN());
        if (accumulate)
          for (float& v : expected) v = normal(random);
        std::vector<float> found = expected;
        portable_kernels().multiply(tile_0.data(), tile_1.data(), pairs, x.data(), tokens, accumulate, expected.data());
        // Whatever was on the stack must not matter: run once more with tiles of NaN before.
        std::vector<bf16> poison(size_t(15 * kWordBits16), nan);
        std::vector<float> poisoned(2 * kStrip);
        amx_kernels().multiply(poison.data(), poison.data(), 15, x.data(), 1, false, poisoned.data());
        amx_kernels().multiply(tile_0.data(), tile_1.data(), pairs, x.data(), tokens, accumulate, found.data());
        if (amx_emulator::state.configured) {
          std::puts("the tile state was not released");
          return 1;
        }
        for (size_t i = 0; i < expected.size(); ++i) {
          const double error = std::fabs(double(found[i]) - expected[i]) / std::sqrt(double(2 * pairs));  // sums of that many products
          if (!(error <= 1e-5)) {
            std::printf("pairs %ld, tokens %ld, accumulate %d: sum %zu is %g, expected %g\n", long(pairs), long(tokens), int(accumulate), i,
                        double(found[i]), double(expected[i]));
            return 1;
          }
          worst = std::fmax(worst, error);
        }
      }
  std::printf("largest error, relative to the size of the sums: %.2g\n", worst);
}
#else
int main() {}
#endif
