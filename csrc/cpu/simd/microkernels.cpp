// SPDX-License-Identifier: Apache-2.0
// The vector loops of the CPU backend, compiled once an instruction set: DSA_CPU_ISA names it
// (baseline, avx2, avx512) and the compiler flags set what the vectors below become.
//
// Register tiles, in rows x vectors of fp32 accumulators; beside them one row of B and one
// broadcast of A:
//   AVX-512  12 x 2 of 16 lanes  (27 of 32 registers)
//   AVX2      6 x 2 of  8 lanes  (15 of 16)
//   SSE       4 x 2 of  4 lanes  (11 of 16; a product needs a register, there is no FMA)
//   NEON      8 x 2 of  4 lanes  (19 of 32)
// gemm walks k in blocks of kBlockK: one column panel of B (kBlockK x 2 vectors) then stays in L1
// while the row tiles pass over it. The last, partial panel is copied to the stack and padded with
// zeros, so that every column runs the same instructions: a column's bits depend neither on n nor
// on its place. An element is summed in the order p = 0 .. k-1 (gemm: in blocks of kBlockK, each
// then added to c), whatever tile it falls into.
// Memory: a panel (kBlockK x 2 vectors, at most 24 KiB) on the stack; nothing is allocated.
//
// One object leaves this file. Anything else is internal, and no header with inline functions is
// included: the linker may keep one copy of an inline function, and an AVX-512 copy would then run
// on every machine.
#include "cpu/simd/microkernels.h"

#include <cstdint>

#if !defined(DSA_CPU_ISA)
#error "DSA_CPU_ISA names the instruction set that this file is compiled for"
#endif

#define DSA_CONCAT_(a, b) a##b
#define DSA_CONCAT(a, b) DSA_CONCAT_(a, b)
#define DSA_STRING_(a) #a
#define DSA_STRING(a) DSA_STRING_(a)

#if defined(__clang__)
#define DSA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define DSA_UNROLL _Pragma("GCC unroll 16")
#endif
#define DSA_INLINE inline __attribute__((always_inline))

namespace dsa::cpu {

extern const MicroKernels DSA_CONCAT(kMicroKernels_, DSA_CPU_ISA);

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 8;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kTileVectors = 2;
constexpr int kPanel = kTileVectors * kLanes;  // columns of a full tile
constexpr int kBlockK = 192;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t IntVec __attribute__((vector_size(kVectorBytes)));
typedef std::uint8_t ByteVec __attribute__((vector_size(kLanes)));
typedef std::uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

// ---- vectors ------------------------------------------------------------------------------------

template <typename V, typename T>
DSA_INLINE V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

DSA_INLINE void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof(v)); }

DSA_INLINE Vec broadcast(float x) { return x - Vec{}; }
DSA_INLINE IntVec broadcast(std::int32_t x) { return x - IntVec{}; }

DSA_INLINE Vec as_float(IntVec v) { return reinterpret_cast<Vec>(v); }
DSA_INLINE IntVec as_int(Vec v) { return reinterpret_cast<IntVec>(v); }

DSA_INLINE IntVec to_int(HalfVec v) { return __builtin_convertvector(v, IntVec); }
// In two steps: GCC 12 takes the direct conversion apart into scalars.
DSA_INLINE IntVec to_int(ByteVec v) { return to_int(__builtin_convertvector(v, HalfVec)); }

DSA_INLINE int min(int a, int b) { return a < b ? a : b; }

// Calls body(j, lanes) over [0, n): lanes is kLanes but for the last call.
template <typename Body>
DSA_INLINE void for_vectors(std::int64_t n, Body body) {
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j, kLanes);
  if (j < n) body(j, static_cast<int>(n - j));
}

template <typename V, typename T>
DSA_INLINE V load_part(const T* from, int lanes) {
  if (lanes == kLanes) return load<V>(from);
  T padded[kLanes] = {};
  for (int i = 0; i < lanes; ++i) padded[i] = from[i];
  return load<V>(padded);
}

DSA_INLINE void store_part(float* to, Vec v, int lanes) {
  if (lanes == kLanes) return store(to, v);
  float padded[kLanes];
  store(padded, v);
  for (int i = 0; i < lanes; ++i) to[i] = padded[i];
}

// ---- matrix tiles -------------------------------------------------------------------------------

template <int R, int V>
using Tile = Vec[R][V];

template <int R, int V>
DSA_INLINE void clear(Tile<R, V>& acc) {
  DSA_UNROLL
  for (int i = 0; i < R; ++i) {
    DSA_UNROLL
    for (int v = 0; v < V; ++v) acc[i][v] = Vec{};
  }
}

// acc[i] += sum_p a[i, p] * b[p], p < k.
template <int R, int V>
DSA_INLINE void multiply_add(int k, const float* a, std::int64_t lda, const float* b,
                             std::int64_t ldb, Tile<R, V>& acc) {
  for (int p = 0; p < k; ++p, ++a, b += ldb) {
    Vec row[V];
    DSA_UNROLL
    for (int v = 0; v < V; ++v) row[v] = load<Vec>(b + v * kLanes);
    DSA_UNROLL
    for (int i = 0; i < R; ++i) {
      const float x = a[i * lda];
      DSA_UNROLL
      for (int v = 0; v < V; ++v) acc[i][v] += x * row[v];
    }
  }
}

// A block of rows of B by a panel of its columns, in place or, if partial, as a padded copy.
struct Panel {
  const float* data;
  std::int64_t stride;
};

DSA_INLINE int panel_vectors(int cols) { return cols > kLanes ? kTileVectors : 1; }

// `copy` has room for k x panel_vectors(cols) vectors.
DSA_INLINE Panel make_panel(int k, int cols, const float* b, std::int64_t ldb, float* copy) {
  const int width = panel_vectors(cols) * kLanes;
  if (cols == width) return {b, ldb};
  for (int p = 0; p < k; ++p) {
    for (int j = 0; j < cols; ++j) copy[p * width + j] = b[p * ldb + j];
    for (int j = cols; j < width; ++j) copy[p * width + j] = 0.0f;
  }
  return {copy, width};
}

// Rows a tile, so that the tiles of m rows are even: 64 make 5 x 11 + 9 rather than 5 x 12 + 4.
DSA_INLINE int even_tile_rows(int m) {
  const int tiles = (m + kTileRows - 1) / kTileRows;
  return (m + tiles - 1) / tiles;
}

// Calls Op::run<rows, V>(...), rows known to the compiler.
template <typename Op, int V, int R = kTileRows, typename... Args>
DSA_INLINE void run_rows(int rows, Args... args) {
  if (rows == R) {
    Op::template run<R, V>(args...);
  } else if constexpr (R > 1) {
    run_rows<Op, V, R - 1>(rows, args...);
  }
}

template <typename Op, typename... Args>
DSA_INLINE void run_tile(int rows, int vectors, Args... args) {
  if (vectors == 1) {
    run_rows<Op, 1>(rows, args...);
  } else {
    run_rows<Op, kTileVectors>(rows, args...);
  }
}

// ---- gemm ---------------------------------------------------------------------------------------

struct GemmTile {
  template <int R, int V>
  __attribute__((noinline)) static void run(int k, const float* a, std::int64_t lda, Panel b,
                                            float* c, std::int64_t ldc, int cols, bool accumulate) {
    Tile<R, V> acc;
    clear<R, V>(acc);
    // c comes in while the products run, rather than before them.
    if (accumulate) {
      DSA_UNROLL
      for (int i = 0; i < R; ++i) __builtin_prefetch(c + i * ldc, 1);
      DSA_UNROLL
      for (int i = 0; i < R; ++i) __builtin_prefetch(c + i * ldc + cols - 1, 1);
    }
    multiply_add<R, V>(k, a, lda, b.data, b.stride, acc);
    for_tile<R, V>(cols, [&](int i, int v, int lanes) __attribute__((always_inline)) {
      float* to = c + i * ldc + v * kLanes;
      store_part(to, accumulate ? load_part<Vec>(to, lanes) + acc[i][v] : acc[i][v], lanes);
    });
  }

  template <int R, int V, typename Body>
  DSA_INLINE static void for_tile(int cols, Body body) {
    DSA_UNROLL
    for (int i = 0; i < R; ++i) {
      DSA_UNROLL
      for (int v = 0; v < V; ++v) body(i, v, min(cols - v * kLanes, kLanes));
    }
  }
};

void gemm(int m, int n, int k, const float* a, std::int64_t lda, const float* b, std::int64_t ldb,
          float* c, std::int64_t ldc, bool accumulate) {
  if (m <= 0 || n <= 0) return;
  alignas(kVectorBytes) float copy[kBlockK * kPanel];
  const int tile_rows = even_tile_rows(m);
  // Entered for k = 0 too, which clears c.
  for (int p = 0; p == 0 || p < k; p += kBlockK) {
    const int depth = min(k - p, kBlockK);
    for (int j = 0; j < n; j += kPanel) {
      const int cols = min(n - j, kPanel);
      const Panel panel = make_panel(depth, cols, b + p * ldb + j, ldb, copy);
      for (int i = 0; i < m; i += tile_rows) {
        run_tile<GemmTile>(min(m - i, tile_rows), panel_vectors(cols), depth, a + i * lda + p, lda,
                           panel, c + i * ldc + j, ldc, cols, accumulate || p > 0);
      }
    }
  }
}

// ---- relu_weighted_sum --------------------------------------------------------------------------

struct ReluSumTile {
  // sum[v] += sum_i weights[i] * relu(a[i] . b), i < R.
  template <int R, int V>
  __attribute__((noinline)) static void run(int k, const float* a, std::int64_t lda, const float* b,
                                            std::int64_t ldb, int cols, const float* weights,
                                            float* sum) {
    Tile<R, V> acc;
    clear<R, V>(acc);
    if (cols == V * kLanes) {
      multiply_add<R, V>(k, a, lda, b, ldb, acc);
    } else {
      alignas(kVectorBytes) float copy[kBlockK * V * kLanes];
      for (int p = 0; p < k; p += kBlockK) {
        const int depth = min(k - p, kBlockK);
        const Panel panel = make_panel(depth, cols, b + p * ldb, ldb, copy);
        multiply_add<R, V>(depth, a + p, lda, panel.data, panel.stride, acc);
      }
    }
    DSA_UNROLL
    for (int v = 0; v < V; ++v) {
      Vec total = load<Vec>(sum + v * kLanes);
      DSA_UNROLL
      for (int i = 0; i < R; ++i) {
        // Written so that a NaN stays.
        const Vec relu = acc[i][v] < 0.0f ? Vec{} : acc[i][v];
        total += weights[i] * relu;
      }
      store(sum + v * kLanes, total);
    }
  }
};

void relu_weighted_sum(int m, int n, int k, const float* a, std::int64_t lda, const float* b,
                       std::int64_t ldb, const float* weights, float* out) {
  const int tile_rows = m > 0 ? even_tile_rows(m) : 1;
  for (int j = 0; j < n; j += kPanel) {
    const int cols = min(n - j, kPanel);
    alignas(kVectorBytes) float sum[kPanel] = {};
    for (int i = 0; i < m; i += tile_rows) {
      run_tile<ReluSumTile>(min(m - i, tile_rows), panel_vectors(cols), k, a + i * lda, lda, b + j,
                            ldb, cols, weights + i, sum);
    }
    for (int v = 0; v * kLanes < cols; ++v) {
      store_part(out + j + v * kLanes, load<Vec>(sum + v * kLanes), min(cols - v * kLanes, kLanes));
    }
  }
}

// ---- element-wise loops -------------------------------------------------------------------------

// 2^t: t = n + f, |f| <= 1/2, a polynomial for 2^f (relative error 2e-9 before rounding) and n
// added to the exponent. Below 2^-126 gives 0, above 2^128 inf; NaN stays.
DSA_INLINE Vec exp2(Vec t) {
  constexpr float kRoundToInt = 0x1.8p23f;  // adding it leaves round(t) in the low mantissa bits
  Vec x = t < -127.0f ? broadcast(-127.0f) : t;
  x = x > 128.0f ? broadcast(128.0f) : x;
  const Vec shifted = x + kRoundToInt;
  const IntVec n = as_int(shifted) - as_int(broadcast(kRoundToInt));
  const Vec f = x - (shifted - kRoundToInt);
  Vec y = 0.00015353362f * f + 0.0013398874f;
  y = y * f + 0.009618437f;
  y = y * f + 0.055503324f;
  y = y * f + 0.24022648f;
  y = y * f + 0.6931472f;
  y = y * f + 1.0f;
  y = as_float(as_int(y) + (n << 23));
  y = t < -126.0f ? Vec{} : y;
  return t != t ? t : y;
}

float exp2_minus_max(int n, float max, float* x) {
  Vec sums = {};
  for_vectors(n, [&](std::int64_t j, int lanes) __attribute__((always_inline)) {
    const Vec y = exp2(load_part<Vec>(x + j, lanes) - max);
    store_part(x + j, y, lanes);
    // Lanes past the end hold 2^(0 - max): they must not count.
    sums += lanes == kLanes ? y : load_part<Vec>(x + j, lanes);
  });
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

void scale(std::int64_t n, float factor, float* y) {
  for_vectors(n, [&](std::int64_t j, int lanes) __attribute__((always_inline)) {
    store_part(y + j, load_part<Vec>(y + j, lanes) * factor, lanes);
  });
}

// A narrow float (its sign at bit 31, the rest of it from bit 0 of `magnitude`, mantissa already in
// place) to fp32. `bias` is the difference of the exponent biases. A subnormal m is (min_normal +
// m) - min_normal: no subnormal fp32 is formed, so flush-to-zero modes change nothing.
DSA_INLINE Vec widen(IntVec magnitude, std::int32_t bias, std::int32_t min_normal_code) {
  const Vec normal = as_float(magnitude + (bias << 23));
  const std::int32_t min_normal = (bias + 1) << 23;
  const Vec subnormal = as_float(magnitude + min_normal) - as_float(broadcast(min_normal));
  return magnitude < min_normal_code ? subnormal : normal;
}

DSA_INLINE Vec with_sign(Vec magnitude, IntVec sign) { return as_float(as_int(magnitude) | sign); }

void e4m3_to_f32(std::int64_t n, const std::uint8_t* src, float factor, float* dst) {
  const IntVec kNaN = broadcast(std::int32_t{0x7FC00000});
  for_vectors(n, [&](std::int64_t j, int lanes) __attribute__((always_inline)) {
    const IntVec code = to_int(load_part<ByteVec>(src + j, lanes));
    const IntVec magnitude = (code & 0x7F) << 20;
    const Vec finite = widen(magnitude, 127 - 7, 1 << 23);
    const Vec value = magnitude == (0x7F << 20) ? as_float(kNaN) : finite;
    store_part(dst + j, with_sign(value, (code & 0x80) << 24) * factor, lanes);
  });
}

void bf16_to_f32(std::int64_t n, const std::uint16_t* src, float* dst) {
  for_vectors(n, [&](std::int64_t j, int lanes) __attribute__((always_inline)) {
    const IntVec code = to_int(load_part<HalfVec>(src + j, lanes));
    store_part(dst + j, as_float(code << 16), lanes);
  });
}

void f16_to_f32(std::int64_t n, const std::uint16_t* src, float* dst) {
  constexpr std::int32_t kBias = 127 - 15;
  for_vectors(n, [&](std::int64_t j, int lanes) __attribute__((always_inline)) {
    const IntVec code = to_int(load_part<HalfVec>(src + j, lanes));
    const IntVec magnitude = (code & 0x7FFF) << 13;
    const Vec finite = widen(magnitude, kBias, 1 << 23);
    // An all-ones exponent (inf, NaN) moves up by the bias once more.
    const Vec special = as_float(magnitude + ((2 * kBias) << 23));
    const Vec value = magnitude >= (31 << 23) ? special : finite;
    store_part(dst + j, with_sign(value, (code & 0x8000) << 16), lanes);
  });
}

}  // namespace

const MicroKernels DSA_CONCAT(kMicroKernels_, DSA_CPU_ISA) = {
    DSA_STRING(DSA_CPU_ISA),
    relu_weighted_sum,
    gemm,
    exp2_minus_max,
    scale,
    e4m3_to_f32,
    bf16_to_f32,
    f16_to_f32,
};

}  // namespace dsa::cpu
