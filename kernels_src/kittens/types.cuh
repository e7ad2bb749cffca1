// Element types of tiles, without CUDA's own headers: NVRTC then needs nothing but these sources.
#pragma once

#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;
#else
#include <cstdint>
#endif

namespace kittens {

struct bf16 {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};

template <typename A, typename B>
constexpr bool is_same = false;
template <typename A>
constexpr bool is_same<A, A> = true;

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupWarps = 4;
constexpr int kWarpgroupThreads = kWarpgroupWarps * kWarpThreads;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

__device__ __forceinline__ uint32_t laneid() { return threadIdx.x % kWarpThreads; }
__device__ __forceinline__ uint32_t warpid() { return threadIdx.x / kWarpThreads; }

// The value of lane 0.
__device__ __forceinline__ int broadcast(int x) { return __shfl_sync(kAllLanes, x, 0); }

// A value that is the same in all lanes, in a uniform register. All lanes call this. The compiler keeps what follows from the
// value in uniform registers, too, as long as no branch depends on others. Products take their matrix descriptors from there;
// a descriptor in another register is moved first, one instruction after the other.
__device__ __forceinline__ int uniform(int x) { return __reduce_or_sync(kAllLanes, x); }

// Inclusive prefix sums over the lanes.
template <int n>
__device__ __forceinline__ void prefix_sums(uint32_t (&x)[n]) {
#pragma unroll 1
    for (int step = 1; step < kWarpThreads; step *= 2) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const uint32_t other = __shfl_up_sync(kAllLanes, x[i], step);
            if (laneid() >= step) x[i] += other;
        }
    }
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace kittens
