// What the kernels use of CUDA, for a CPU without a GPU: every thread of a thread block is a fiber of one CPU thread, and
// warps take turns in a random order, some of them slowly for a while, so that each run meets other races. Thread blocks run
// one after the other. Memory is that of the CPU: what only a GPU's weaker order shows is not found.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct int4 {
    int x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

// Dynamic shared memory, by the name under which the kernels declare it.
constexpr int kMostSharedMemory = 227 * 1024;
alignas(1024) uint8_t raw[kMostSharedMemory];

// Number of the planted error that is active, see MISTAKES in tests/kernels/test_emulated.py; 0 is none.
extern "C" {
int mistake = 0;
}

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
// Turns without any progress after which nothing will ever happen.
constexpr int kPatience = 400'000;

struct Index {
    unsigned x;
};

// A product of matrices that one thread of a warp has issued. It reads its operands and writes its result at any time until
// it is waited for.
struct Product {
    void (*run)(const std::vector<Product*>& lanes, int warp);
    float* d;
    const uint32_t* a;     // columns in registers
    const void* a_shared;  // the others
    const void* b;
    int group;
};

// 16 bytes on their way to shared memory, which land at the latest when the thread waits for their group.
struct Copy {
    int group;
    std::function<void()> run;
};

struct Thread {
    Index index;
    ucontext_t start;
    jmp_buf here;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool started = false, finished = false;
    const char* waits_for = "its start";
    // Its condition, which the scheduler evaluates instead of resuming the thread; null while it waits for nothing.
    bool (*is_met)(const void* condition) = nullptr;
    const void* condition;
    std::vector<Product> products;
    int product_group = 0;
    std::vector<Copy> copies;
    int copy_group = 0;
};

// Where threads meet: who comes last opens it for all.
struct Meeting {
    int arrived = 0, opened = 0;
};

struct Warp {
    Meeting meeting;
    uint64_t slots[kWarp];
    std::string steps;  // instructions of warpgroups so far, a letter each
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Meeting barrier, named_barriers[16];
inline std::vector<std::function<void()>> loads;  // bulk copies to shared memory under way
inline Thread* current;
inline Index block_index, grid_size;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline std::string error;
inline uint64_t progress, random_state;

// Marsaglia's xorshift generator with 64 bits.
inline uint32_t random_below(uint32_t limit) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (random_state >> 16) % limit;
}

// The compiler may not keep the address of the current thread over a turn of another.
__attribute__((noinline)) inline Thread& self() {
    asm volatile("" ::: "memory");
    return *current;
}
inline int lane() { return self().index.x % kWarp; }
inline Warp& warp() { return warps[self().index.x / kWarp]; }

__attribute__((noinline)) inline void yield() {
    if (_setjmp(self().here) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& what) {
    error = "block " + std::to_string(block_index.x) + ", thread " + std::to_string(self().index.x) + ": " + what;
    _longjmp(scheduler, 1);
}

// Conditions do not yield: the scheduler evaluates them.
template <typename Condition>
void wait_until(const char* what, const Condition& condition) {
    if (!condition()) {
        self().waits_for = what;
        self().condition = &condition;
        self().is_met = [](const void* waited) { return (*static_cast<const Condition*>(waited))(); };
        yield();
        self().is_met = nullptr;
        self().waits_for = "a turn";
    }
    ++progress;
}

inline void arrive(Meeting& meeting, int expected) {
    if (++meeting.arrived < expected) return;
    meeting.arrived = 0;
    ++meeting.opened;
    ++progress;
}

inline void meet(Meeting& meeting, int expected, const char* what) {
    const int opened = meeting.opened;
    arrive(meeting, expected);
    wait_until(what, [&] { return meeting.opened != opened; });
}

inline void meet_warp() { meet(warp().meeting, kWarp, "its warp"); }

// What all lanes of a warp give, in the order of lanes.
template <typename T>
std::array<T, kWarp> gather(T x) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&warp().slots[lane()], &x, sizeof(T));
    meet_warp();
    std::array<T, kWarp> all;
    for (int i = 0; i < kWarp; ++i) std::memcpy(&all[i], &warp().slots[i], sizeof(T));
    meet_warp();
    return all;
}

inline void run_thread() {
    kernel();
    if (!self().copies.empty()) fail("a thread ends before its copies to shared memory");
    self().finished = true;
    ++progress;
    while (true) yield();
}

inline void take_turn(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler) != 0) return;
    if (thread.is_met != nullptr && !thread.is_met(thread.condition)) return;
    if (thread.started) _longjmp(thread.here, 1);
    thread.started = true;
    setcontext(&thread.start);
}

inline void finish_load(size_t i) {
    const auto load = std::exchange(loads[i], loads.back());
    loads.pop_back();
    load();
    ++progress;
}

inline void run_block(int num_threads) {
    const int num_warps = num_threads / kWarp;
    std::memset(raw, 0xff, sizeof raw);
    threads = std::vector<Thread>(num_threads);
    warps = std::vector<Warp>(num_warps);
    barrier = {};
    std::fill(std::begin(named_barriers), std::end(named_barriers), Meeting{});
    for (int i = 0; i < num_threads; ++i) {
        Thread& thread = threads[i];
        thread.index.x = i;
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.get();
        thread.start.uc_stack.ss_size = kStackBytes;
        makecontext(&thread.start, run_thread, 0);
    }
    // A warp, or the copies, take one of so many of their turns; of some warps one lane is behind.
    std::vector<uint32_t> slowness(num_warps, 1);
    std::vector<int> late_lane(num_warps);
    uint32_t slowness_of_loads = 1, slowness_of_late_lane = 1;
    std::vector<bool> finished(num_warps);
    uint64_t before = progress;
    for (int left = num_warps, same = 0, idle = 0; left > 0 && error.empty(); --same) {
        if (same <= 0) {
            same = 200 + random_below(8000);
            for (uint32_t& slow : slowness) slow = random_below(4) > 0 ? 1 : random_below(2) > 0 ? 20 : 200;
            for (int& lane : late_lane) lane = random_below(4) == 0 ? int(random_below(kWarp)) : -1;
            slowness_of_loads = 1u << random_below(9);
            slowness_of_late_lane = random_below(2) > 0 ? 20 : 500;
        }
        const int index = random_below(num_warps);
        if (!finished[index] && random_below(slowness[index]) == 0) {
            bool all = true;
            // Lanes in another order each time: any odd step meets all of them.
            const int first = random_below(kWarp), step = 2 * random_below(kWarp / 2) + 1;
            for (int i = 0; i < kWarp && error.empty(); ++i) {
                const int lane = (first + i * step) % kWarp;
                Thread& thread = threads[index * kWarp + lane];
                if (!thread.finished && (lane != late_lane[index] || random_below(slowness_of_late_lane) == 0))
                    take_turn(thread);
                all = all && thread.finished;
            }
            finished[index] = all;
            left -= all;
        }
        if (!loads.empty() && random_below(slowness_of_loads) == 0) finish_load(random_below(loads.size()));
        idle = progress == before ? idle + 1 : 0;
        before = progress;
        if (idle > kPatience) {
            error = "block " + std::to_string(block_index.x) + ": deadlock:";
            for (int i = 0; i < num_warps; ++i)
                error += " warp " + std::to_string(i) + " waits for " + threads[i * kWarp].waits_for + ";";
        }
    }
    if (error.empty() && !loads.empty()) error = "copies to shared memory end after their thread block";
    loads.clear();
}

// Runs a kernel; returns what went wrong, or null.
inline const char* run(int num_blocks, int num_threads, uint64_t seed, std::function<void()> function) {
    kernel = std::move(function);
    random_state = seed | 1;
    error.clear();
    grid_size.x = num_blocks;
    for (block_index.x = 0; int(block_index.x) < num_blocks && error.empty(); ++block_index.x) run_block(num_threads);
    return error.empty() ? nullptr : error.c_str();
}

}  // namespace emulator

#define threadIdx (emulator::self().index)
#define blockIdx (emulator::block_index)
#define gridDim (emulator::grid_size)

template <typename T>
T __shfl_sync(uint32_t, T x, int source) {
    return emulator::gather(x)[source % emulator::kWarp];
}
template <typename T>
T __shfl_up_sync(uint32_t, T x, int lanes) {
    const int lane = emulator::lane();
    return emulator::gather(x)[lane < lanes ? lane : lane - lanes];
}
template <typename T>
T __shfl_xor_sync(uint32_t, T x, int lanes) {
    return emulator::gather(x)[emulator::lane() ^ lanes];
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
    uint32_t bits = 0;
    const auto all = emulator::gather(uint32_t(x));
    for (int i = 0; i < emulator::kWarp; ++i) bits |= all[i] << i;
    return bits;
}
inline bool __any_sync(uint32_t lanes, bool x) { return __ballot_sync(lanes, x) != 0; }
inline bool __all_sync(uint32_t lanes, bool x) { return __ballot_sync(lanes, x) == 0xffffffffu; }
inline int __reduce_add_sync(uint32_t, int x) {
    int sum = 0;
    for (int of_lane : emulator::gather(x)) sum += of_lane;
    return sum;
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t x) {
    const auto all = emulator::gather(x);
    return *std::min_element(all.begin(), all.end());
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t x) {
    const auto all = emulator::gather(x);
    return *std::max_element(all.begin(), all.end());
}
inline int __reduce_or_sync(uint32_t, int x) {
    for (int of_lane : emulator::gather(x)) x |= of_lane;
    return x;
}
inline void __syncwarp() { emulator::meet_warp(); }
inline void __syncthreads() { emulator::meet(emulator::barrier, emulator::threads.size(), "the thread block"); }

template <typename T>
T atomicAdd(T* address, T x) {
    return std::exchange(*address, *address + x);
}
template <typename T>
T atomicOr(T* address, T x) {
    return std::exchange(*address, *address | x);
}

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}
template <typename To, typename From>
To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof(To));
    return y;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(x); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline uint32_t __float_as_uint(float x) { return same_bits<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return same_bits<float>(x); }
inline size_t __cvta_generic_to_shared(const void* pointer) {
    const auto offset = static_cast<const uint8_t*>(pointer) - raw;
    if (offset < 0 || offset >= kMostSharedMemory) emulator::fail("an address is not in shared memory");
    return offset;
}
