// The online softmax of the rows of a warp.
#pragma once

#include "kittens/register_tile.cuh"

// What a row's sums are relative to: its largest score, or an older one that no score has outgrown by much since.
struct Softmax {
    // How far, as a power of two, a score may outgrow it. Probabilities then stay far below what 16-bit elements hold.
    static constexpr float kSlack = 8.0f;

    kittens::col_vec reference = {-kittens::infinity(), -kittens::infinity()};
    kittens::col_vec sum = {0.0f, 0.0f};  // of a lane's own columns

    __device__ __forceinline__ float shift(int row, float scale_log2) const {
        return reference[row] == -kittens::infinity() ? 0.0f : reference[row] * scale_log2;
    }

    // Scores become probabilities relative to the reference. Returns whether the output so far has to be multiplied by
    // `correction`: rarely, after the first tiles.
    template <int cols>
    __device__ __forceinline__ bool operator()(kittens::rt_fl<16, cols>& scores, kittens::col_vec& correction, float scale_log2) {
        kittens::col_vec largest;
        kittens::row_max_of_lane(largest, scores, reference);
        // Also where a row has no reference yet.
        bool grew = false;
#pragma unroll
        for (int i = 0; i < 2; ++i) grew = grew || !((largest[i] - reference[i]) * scale_log2 <= kSlack);
        grew = __any_sync(kittens::kAllLanes, grew);
        if (grew) {
            kittens::max_over_lanes(largest);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float grown = (reference[i] - largest[i]) * scale_log2;
                correction[i] = largest[i] > reference[i] ? kittens::exp2(grown) : 1.0f;
                sum[i] *= correction[i];
            }
            reference = largest;
        }
        kittens::exp2_scaled(scores, scale_log2, {shift(0, scale_log2), shift(1, scale_log2)});
        kittens::add_row_sum_of_lane(sum, scores);
        return grew;
    }
};
