// Conversions and arithmetic as single instructions: NVRTC then needs none of the headers that name them.
#pragma once

#include "kittens/types.cuh"

namespace kittens {

// Thread blocks of the launch, read anew wherever it is called, so that no register keeps them.
__device__ __forceinline__ int num_thread_blocks() {
    int number;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(number));
    return number;
}

// This thread's number, read anew likewise: what follows from it is not kept, either.
__device__ __forceinline__ int thread_number() {
    int number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number;
}

// Two neighbouring elements of a word as floats, the lower address first.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word);

template <>
__device__ __forceinline__ float2 unpack<bf16>(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

template <>
__device__ __forceinline__ float2 unpack<half>(uint32_t word) {
    float2 pair;
    asm("{\n .reg .f16 lo, hi;\n mov.b32 {lo, hi}, %2;\n cvt.f32.f16 %0, lo;\n cvt.f32.f16 %1, hi;\n}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(word));
    return pair;
}

// Two floats as neighbouring elements, rounded to nearest even.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <>
__device__ __forceinline__ uint32_t pack<half>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, exact where x is a power of two and else to one unit in the last place, in a single instruction.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// count += x >= least, in two instructions.
__device__ __forceinline__ void count_at_least(int& count, uint32_t x, uint32_t least) {
    asm("{\n .reg .pred reaches;\n setp.ge.u32 reaches, %1, %2;\n @reaches add.s32 %0, %0, 1;\n}"
        : "+r"(count)
        : "r"(x), "r"(least));
}

// Adds to four floats in memory, at an address that is a multiple of 16 bytes.
__device__ __forceinline__ void add_to(float* address, float a, float b, float c, float d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}

// The same with two, at a multiple of 8.
__device__ __forceinline__ void add_to(float* address, float a, float b) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(a), "f"(b) : "memory");
}

// Brings what is at an address as far as L2.
__device__ __forceinline__ void prefetch(const void* pointer) { asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer)); }

}  // namespace kittens
