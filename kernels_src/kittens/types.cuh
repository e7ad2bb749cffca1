// Element types of tiles, without CUDA's own headers: NVRTC then needs nothing but these sources.
#pragma once

#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;
#else
#include <cstdint>
#endif

namespace kittens {

struct bf16 {
    unsigned short bits;
};
struct half {
    unsigned short bits;
};

constexpr int kWarpThreads = 32;

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

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace kittens
