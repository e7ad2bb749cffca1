// Tiles in shared memory as TMA writes them with its 128-byte swizzle, and as the matrix units read them.
#pragma once

#include "kittens/types.cuh"

namespace kittens {

constexpr int kSwizzleBytes = 128;
// Eight rows of 128 bytes, in which the swizzle moves words of 16 bytes: word w of row r lies at w ^ (r % 8).
constexpr int kSwizzleAtomBytes = 8 * kSwizzleBytes;

// The columns lie in panels of 128 bytes, one panel after the other, each with all rows.
template <typename T, int rows_, int cols_>
struct alignas(kSwizzleAtomBytes) st {
    static constexpr int rows = rows_;
    static constexpr int cols = cols_;
    static constexpr int panel_cols = kSwizzleBytes / sizeof(T);
    static constexpr int panels = cols / panel_cols;
    static constexpr int panel_bytes = rows * kSwizzleBytes;
    static constexpr int bytes = rows * cols * sizeof(T);
    static_assert(cols % panel_cols == 0 && rows % 8 == 0);

    T data[rows * cols];

    // Where rows from a multiple of eight on lie, in one panel.
    __device__ __forceinline__ T* panel(int index, int row = 0) { return data + (index * rows + row) * panel_cols; }
};

// Address of 8 elements, of a row and of columns from a multiple of 8 on.
template <typename ST>
__device__ __forceinline__ uint32_t address_of(const ST& tile, int row, int col) {
    const int panel = col / ST::panel_cols, word = col % ST::panel_cols / 8;
    return shared_address(&tile) + panel * ST::panel_bytes + row * kSwizzleBytes + ((word ^ (row % 8)) * 16);
}

}  // namespace kittens
