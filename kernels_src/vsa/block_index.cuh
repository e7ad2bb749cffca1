// Which columns each row of blocks names. In the forward, rows are query blocks and columns the key blocks that each of them
// selects. A pass that keeps keys in place and streams queries takes the rows of the inverse map. Both kinds of index have the
// same functions.
#pragma once

#include "kittens/types.cuh"

// The columns of each row as a padded table.
struct IndexTable {
    const int* idx;  // [rows, width]
    const int* num;  // [rows], how many entries of the row count
    int width;
    int num_rows, num_cols;  // of a head

    __device__ __forceinline__ const int* row(int64_t index) const { return idx + index * width; }
    __device__ __forceinline__ int length(int64_t index) const { return max(0, min(num[index], width)); }
    // At least the length, known without reading memory where that is possible.
    __device__ __forceinline__ int capacity(int64_t) const { return width; }
};

// The columns of each row as compressed sparse rows: what the inverse of a map is.
struct IndexCsr {
    const int* idx;          // [entries]
    const int64_t* offsets;  // [rows + 1], where the entries of each row begin
    int num_rows, num_cols;  // of a head

    __device__ __forceinline__ const int* row(int64_t index) const { return idx + offsets[index]; }
    __device__ __forceinline__ int length(int64_t index) const { return static_cast<int>(offsets[index + 1] - offsets[index]); }
    __device__ __forceinline__ int capacity(int64_t index) const { return length(index); }
};
