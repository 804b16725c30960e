// The AMX intrinsics of csrc/amx.cpp in plain C++, after the operation sections of Intel's instruction set reference: registers
// have the configured rows and bytes per row, everything past them is zero, and a wrong shape ends the program as it would fault.
// Include before amx.cpp, which then runs on any x86-64.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulator {

struct Register {
  int rows = 0;
  int row_bytes = 0;
  uint8_t data[16][64] = {};
};
struct State {
  bool configured = false;
  Register registers[8];
};
inline State state;

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX would fault: %s\n", what);
  std::exit(2);
}

inline Register& used(int i) {
  Register& r = state.registers[i];
  require(state.configured, "no configuration is loaded");
  require(r.rows > 0, "a register without rows is used");
  return r;
}

// 64 bytes: palette, first row, 14 reserved, 16 x two bytes of row length, 16 x one byte of rows.
inline void load_config(const void* memory) {
  const uint8_t* c = static_cast<const uint8_t*>(memory);
  require(c[0] == 1, "the palette is not 1");  // palette 0 is legal but leaves no register to use
  for (int i = 1; i < 16; ++i) require(c[i] == 0, "a first row or a reserved byte of the configuration is not 0");
  state = State{true, {}};
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, c + 16 + 2 * i, 2);
    const int rows = c[48 + i];
    require(i < 8 || (rows == 0 && row_bytes == 0), "palette 1 has eight registers");
    require(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0), "the shape of a register");
    if (i < 8) {
      state.registers[i].rows = rows;
      state.registers[i].row_bytes = row_bytes;
    }
  }
}

inline void release() { state = State{}; }

inline void load(int i, const void* base, ptrdiff_t stride) {
  Register& r = used(i);
  std::memset(r.data, 0, sizeof r.data);
  for (int row = 0; row < r.rows; ++row) std::memcpy(r.data[row], static_cast<const char*>(base) + row * stride, size_t(r.row_bytes));
}

inline void store(int i, void* base, ptrdiff_t stride) {
  const Register& r = used(i);
  for (int row = 0; row < r.rows; ++row) std::memcpy(static_cast<char*>(base) + row * stride, r.data[row], size_t(r.row_bytes));
}

inline float number(const uint8_t* bf16) {
  uint16_t upper;
  std::memcpy(&upper, bf16, 2);
  const uint32_t bits = uint32_t(upper) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// sum [m, n] += a [m, k pairs] times b [k, n pairs]. Even and odd products are summed apart, then added to the sum. (The
// instruction also takes subnormal numbers for zero, which the tests do not use.)
inline void multiply(int sum, int a, int b) {
  Register& s = used(sum);
  const Register &r_a = used(a), &r_b = used(b);
  require(sum != a && sum != b && a != b, "a register is used twice");
  require(s.row_bytes % 4 == 0 && r_a.row_bytes % 4 == 0 && r_b.row_bytes % 4 == 0, "rows of whole pairs");
  require(s.rows == r_a.rows && s.row_bytes == r_b.row_bytes && r_a.row_bytes / 4 == r_b.rows, "the shapes of a product");
  for (int m = 0; m < s.rows; ++m)
    for (int n = 0; n < s.row_bytes / 4; ++n) {
      float even = 0, odd = 0, total;
      for (int k = 0; k < r_b.rows; ++k) {
        even += number(r_a.data[m] + 4 * k) * number(r_b.data[k] + 4 * n);
        odd += number(r_a.data[m] + 4 * k + 2) * number(r_b.data[k] + 4 * n + 2);
      }
      std::memcpy(&total, s.data[m] + 4 * n, 4);
      total += even + odd;
      std::memcpy(s.data[m] + 4 * n, &total, 4);
    }
}

inline void zero(int i) {
  Register& r = used(i);
  std::memset(r.data, 0, sizeof r.data);
}

// The same of signed bytes, four to a lane, summed in 32 bits.
inline void multiply_bytes(int sum, int a, int b) {
  Register& s = used(sum);
  const Register &r_a = used(a), &r_b = used(b);
  require(sum != a && sum != b && a != b, "a register is used twice");
  require(s.rows == r_a.rows && s.row_bytes == r_b.row_bytes && r_a.row_bytes / 4 == r_b.rows, "the shapes of a product");
  for (int m = 0; m < s.rows; ++m)
    for (int n = 0; n < s.row_bytes / 4; ++n) {
      int32_t total;
      std::memcpy(&total, s.data[m] + 4 * n, 4);
      for (int k = 0; k < 4 * r_b.rows; ++k) total += int8_t(r_a.data[m][k]) * int8_t(r_b.data[k / 4][4 * n + k % 4]);
      std::memcpy(s.data[m] + 4 * n, &total, 4);
    }
}

}  // namespace amx_emulator

// Compilers define some of these as functions and some as macros; a macro wins over both once the header has been read.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_zero
#undef _tile_dpbssd
#define _tile_loadconfig(config) amx_emulator::load_config(config)
#define _tile_release() amx_emulator::release()
#define _tile_loadd(i, base, stride) amx_emulator::load(i, base, stride)
#define _tile_stored(i, base, stride) amx_emulator::store(i, base, stride)
#define _tile_dpbf16ps(sum, a, b) amx_emulator::multiply(sum, a, b)
#define _tile_zero(i) amx_emulator::zero(i)
#define _tile_dpbssd(sum, a, b) amx_emulator::multiply_bytes(sum, a, b)
