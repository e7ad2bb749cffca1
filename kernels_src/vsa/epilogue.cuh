// From a warpgroup's registers to the output: where its rows go, the coarse output, and the stores.
#pragma once

#include "kittens/warpgroup.cuh"
#include "vsa/scheduler.cuh"

// Where the 64 rows of a consumer's box belong. A lane has two of them.
struct OutputRows {
    int batch, head, block;
    int64_t bh;
    int token[2];
    bool exists[2];  // the token is inside the sequence
    bool valid[2];

    template <int kConsumers>
    __device__ __forceinline__ OutputRows(const TokenLayout& layout, int heads, const WorkTile<kConsumers>& work, int consumer)
        : OutputRows(layout, heads, work.batch, work.row_head, work.group.block[consumer], work.group.box[consumer],
                     work.origin[consumer], 0) {}

    // `moved`: by how many rows the tokens of the box are moved.
    __device__ __forceinline__ OutputRows(const TokenLayout& layout, int heads, int batch, int head, int block, int box,
                                          const BoxOrigin& origin, int moved)
        : batch(batch), head(head), block(block), bh(int64_t(batch) * heads + head) {
        const BoxTokens tokens(layout, block, box, origin);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = (kittens::warpgroup::warpid() * 16 + kittens::laneid() / 4 + 8 * i - moved) & (kBoxTokens - 1);
            const Token of_row = tokens(layout, row);
            token[i] = of_row.number;
            exists[i] = of_row.exists;
            valid[i] = of_row.valid;
        }
    }
};

// The coarse output and its weight, one row for each query block.
struct CoarseOutput {
    const float* out_c;  // [batch, heads, num_q_blocks, head_dim], or null
    const void* gate;    // like q, of its dtype or fp32; or null
    int64_t gate_strides[4];
    float gate_value;  // where gate is null
    int gate_is_fp32;
};

__device__ __forceinline__ float to_float(const float* x) { return *x; }
template <typename T>
__device__ __forceinline__ float to_float(const T* x) {
    return kittens::unpack<T>(*reinterpret_cast<const uint16_t*>(x)).x;
}

template <typename T>
__device__ __forceinline__ float load_gate(const CoarseOutput& coarse, int64_t offset) {
    if (coarse.gate_is_fp32) return to_float(static_cast<const float*>(coarse.gate) + offset);
    return to_float(static_cast<const T*>(coarse.gate) + offset);
}

// Adds `weight(row, channel)` times the coarse output of the query block to its valid rows.
template <int head_dim, typename Weight>
__device__ __forceinline__ void add_weighted(const float* out_c, const OutputRows& rows, kittens::rt_fl<16, head_dim>& out,
                                             Weight weight) {
#pragma unroll
    for (int i = 0; i < head_dim / 2; i += 2) {
        const int row = kittens::row_of(i), channel = i / 4 * 8 + kittens::laneid() % 4 * 2;
        if (!rows.valid[row]) continue;
        const float2 pair = *reinterpret_cast<const float2*>(out_c + channel);
        out.data[i] += weight(row, channel) * pair.x;
        out.data[i + 1] += weight(row, channel + 1) * pair.y;
    }
}

// The same with a gate of type G for weights.
template <typename G, int head_dim>
__device__ __forceinline__ void add_gated(const CoarseOutput& coarse, const float* out_c, const OutputRows& rows,
                                          kittens::rt_fl<16, head_dim>& out) {
    const auto& strides = coarse.gate_strides;
    const G* gate[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        gate[i] =
            static_cast<const G*>(coarse.gate) + rows.batch * strides[0] + rows.head * strides[1] + rows.token[i] * strides[2];
    }
    add_weighted(out_c, rows, out, [&](int row, int channel) { return to_float(gate[row] + channel * strides[3]); });
}

// Adds the coarse output of the query block to its valid rows.
template <typename T, int head_dim>
__device__ __forceinline__ void add_coarse_output(const CoarseOutput& coarse, int num_q_blocks, const OutputRows& rows,
                                                  kittens::rt_fl<16, head_dim>& out) {
    const float* out_c = coarse.out_c + (rows.bh * num_q_blocks + rows.block) * head_dim;
    if (coarse.gate == nullptr) {
        add_weighted(out_c, rows, out, [&](int, int) { return coarse.gate_value; });
    } else if (coarse.gate_is_fp32) {
        add_gated<float>(coarse, out_c, rows, out);
    } else {
        add_gated<T>(coarse, out_c, rows, out);
    }
}

// Stores the rows that exist, rounded to the output's dtype. `strides` are those of batches, heads and tokens.
template <typename T, int head_dim>
__device__ __forceinline__ void store_output(T* out, const int64_t (&strides)[3], const OutputRows& rows,
                                             const kittens::rt_fl<16, head_dim>& values) {
    T* row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        row[i] = out + rows.batch * strides[0] + rows.head * strides[1] + rows.token[i] * strides[2];
    }
    kittens::rt<T, 16, head_dim> rounded;
    copy(rounded, values);
    store_rows(row, rows.exists, rounded);
}
