// Which columns each row of blocks names. In the forward, rows are query blocks and columns the key blocks that each of them
// selects. A pass that keeps keys in place and streams queries takes the inverse of that map. Both kinds of index have a row
// for each block of a head; heads are counted over all batches.
#pragma once

#include "kittens/types.cuh"

// The columns of each row as a padded table. Where the tokens are segments, a number -c stands for c consecutive columns from
// the first entry on.
struct IndexTable {
    const int* idx;  // [heads, num_rows, width]
    const int* num;  // [heads, num_rows], how many entries of the row count
    int width;
    int num_rows, num_cols;  // of a head
#if VSA_SEGMENTS
    const int* order;    // [num_rows], the order in which the rows of every head are taken
    const int* columns;  // [num_cols + 1], all columns, and at the end one that does not exist

    __device__ __forceinline__ int ordered(int row) const { return order[row]; }
    __device__ __forceinline__ const int* row(int head, int row) const {
        const int count = num[number_of(head, row)];
        if (count >= 0 || width == 0) return at(head, row);
        const int first = *at(head, row);
        return columns + (is_run(first, count) ? first : num_cols);
    }
    __device__ __forceinline__ int length(int head, int row) const {
        const int count = num[number_of(head, row)];
        if (count >= 0 || width == 0) return max(0, min(count, width));
        return is_run(*at(head, row), count) ? -count : 1;
    }
    __device__ __forceinline__ bool is_run(int first, int count) const { return first >= 0 && first <= num_cols + count; }
#else
    __device__ __forceinline__ int ordered(int row) const { return row; }
    __device__ __forceinline__ const int* row(int head, int row) const { return at(head, row); }
    __device__ __forceinline__ int length(int head, int row) const { return max(0, min(num[number_of(head, row)], width)); }
#endif
    __device__ __forceinline__ const int* at(int head, int row) const { return idx + number_of(head, row) * uint32_t(width); }
    // Of a row among those of all heads. Without a sign, for which the scheduler has no register.
    __device__ __forceinline__ uint64_t number_of(int head, int row) const {
        return uint64_t(uint32_t(head)) * uint32_t(num_rows) + uint32_t(row);
    }
    // Heads of columns that the rows of one head name.
    __device__ __forceinline__ int col_heads() const { return 1; }
    static constexpr bool kHasRowPhases = false;
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
        if (index >= num_words) return 0;
        return bits[(uint64_t(uint32_t(col_head)) * uint32_t(num_words) + uint32_t(index)) * uint32_t(num_rows) +
                    uint32_t(row)];
    }
    __device__ __forceinline__ int col_heads() const { return group; }
    static constexpr bool kHasRowPhases = true;
};

// Rows of nearly the same length count as equal where they are sorted: exponent and upper three bits of the mantissa.
__device__ __forceinline__ int length_class_of(int length) { return __float_as_int(float(length)) >> 20; }
