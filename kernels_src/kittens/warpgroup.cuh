// What a warpgroup of four warps does together: matrix products whose result is in registers, 16 rows a warp, whose left
// operand is in registers or in shared memory, and whose right operand is a tile in shared memory; and tiles between registers
// and shared memory.
#pragma once

#include "kittens/register_tile.cuh"
#include "kittens/shared_tile.cuh"

namespace kittens {
namespace warpgroup {

__device__ __forceinline__ uint32_t laneid() { return threadIdx.x % kWarpgroupThreads; }
__device__ __forceinline__ uint32_t warpid() { return laneid() / kWarpThreads; }

template <int registers>
__device__ __forceinline__ void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// Keeps the compiler from moving what writes or reads a tile's registers across this point.
template <int cols>
__device__ __forceinline__ void fence_operand(rt_fl<16, cols>& tile) {
#pragma unroll
    for (int i = 0; i < cols / 2; ++i) asm volatile("" : "+f"(tile.data[i])::"memory");
}
template <typename T, int cols>
__device__ __forceinline__ void fence_operand(rt<T, 16, cols>& tile) {
#pragma unroll
    for (int i = 0; i < cols / 4; ++i) asm volatile("" : "+r"(tile.data[i])::"memory");
}

// Before products that take tiles which other instructions wrote.
template <typename... Tiles>
__device__ __forceinline__ void mma_fence(Tiles&... tiles) {
    (fence_operand(tiles), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void mma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most so many groups of products are pending: these tiles can then be read, or written, again.
template <int pending, typename... Tiles>
__device__ __forceinline__ void mma_async_wait(Tiles&... tiles) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
    (fence_operand(tiles), ...);
}

// Addresses in matrix descriptors count in words of 16 bytes.
constexpr int kDescriptorBytes = 16;

// The matrix descriptor of PTX for one tile of a ring, with 128-byte swizzle. Only its address depends on the index, and is
// added last, so that the rest is computed once.
template <typename ST>
__device__ __forceinline__ uint64_t descriptor(const ST* tiles, int index, int leading_bytes, int stride_bytes) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    return (kSwizzle128 | uint64_t(stride_bytes / kDescriptorBytes) << 32 | uint64_t(leading_bytes / kDescriptorBytes) << 16 |
            shared_address(tiles) / kDescriptorBytes) +
           uint32_t(index) * (ST::bytes / kDescriptorBytes);
}

// One wgmma instruction, d = a b or d += a b with 16 columns of a; the operands' numbers have to be spelt out. Where nothing is
// added, d is an output only: the compiler then keeps no older value of its registers alive.
#define KITTENS_D4(MODE, i) MODE "f"(d[i]), MODE "f"(d[i + 1]), MODE "f"(d[i + 2]), MODE "f"(d[i + 3])
#define KITTENS_D16(MODE, i) KITTENS_D4(MODE, i), KITTENS_D4(MODE, i + 4), KITTENS_D4(MODE, i + 8), KITTENS_D4(MODE, i + 12)
#define KITTENS_D32(MODE, i) KITTENS_D16(MODE, i), KITTENS_D16(MODE, i + 16)
#define KITTENS_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KITTENS_NAMES_64 \
    KITTENS_NAMES_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KITTENS_WGMMA(N, TYPE, ADD, NAMES) \
    "{\n .reg .pred add;\n setp.ne.b32 add, " ADD ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, "
#define KITTENS_WGMMA_64(TYPE, MODE, ADD) \
    asm volatile(KITTENS_WGMMA("64", TYPE, ADD, KITTENS_NAMES_32) "{%32, %33, %34, %35}, %36, add, 1, 1, %37;\n}" \
                 : KITTENS_D32(MODE, 0) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(transposed))
#define KITTENS_WGMMA_128(TYPE, MODE, ADD) \
    asm volatile(KITTENS_WGMMA("128", TYPE, ADD, KITTENS_NAMES_64) "{%64, %65, %66, %67}, %68, add, 1, 1, %69;\n}" \
                 : KITTENS_D32(MODE, 0), KITTENS_D32(MODE, 32) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(transposed))
#define KITTENS_WGMMA_SHARED_64(TYPE, ADD) \
    asm volatile(KITTENS_WGMMA("64", TYPE, ADD, KITTENS_NAMES_32) "%32, %33, add, 1, 1, %34, %35;\n}" \
                 : KITTENS_D32("+", 0) \
                 : "l"(a), "l"(b), "n"(a_transposed), "n"(transposed))

template <typename T, int N, int transposed, bool add>
__device__ __forceinline__ void mma_step(float (&d)[N / 2], const uint32_t* a, uint64_t b) {
    constexpr bool kIsBf16 = is_same<T, bf16>;
    static_assert((kIsBf16 || is_same<T, half>) && (N == 64 || (N == 128 && add)));
    if constexpr (N == 64 && kIsBf16 && add) KITTENS_WGMMA_64("bf16", "+", "1");
    if constexpr (N == 64 && kIsBf16 && !add) KITTENS_WGMMA_64("bf16", "=", "0");
    if constexpr (N == 64 && !kIsBf16 && add) KITTENS_WGMMA_64("f16", "+", "1");
    if constexpr (N == 64 && !kIsBf16 && !add) KITTENS_WGMMA_64("f16", "=", "0");
    if constexpr (N == 128 && kIsBf16) KITTENS_WGMMA_128("bf16", "+", "1");
    if constexpr (N == 128 && !kIsBf16) KITTENS_WGMMA_128("f16", "+", "1");
}

// The same with a in shared memory. Here d is an input even where nothing is added: products in turn then share its registers.
template <typename T, int N, int a_transposed, int transposed, bool add>
__device__ __forceinline__ void mma_step(float (&d)[N / 2], uint64_t a, uint64_t b) {
    constexpr bool kIsBf16 = is_same<T, bf16>;
    static_assert((kIsBf16 || is_same<T, half>) && N == 64);
    if constexpr (kIsBf16 && add) KITTENS_WGMMA_SHARED_64("bf16", "1");
    if constexpr (kIsBf16 && !add) KITTENS_WGMMA_SHARED_64("bf16", "0");
    if constexpr (!kIsBf16 && add) KITTENS_WGMMA_SHARED_64("f16", "1");
    if constexpr (!kIsBf16 && !add) KITTENS_WGMMA_SHARED_64("f16", "0");
}

#undef KITTENS_D4
#undef KITTENS_D16
#undef KITTENS_D32
#undef KITTENS_NAMES_32
#undef KITTENS_NAMES_64
#undef KITTENS_WGMMA
#undef KITTENS_WGMMA_64
#undef KITTENS_WGMMA_128
#undef KITTENS_WGMMA_SHARED_64

constexpr int kStepCols = 16;

// d = a bᵀ, asynchronously, b the tile of a ring that is in a stage: its rows are the columns of d. The first columns of a are
// in registers; the rest, if any, are in shared memory.
template <typename T, int N, int K, int in_registers, int stages>
__device__ __forceinline__ void mm_ABt(rt_fl<16, N>& d, const rt<T, 16, in_registers>& a, const st<T, 64, K>& a_shared,
                                       const st<T, N, K> (&b)[stages], int stage) {
    using A = st<T, 64, K>;
    using B = st<T, N, K>;
    const uint64_t start = descriptor(b, stage, 0, kSwizzleAtomBytes);
    const uint64_t a_start = descriptor(&a_shared, 0, 0, kSwizzleAtomBytes);
#pragma unroll
    for (int k = 0; k < K; k += kStepCols) {
        const int in_panel = k % B::panel_cols * sizeof(T);
        const uint64_t b_step = start + (k / B::panel_cols * B::panel_bytes + in_panel) / kDescriptorBytes;
        if (k == 0) {
            mma_step<T, N, 0, false>(d.data, a.data, b_step);
        } else if (k < in_registers) {
            mma_step<T, N, 0, true>(d.data, a.data + k / 4, b_step);
        } else {
            mma_step<T, N, 0, 0, true>(d.data, a_start + (k / A::panel_cols * A::panel_bytes + in_panel) / kDescriptorBytes,
                                       b_step);
        }
    }
}

// The same with all of a in registers.
template <typename T, int N, int K, int stages>
__device__ __forceinline__ void mm_ABt(rt_fl<16, N>& d, const rt<T, 16, K>& a, const st<T, N, K> (&b)[stages], int stage) {
    using B = st<T, N, K>;
    const uint64_t start = descriptor(b, stage, 0, kSwizzleAtomBytes);
#pragma unroll
    for (int k = 0; k < K; k += kStepCols) {
        const int in_panel = k % B::panel_cols * sizeof(T);
        const uint64_t b_step = start + (k / B::panel_cols * B::panel_bytes + in_panel) / kDescriptorBytes;
        if (k == 0) mma_step<T, N, 0, false>(d.data, a.data, b_step);
        if (k > 0) mma_step<T, N, 0, true>(d.data, a.data + k / 4, b_step);
    }
}

// d += a bᵀ, asynchronously, a in shared memory, b the tile of a ring that is in a stage.
template <typename T, int N, int K, int stages>
__device__ __forceinline__ void mma_ABt(rt_fl<16, N>& d, const st<T, 64, K>& a, const st<T, N, K> (&b)[stages], int stage) {
    using A = st<T, 64, K>;
    using B = st<T, N, K>;
    const uint64_t a_start = descriptor(&a, 0, 0, kSwizzleAtomBytes), start = descriptor(b, stage, 0, kSwizzleAtomBytes);
#pragma unroll
    for (int k = 0; k < K; k += kStepCols) {
        const int in_panel = k % B::panel_cols * sizeof(T);
        mma_step<T, N, 0, 0, true>(d.data, a_start + (k / A::panel_cols * A::panel_bytes + in_panel) / kDescriptorBytes,
                                   start + (k / B::panel_cols * B::panel_bytes + in_panel) / kDescriptorBytes);
    }
}

// d += a b, asynchronously, b the tile of a ring that is in a stage.
template <typename T, int N, int K, int stages>
__device__ __forceinline__ void mma_AB(rt_fl<16, N>& d, const rt<T, 16, K>& a, const st<T, K, N> (&b)[stages], int stage) {
    const uint64_t start = descriptor(b, stage, st<T, K, N>::panel_bytes, kSwizzleAtomBytes);
#pragma unroll
    for (int k = 0; k < K; k += kStepCols) {
        mma_step<T, N, 1, true>(d.data, a.data + k / 4, start + k * kSwizzleBytes / kDescriptorBytes);
    }
}

// d = aᵀ b or, where `add`, d += aᵀ b, asynchronously: 64 columns of d, from a multiple of 64 on. Both are tiles of rings.
template <int first_col, bool add, typename T, int K, int N, int a_stages, int stages>
__device__ __forceinline__ void mm_AtB(rt_fl<16, 64>& d, const st<T, K, 64> (&a)[a_stages], int a_stage,
                                       const st<T, K, N> (&b)[stages], int stage) {
    using B = st<T, K, N>;
    static_assert(first_col % B::panel_cols == 0 && B::panel_cols == 64);
    const uint64_t a_start = descriptor(a, a_stage, 0, kSwizzleAtomBytes);
    const uint64_t start =
        descriptor(b, stage, 0, kSwizzleAtomBytes) + first_col / B::panel_cols * B::panel_bytes / kDescriptorBytes;
#pragma unroll
    for (int k = 0; k < K; k += kStepCols) {
        const uint64_t a_step = a_start + k * kSwizzleBytes / kDescriptorBytes;
        const uint64_t step = start + k * kSwizzleBytes / kDescriptorBytes;
        if (k == 0) mma_step<T, 64, 1, 1, add>(d.data, a_step, step);
        if (k > 0) mma_step<T, 64, 1, 1, true>(d.data, a_step, step);
    }
}

// Where a lane's part of a matrix of 16 x 16 lies, as ldmatrix takes it for a register tile.
template <typename ST>
__device__ __forceinline__ uint32_t address_of_lane(const ST& tile, int col) {
    const int row = warpid() * 16 + kittens::laneid() % 16;
    return address_of(tile, row, col + kittens::laneid() / 16 * 8);
}

// The first columns of a tile.
template <typename T, int K, int cols>
__device__ __forceinline__ void load(rt<T, 16, K>& destination, const st<T, 64, cols>& source) {
#pragma unroll
    for (int k = 0; k < K; k += kStepCols) {
        uint32_t* words = destination.data + k / 4;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(address_of_lane(source, k))
                     : "memory");
    }
}

// All columns of a tile.
template <typename T, int cols>
__device__ __forceinline__ void store(st<T, 64, cols>& destination, const rt<T, 16, cols>& source) {
#pragma unroll
    for (int k = 0; k < cols; k += kStepCols) {
        const uint32_t* words = source.data + k / 4;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address_of_lane(destination, k)),
                     "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
    }
}

// Makes what this thread has stored to shared memory visible to the products and copies that start after it.
__device__ __forceinline__ void fence_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace warpgroup
}  // namespace kittens
