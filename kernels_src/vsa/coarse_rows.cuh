// What warps do with rows of scores: a warp takes a row into its registers, or several warps share a long one.
#pragma once

#include "vsa/coarse.cuh"

// Vectors of columns that a warp takes at most: each lane has one word of bits of them. More would fit into its registers,
// but compile for longer.
constexpr int kWarpVectors = 8;
constexpr int kWarpCols = kWarpVectors * kVectorCols;
static_assert(kWarpCols * kProductWarps >= kMaxCoarseCols);

// What the warps that share a row tell each other.
struct TeamSlots {
    uint32_t values[2][kProductWarps];
};

// The warps that share a row: as many as it takes at kWarpCols each, rounded up to a power of two.
struct Team {
    uint32_t* slots;
    int warps = 1, number, rank;
    int first_vector, num_vectors;  // of the columns that this warp takes
    int turn = 0;

    __device__ __forceinline__ Team(TeamSlots& all_slots, const RowTile& tile) {
        while (warps * kWarpCols < tile.cols()) warps *= 2;
        number = kittens::warpid() / warps;
        rank = kittens::warpid() % warps;
        slots = all_slots.values[0] + number * warps;
        const int of_each = (tile.vectors() + warps - 1) / warps;
        first_vector = rank * of_each;
        num_vectors = kittens::uniform(max(0, min(of_each, tile.vectors() - first_vector)));
    }

    __device__ __forceinline__ int first_row() const { return number; }
    __device__ __forceinline__ int row_step() const { return kProductWarps / warps; }

    // The part of a row that a lane has, from its first column on.
    template <typename T>
    __device__ __forceinline__ T* of_lane(T* row) const {
        return row + first_vector * kVectorCols + kittens::laneid();
    }

    __device__ __forceinline__ int sum(int value) {
        value = __reduce_add_sync(kittens::kAllLanes, value);
        return warps == 1 ? value : __reduce_add_sync(kittens::kAllLanes, of_warps(value, 0, warps));
    }
    __device__ __forceinline__ uint32_t least(uint32_t value) {
        value = __reduce_min_sync(kittens::kAllLanes, value);
        return warps == 1 ? value : __reduce_min_sync(kittens::kAllLanes, of_warps(value, ~0u, warps));
    }
    __device__ __forceinline__ uint32_t most(uint32_t value) {
        value = __reduce_max_sync(kittens::kAllLanes, value);
        return warps == 1 ? value : __reduce_max_sync(kittens::kAllLanes, of_warps(value, 0, warps));
    }
    // Of the warps before this one; `value` is one of a warp.
    __device__ __forceinline__ int before(int value) {
        return warps == 1 ? 0 : __reduce_add_sync(kittens::kAllLanes, of_warps(value, 0, rank));
    }
    __device__ __forceinline__ float sum(float value) {
        value = over_lanes(value);
        return warps == 1 ? value : over_lanes(__uint_as_float(of_warps(__float_as_uint(value), 0, warps)));
    }

  private:
    __device__ __forceinline__ static float over_lanes(float value) {
#pragma unroll
        for (int step = 1; step < kittens::kWarpThreads; step *= 2) {
            value += __shfl_xor_sync(kittens::kAllLanes, value, step);
        }
        return value;
    }
    // The values of the warps up to the `end`th, a lane each.
    __device__ __forceinline__ uint32_t of_warps(uint32_t value, uint32_t none, int end) {
        // Two buffers in turn: who writes one has met those who read it.
        uint32_t* values = slots + turn * kProductWarps;
        turn ^= 1;
        if (kittens::laneid() == 0) values[rank] = value;
        kittens::meet_warps(1 + number, warps);
        return kittens::laneid() < end ? values[kittens::laneid()] : none;
    }
};

// Scores as unsigned numbers of the same order, in which -0 equals 0, a NaN is the highest, and none is 0.
__device__ __forceinline__ uint32_t key_of(float score) {
    // An addition makes -0 to 0, and all NaNs to one.
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits ^ (uint32_t(int(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float score_of(uint32_t key) {
    return __uint_as_float(key ^ (~uint32_t(int(key) >> 31) | 0x80000000u));
}

// The part of a row that a warp has.
template <typename T>
struct RowPart {
    // Zeros at first: where loads depend on a condition, registers would keep what they had in the row before.
    T values[kWarpVectors][kLaneCols] = {};

    // Calls f with each vector of the part and its number.
    template <typename F>
    __device__ __forceinline__ void for_vectors(const Team& team, const F& f) {
#pragma unroll
        for (int i = 0; i < kWarpVectors; ++i) {
            if (i >= team.num_vectors) break;
            f(values[i], i);
        }
    }
    template <typename F>
    __device__ __forceinline__ void for_each(const Team& team, const F& f) {
        for_vectors(team, [&](T(&vector)[kLaneCols], int) {
#pragma unroll
            for (T& value : vector) f(value);
        });
    }
    __device__ __forceinline__ void load(const Team& team, const T* of_lane) {
        for_vectors(team, [&](T(&vector)[kLaneCols], int i) {
#pragma unroll
            for (int j = 0; j < kLaneCols; ++j) vector[j] = of_lane[i * kVectorCols + j * kittens::kWarpThreads];
        });
    }
    __device__ __forceinline__ void store(const Team& team, T* of_lane) {
        for_vectors(team, [&](T(&vector)[kLaneCols], int i) {
#pragma unroll
            for (int j = 0; j < kLaneCols; ++j) of_lane[i * kVectorCols + j * kittens::kWarpThreads] = vector[j];
        });
    }
};

// Which columns count; where all do, not every one is looked at.
struct ColumnFilter {
    const ColumnBits& eligible;
    bool all_count;

    // Calls f with the number of each column of a vector that does not count.
    template <typename F>
    __device__ __forceinline__ void leave_out(const Team& team, int vector, const F& f) const {
        // The last vector may go beyond the columns.
        if (all_count && vector < team.num_vectors - 1) return;
#pragma unroll
        for (int j = 0; j < kLaneCols; ++j) {
            if (!eligible.has(team.first_vector + vector, j)) f(j);
        }
    }
};

// The softmax of a row of scores times a factor. All warps of a team call this.
struct RowSoftmax : RowPart<float> {
    __device__ __forceinline__ RowSoftmax(const CoarseProblem& problem, const ColumnFilter& filter, Team& team,
                                          const float* of_lane) {
        constexpr float kLog2e = 1.4426950408889634f;
        // Scores that were rounded have been scaled before.
        const float factor = (problem.rounding == int(Rounding::kNone) ? problem.scale : 1.0f) * kLog2e;
        load(team, of_lane);
        float most = -kittens::infinity(), sum = 0.0f;
        for_vectors(team, [&](float (&vector)[kLaneCols], int i) {
#pragma unroll
            for (float& value : vector) value *= factor;
            filter.leave_out(team, i, [&](int j) { vector[j] = -kittens::infinity(); });
#pragma unroll
            for (float value : vector) most = max(most, value);
        });
        most = score_of(team.most(key_of(most)));
        for_each(team, [&](float& value) {
            value = kittens::exp2(value - most);
            sum += value;
        });
        const float share = kittens::reciprocal(team.sum(sum));
        for_each(team, [&](float& value) { value *= share; });
        if (problem.rounding == int(Rounding::kNone)) return;
        for_each(team, [&](float& value) { value = rounded(value, problem.rounding); });
    }
};
