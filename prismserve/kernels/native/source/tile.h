// The one inner loop of every product here: ROWS x 16 results, each a chain of fused multiply-adds over k in order.
//
// A result is the same whatever it is computed beside, since nothing about it but the number of its neighbours changes.
#pragma once

#include <type_traits>

#include "simd.h"

namespace prismserve {

constexpr int TILE_ROWS = 6;  // 12 accumulators, 2 vectors of the panel, 1 or 2 broadcasts: 16 registers

// A panel row of 16 columns: float32 in order, bfloat16 in pairs (column i in the low half, i + 8 in the high half).
inline void panel_row(const float* from, Floats& low, Floats& high) {
    low = load(from);
    high = load(from + LANES);
}

inline void panel_row(const uint16_t* from, Floats& low, Floats& high) {
    Words words = *reinterpret_cast<const Words*>(from);
    Words first = words << 16;
    Words second = words & 0xffff0000u;
    low = reinterpret_cast<Floats&>(first);
    high = reinterpret_cast<Floats&>(second);
}

// Where column c of a panel row lies.
template <typename T>
inline int64_t place(int64_t column) {
    return sizeof(T) == sizeof(float) ? column : 2 * (column % LANES) + column / LANES;
}

// acc[r] += sum over k, in order, of a[r][k] * panel[k], for PANELS panels side by side.
//
// a: element (r, k) at a[r * row_stride + k * step]; panel p begins at panels + p * panel_stride, its rows are
// row_width elements apart. With FETCH, what lies `ahead` bytes behind each panel row is brought into the cache.
template <int ROWS, int PANELS, bool FETCH, typename T>
__attribute__((noinline)) void multiply(const float* a, int64_t row_stride, int64_t step, const T* panels,
                                        int64_t panel_stride, int64_t row_width, int64_t depth, int64_t ahead,
                                        Floats (&acc)[ROWS][2 * PANELS]) {
    Floats sums[ROWS][2 * PANELS];
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < 2 * PANELS; ++c) sums[r][c] = acc[r][c];
    for (int64_t k = 0; k < depth; ++k) {
        Floats columns[2 * PANELS];
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
            const T* row = panels + p * panel_stride + k * row_width;
            if (FETCH) __builtin_prefetch(reinterpret_cast<const char*>(row) + ahead);
            panel_row(row, columns[2 * p], columns[2 * p + 1]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            Floats factor = splat(a[r * row_stride + k * step]);
#pragma GCC unroll 8
            for (int c = 0; c < 2 * PANELS; ++c) sums[r][c] += factor * columns[c];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < 2 * PANELS; ++c) acc[r][c] = sums[r][c];
}

// Calls visit<ROWS>() with a constant for a number of rows from 1 to TILE_ROWS.
template <typename Visit>
inline void with_rows(int rows, Visit visit) {
    switch (rows) {
        case 1: visit(std::integral_constant<int, 1>{}); break;
        case 2: visit(std::integral_constant<int, 2>{}); break;
        case 3: visit(std::integral_constant<int, 3>{}); break;
        case 4: visit(std::integral_constant<int, 4>{}); break;
        case 5: visit(std::integral_constant<int, 5>{}); break;
        default: visit(std::integral_constant<int, 6>{}); break;
    }
}

}  // namespace prismserve
