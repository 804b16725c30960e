// Compile the functions between LOSA_TARGET_BEGIN("...") and LOSA_TARGET_END for more than the baseline instruction
// set.
//
// Only those functions: a file-wide -mavx512f would also compile the inline functions of every header for it, and the
// linker may keep that copy for callers on older machines. Include every header before LOSA_TARGET_BEGIN, but feed.h
// and block.h after it: no other file sees what those have.
#pragma once

#define LOSA_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define LOSA_TARGET_BEGIN(isa) LOSA_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LOSA_TARGET_END _Pragma("clang attribute pop")
#else
#define LOSA_TARGET_BEGIN(isa) _Pragma("GCC push_options") LOSA_PRAGMA(GCC target(isa))
#define LOSA_TARGET_END _Pragma("GCC pop_options")
#endif

// Of an `inline` function, and of a lambda before its body.
#define LOSA_ALWAYS __attribute__((always_inline))
