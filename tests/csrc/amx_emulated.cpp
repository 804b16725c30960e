// csrc/amx.cpp on an emulated matrix unit, against the portable kernels. Prints the largest relative error, fails if it is large.
#if defined(__x86_64__)
#include "amx_emulator.h"

#include "../../csrc/amx.cpp"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

using namespace losa;

int main() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<bf16>& numbers) {
    for (bf16& v : numbers) v = to_bf16(normal(random));
  };
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
