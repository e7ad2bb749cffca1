#pragma once

#include "kittens/types.cuh"

namespace kittens {

// A launch starts when the one before has ended.
inline void let_next_launch_start() {}

inline void wait_for_launch_before() {}

inline void arrive_at(int* counter) { ++*counter; }

inline void wait_for(const int* counter, int arrivals) {
    emulator::wait_until("a counter", [&] { return *counter >= arrivals; });
}

}  // namespace kittens
