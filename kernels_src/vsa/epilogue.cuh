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

// Whether the gate has 16-bit elements, whose rows can be read 16 bytes at a time.
__device__ __forceinline__ bool has_gate_vectors(const CoarseOutput& coarse) {
    const auto& strides = coarse.gate_strides;
    const int64_t bytes = (strides[0] | strides[1] | strides[2]) * 2 | reinterpret_cast<int64_t>(coarse.gate);
    return !coarse.gate_is_fp32 && strides[3] == 1 && bytes % 16 == 0;
}

// Adds the coarse output of the query block to a lane's valid rows, times `weights(i)` for the i-th value and the next.
template <int head_dim, typename Weights>
__device__ __forceinline__ void add_weighted(const float* out_c, const OutputRows& rows, kittens::rt_fl<16, head_dim>& out,
                                             Weights weights) {
    out_c += kittens::laneid() % 4 * 2;
#pragma unroll
    for (int i = 0; i < head_dim / 2; i += 2) {
        const float2 pair = *reinterpret_cast<const float2*>(out_c + i / 4 * 8);
        if (!rows.valid[kittens::row_of(i)]) continue;
        const float2 weight = weights(i);
        out.data[i] += weight.x * pair.x;
        out.data[i + 1] += weight.y * pair.y;
    }
}

// Adds the coarse output of the query block to its valid rows.
template <typename T, int head_dim>
__device__ __forceinline__ void add_coarse_output(const CoarseOutput& coarse, int num_q_blocks, const OutputRows& rows,
                                                  kittens::rt_fl<16, head_dim>& out) {
    const float* out_c = coarse.out_c + (rows.bh * num_q_blocks + rows.block) * head_dim;
    if (coarse.gate == nullptr) {
        add_weighted(out_c, rows, out, [&](int) -> float2 { return {coarse.gate_value, coarse.gate_value}; });
        return;
    }
    const auto& strides = coarse.gate_strides;
    const auto row_of_gate = [&](const auto* data, int row) {
        return data + rows.batch * strides[0] + rows.head * strides[1] + rows.token[row] * strides[2];
    };
    if (has_gate_vectors(coarse)) {
        const T* data = static_cast<const T*>(coarse.gate);
        kittens::rt<T, 16, head_dim> gate;
        load_rows(gate, {row_of_gate(data, 0), row_of_gate(data, 1)}, rows.valid);
        add_weighted(out_c, rows, out, [&](int i) { return kittens::unpack<T>(gate.data[i / 2]); });
        return;
    }
    const auto add_one_by_one = [&](const auto* data) {
        data += kittens::laneid() % 4 * 2 * strides[3];
        add_weighted(out_c, rows, out, [&](int i) -> float2 {
            const auto* pair = row_of_gate(data, kittens::row_of(i)) + i / 4 * 8 * strides[3];
            return {to_float(pair), to_float(pair + strides[3])};
        });
    };
    if (coarse.gate_is_fp32) {
        add_one_by_one(static_cast<const float*>(coarse.gate));
    } else {
        add_one_by_one(static_cast<const T*>(coarse.gate));
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
