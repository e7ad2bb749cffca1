// The online softmax of the rows of a warp.
#pragma once

#include "kittens/register_tile.cuh"

// What a row's sums are relative to: a reference, its largest score at some time, that no score has outgrown by much since.
struct Softmax {
    // How far, as a power of two, a score may outgrow the reference. Rounding at most doubles it: probabilities stay far below
    // what 16-bit elements hold.
    static constexpr float kSlack = 4.0f;

    float scale_log2;
    kittens::col_vec shift = {0.0f, 0.0f};                                  // the reference, scaled
    kittens::col_vec limit = {-kittens::infinity(), -kittens::infinity()};  // of scores; -inf: there is no reference yet
    kittens::col_vec sum = {0.0f, 0.0f};                                    // of a lane's own columns

    // Whether a score of the warp is beyond the limit of its row: rarely, after the first tiles. Gives the largest.
    template <int cols>
    __device__ __forceinline__ bool is_outgrown(const kittens::rt_fl<16, cols>& scores, kittens::col_vec& largest) const {
        kittens::row_max_of_lane(largest, scores, limit);
        return __any_sync(kittens::kAllLanes, largest[0] > limit[0] || largest[1] > limit[1]);
    }

    // Takes the largest scores as references where they are beyond the limit. What was summed so far is to be multiplied by
    // what is returned.
    __device__ __forceinline__ kittens::col_vec raise(kittens::col_vec largest) {
        kittens::max_over_lanes(largest);
        kittens::col_vec correction = {1.0f, 1.0f};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (!(largest[i] > limit[i])) continue;
            const float raised = largest[i] * scale_log2;
            if (limit[i] != -kittens::infinity()) correction[i] = kittens::exp2(shift[i] - raised);
            shift[i] = raised;
            limit[i] = largest[i] + kSlack / scale_log2;
            sum[i] *= correction[i];
        }
        return correction;
    }

    // Scores become probabilities relative to the reference.
    template <int cols>
    __device__ __forceinline__ void exponentiate(kittens::rt_fl<16, cols>& scores) {
        kittens::exp2_scaled(scores, scale_log2, shift);
        kittens::add_row_sum_of_lane(sum, scores);
    }
};
