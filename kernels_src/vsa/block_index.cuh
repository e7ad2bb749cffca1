// Which columns each row of blocks names. In the forward, rows are query blocks and columns the key blocks that each of them
// selects. A pass that keeps keys in place and streams queries takes the inverse of that map. Both kinds of index have a row
// for each block of a head; heads are counted over all batches.
#pragma once

#include "kittens/types.cuh"

// The columns of each row as a padded table.
struct IndexTable {
    const int* idx;  // [heads, num_rows, width]
    const int* num;  // [heads, num_rows], how many entries of the row count
    int width;
    int num_rows, num_cols;  // of a head

    __device__ __forceinline__ const int* row(int head, int row) const {
        return idx + (int64_t(head) * num_rows + row) * width;
    }
    __device__ __forceinline__ int length(int head, int row) const {
        return max(0, min(num[int64_t(head) * num_rows + row], width));
    }
    // Heads of columns that the rows of one head name.
    __device__ __forceinline__ int col_heads() const { return 1; }
};

// The columns of each row as bits: the inverse of a table. The rows of one head, of keys, name columns of several heads, those
// of the queries that share it, one head after the other.
struct IndexBits {
    const uint32_t* bits;  // [heads of columns, num_words, num_rows], bit i of word w for column 32 w + i
    const int* order;      // [heads of rows, num_rows], the rows from the longest to the shortest
    int num_words;
    int num_rows, num_cols;  // of a head
    int group;               // heads of columns for each head of rows

    __device__ __forceinline__ uint32_t word(int col_head, int row, int index) const {
        return index < num_words ? bits[(int64_t(col_head) * num_words + index) * num_rows + row] : 0;
    }
    __device__ __forceinline__ int col_heads() const { return group; }
};

// Rows of nearly the same length count as equal where they are sorted: exponent and upper three bits of the mantissa.
__device__ __forceinline__ int length_class_of(int length) { return __float_as_int(float(length)) >> 20; }
