// Tiles in the registers of a warp, in the layout in which the matrix units leave a product and take a left operand:
// lane l holds, of rows l / 4 and l / 4 + 8, the columns 2 (l % 4) and the next of every eight.
#pragma once

#include "kittens/instructions.cuh"

namespace kittens {

// fp32: of every eight columns four values, two of the first row and two of the second.
template <int rows_, int cols_>
struct rt_fl {
    static constexpr int rows = rows_;
    static constexpr int cols = cols_;
    static_assert(rows == 16, "a warp holds 16 rows");
    float data[cols / 2];
};

// 16-bit elements in pairs: of every sixteen columns four words, in the order of a left operand.
template <typename T, int rows_, int cols_>
struct rt {
    static constexpr int rows = rows_;
    static constexpr int cols = cols_;
    static_assert(rows == 16, "a warp holds 16 rows");
    uint32_t data[cols / 4];
};

// A value for each row of a register tile: a lane holds those of its two rows.
struct col_vec {
    float data[2];
    __device__ __forceinline__ float& operator[](int i) { return data[i]; }
    __device__ __forceinline__ const float& operator[](int i) const { return data[i]; }
};

// Which of a lane's two rows a value of an fp32 tile belongs to.
__device__ __forceinline__ constexpr int row_of(int index) { return index / 2 % 2; }

template <typename RT>
__device__ __forceinline__ void zero(RT& tile) {
#pragma unroll
    for (float& x : tile.data) x = 0.0f;
}

template <typename T, int cols>
__device__ __forceinline__ void copy(rt<T, 16, cols>& destination, const rt_fl<16, cols>& source) {
#pragma unroll
    for (int i = 0; i < cols / 4; ++i) destination.data[i] = pack<T>(source.data[2 * i], source.data[2 * i + 1]);
}

// The largest value of each row; NaN does not count.
template <int cols>
__device__ __forceinline__ void row_max(col_vec& destination, const rt_fl<16, cols>& source) {
    destination = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < cols / 2; ++i) destination[row_of(i)] = fmaxf(destination[row_of(i)], source.data[i]);
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
#pragma unroll
        for (float& x : destination.data) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
    }
}

// Sums of a lane's own columns become those of the rows.
__device__ __forceinline__ void sum_over_lanes(col_vec& vec) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
#pragma unroll
        for (float& x : vec.data) x += __shfl_xor_sync(kAllLanes, x, lanes);
    }
}

template <int cols>
__device__ __forceinline__ void mul_row(rt_fl<16, cols>& tile, const col_vec& vec) {
#pragma unroll
    for (int i = 0; i < cols / 2; ++i) tile.data[i] *= vec[row_of(i)];
}

// 2 ^ (scale x - shift of the row), and the sums of a lane's own columns before they are rounded.
template <typename T, int cols>
__device__ __forceinline__ void exp2_scaled(rt<T, 16, cols>& destination, col_vec& sums, const rt_fl<16, cols>& source,
                                            float scale, const col_vec& shift) {
    // Two partial sums of each row, so that an addition does not wait for the one before.
    col_vec chains[2] = {};
#pragma unroll
    for (int i = 0; i < cols / 2; i += 2) {
        const int row = row_of(i);
        float y[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            y[j] = kittens::exp2(fmaf(source.data[i + j], scale, -shift[row]));
            chains[j][row] += y[j];
        }
        destination.data[i / 2] = pack<T>(y[0], y[1]);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) sums[row] = chains[0][row] + chains[1][row];
}

// 2 ^ (scale x - shift of the row), in place.
template <int cols>
__device__ __forceinline__ void exp2_scaled(rt_fl<16, cols>& tile, float scale, const col_vec& shift) {
#pragma unroll
    for (int i = 0; i < cols / 2; ++i) tile.data[i] = kittens::exp2(fmaf(tile.data[i], scale, -shift[row_of(i)]));
}

// Of 32 columns a lane holds two of every eight. The four lanes of a row exchange them, so that each has eight consecutive
// columns to store at once; and the other way round.
__device__ __forceinline__ uint4 exchange_columns(const uint32_t (&words)[4]) {
    const bool is_odd = laneid() & 1, is_upper = laneid() & 2;
    uint32_t half[2][2];  // two times eight columns, from the lower and from the upper two lanes
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, is_upper ? words[i] : words[2 + i], 2);
        half[i][0] = is_upper ? other : words[i];
        half[i][1] = is_upper ? words[2 + i] : other;
    }
    uint32_t own[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, is_odd ? half[0][i] : half[1][i], 1);
        own[2 * i] = is_odd ? other : half[0][i];
        own[2 * i + 1] = is_odd ? half[1][i] : other;
    }
    return {own[0], own[1], own[2], own[3]};
}

// Stores a lane's two rows to memory, each if it is there: addresses are multiples of 16 bytes.
template <typename T, int cols>
__device__ __forceinline__ void store_rows(T* const (&destination)[2], const bool (&is_there)[2],
                                           const rt<T, 16, cols>& source) {
#pragma unroll
    for (int first = 0; first < cols; first += 32) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const uint32_t* words = source.data + first / 4 + row;
            const uint4 columns = exchange_columns({words[0], words[2], words[4], words[6]});
            if (is_there[row]) reinterpret_cast<uint4*>(destination[row])[first / 8 + laneid() % 4] = columns;
        }
    }
}

// Loads a lane's two rows from memory, zeros for one that is not there: addresses are multiples of 16 bytes.
template <typename T, int cols>
__device__ __forceinline__ void load_rows(rt<T, 16, cols>& destination, const T* const (&source)[2],
                                          const bool (&is_there)[2]) {
    // All loads before any of them is waited for.
    uint4 columns[cols / 32][2];
#pragma unroll
    for (int i = 0; i < cols / 32; ++i) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            columns[i][row] = {};
            if (is_there[row]) columns[i][row] = reinterpret_cast<const uint4*>(source[row])[i * 4 + laneid() % 4];
        }
    }
#pragma unroll
    for (int i = 0; i < cols / 32; ++i) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const uint4& own = columns[i][row];
            const uint4 words = exchange_columns({own.x, own.y, own.z, own.w});
            uint32_t* to = destination.data + i * 8 + row;
            to[0] = words.x, to[2] = words.y, to[4] = words.z, to[6] = words.w;
        }
    }
}

}  // namespace kittens
