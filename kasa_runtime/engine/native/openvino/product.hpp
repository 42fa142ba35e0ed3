// Products of rows with a dense weight W (out, in), float32.
//
// W is packed: panels of 32 outputs, each (in, 32), the last one filled with zeros. A panel is read
// from first to last, which is what memory does best; while the rows of a step use it, the next one is
// fetched. Every output is one sum in the order of the inputs, so a row's result does not depend on
// how many others there are.

#pragma once

#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace kasa {

using Vec = float __attribute__((vector_size(64), aligned(4)));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec v) { *reinterpret_cast<Vec*>(to) = v; }

// Into the second cache and all below it.
inline void prefetch(const float* from) { __builtin_prefetch(from, 0, 2); }
inline void prefetch_first(const float* from) { __builtin_prefetch(from, 0, 3); }

// To an address that is a multiple of 64, of what nobody reads soon: memory is not read before.
#ifdef __AVX512F__
inline void store_past_cache(float* to, Vec v) { _mm512_stream_ps(to, (__m512)v); }
inline void end_stores_past_cache() { _mm_sfence(); }
#else
inline void store_past_cache(float* to, Vec v) { store(to, v); }
inline void end_stores_past_cache() {}
#endif

constexpr int64_t kPanel = 32;
// A tile: rows whose sums stay in registers, which are no wider than these. Compilers spill wider ones.
#ifdef __AVX512F__
constexpr int kTile = 12, kLanes = 16;
#else
constexpr int kTile = 2, kLanes = 8;
#endif
using Lanes = float __attribute__((vector_size(4 * kLanes), aligned(4)));
constexpr int kParts = kPanel / kLanes;
constexpr int64_t kChunk = 120;  // rows that one pass over the panels serves: they stay in the second cache
constexpr int64_t kAhead = 64 * kPanel;  // how far a panel that is used once is fetched ahead
constexpr int64_t kNear = 8 * kPanel;  // and one from the second cache into the first

inline int64_t num_panels(int64_t out) { return (out + kPanel - 1) / kPanel; }

// y[:, :width] = x times one panel. Meanwhile memory from `ahead` on is fetched, `stride` floats a step.
template <int kRows>
void multiply_tile(const float* x, int64_t in, const float* panel, float* y, int64_t out, int64_t width,
                   const float* ahead, int64_t stride) {
    Lanes sums[kRows][kParts] = {};
    for (int64_t k = 0; k < in; ++k) {
        prefetch(ahead + k * stride);
        prefetch(ahead + k * stride + 16);
        prefetch_first(panel + k * kPanel + kNear);
        prefetch_first(panel + k * kPanel + kNear + 16);
        Lanes w[kParts];
        for (int j = 0; j < kParts; ++j) w[j] = *reinterpret_cast<const Lanes*>(panel + k * kPanel + j * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < kParts; ++j) sums[r][j] += x[r * in + k] * w[j];
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        if (width == kPanel) {
            for (int j = 0; j < kParts; ++j) *reinterpret_cast<Lanes*>(y + r * out + j * kLanes) = sums[r][j];
        } else {
            for (int i = 0; i < width; ++i) y[r * out + i] = sums[r][i / kLanes][i % kLanes];
        }
    }
}

template <int kRows, typename... Arguments>
void multiply_rows(int64_t num_rows, Arguments... arguments) {
    if (num_rows == kRows) return multiply_tile<kRows>(arguments...);
    if constexpr (kRows > 1) multiply_rows<kRows - 1>(num_rows, arguments...);
}

// The outputs of panels first to last of y (num_rows, out) = x (num_rows, in) W^T.
inline void multiply(const float* x, int64_t num_rows, int64_t in, const float* packed, int64_t out, float* y,
                     int64_t first, int64_t last) {
    const int64_t num_tiles = (num_rows + kTile - 1) / kTile;
    for (int64_t p = first; p < last; ++p) {
        const float* panel = packed + p * in * kPanel;
        const int64_t width = out - p * kPanel < kPanel ? out - p * kPanel : kPanel;
        for (int64_t i = 0; i < num_tiles; ++i) {
            const int64_t row = num_rows * i / num_tiles, end = num_rows * (i + 1) / num_tiles;
            const float* ahead = panel + kAhead;
            if (num_tiles > 1) ahead = panel + in * kPanel * (num_tiles + i) / num_tiles;
            multiply_rows<kTile>(end - row, x + row * in, in, panel, y + row * out + p * kPanel, out, width,
                                 ahead, kPanel / num_tiles);
        }
    }
}

}  // namespace kasa
