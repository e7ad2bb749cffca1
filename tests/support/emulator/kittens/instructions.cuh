#pragma once

#include "kittens/types.cuh"

namespace kittens {

inline int num_thread_blocks() { return gridDim.x; }
inline int thread_number() { return threadIdx.x; }

inline float value_of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction == 0 ? sign * INFINITY : NAN;
    return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

// The value of a 16-bit element.
template <typename T>
float value_of(uint16_t bits) {
    if (is_same<T, bf16>) return __uint_as_float(uint32_t(bits) << 16);
    static const std::vector<float> halves = [] {
        std::vector<float> values(1 << 16);
        for (int i = 0; i < 1 << 16; ++i) values[i] = value_of_half(i);
        return values;
    }();
    return halves[bits];
}

// Rounded to nearest even.
template <typename T>
uint16_t bits_of(float x) {
    if (x != x) return 0x7fff;
    if (is_same<T, bf16>) {
        const uint32_t bits = same_bits<uint32_t>(x);
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    const int exponent = x < 0x1p-14f ? -14 : std::ilogb(x);
    if (exponent > 15) return sign | 0x7c00;
    // A fraction that rounds up to the next power of two carries into the exponent.
    const int steps = std::nearbyint(std::ldexp(x, 10 - exponent));
    return sign | (steps + ((exponent + 14) << 10));
}

template <typename T>
float2 unpack(uint32_t word) {
    return {value_of<T>(word), value_of<T>(word >> 16)};
}

template <typename T>
uint32_t pack(float low, float high) {
    return bits_of<T>(low) | uint32_t(bits_of<T>(high)) << 16;
}

inline float exp2(float x) { return std::exp2(x); }
inline void count_at_least(int& count, uint32_t x, uint32_t least) { count += x >= least; }
inline float log2(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

template <typename... Values>
void add_to(float* address, Values... values) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(float[sizeof...(values)]) != 0) {
        emulator::fail("an addition at an address that is not aligned");
    }
    ((*address++ += values), ...);
}

inline void prefetch(const void*) {}

}  // namespace kittens
