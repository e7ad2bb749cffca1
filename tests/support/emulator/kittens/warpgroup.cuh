#pragma once

#include "kittens/register_tile.cuh"
#include "kittens/shared_tile.cuh"

namespace kittens {
namespace warpgroup {

inline uint32_t laneid() { return threadIdx.x % kWarpgroupThreads; }
inline uint32_t warpid() { return laneid() / kWarpThreads; }

template <int registers>
void increase_registers() {}
template <int registers>
void decrease_registers() {}

using emulator::Product;

// All warps of a warpgroup take the same steps.
inline void take_step(char kind) {
    if (emulator::lane() != 0) return;
    std::string& own = emulator::warp().steps;
    own.push_back(kind);
    const size_t warp = threadIdx.x / kWarpThreads, first = warp - warp % kWarpgroupWarps;
    for (size_t other = first; other < first + kWarpgroupWarps; ++other) {
        const std::string& steps = emulator::warps[other].steps;
        if (steps.size() >= own.size() && steps[own.size() - 1] != kind)
            emulator::fail("warps of a warpgroup take other steps");
    }
}

template <typename... Tiles>
void mma_fence(Tiles&...) {
    take_step('f');
}

// Products of earlier groups, of all lanes of the warp.
inline void finish_products(int before_group) {
    __syncwarp();
    if (emulator::lane() == 0) {
        emulator::Thread* lanes = &emulator::self();
        for (size_t i = 0; i < lanes[0].products.size() && lanes[0].products[i].group < before_group; ++i) {
            std::vector<Product*> same;
            for (int lane = 0; lane < kWarpThreads; ++lane) {
                if (i >= lanes[lane].products.size()) emulator::fail("lanes have issued other numbers of products");
                same.push_back(&lanes[lane].products[i]);
                if (same[lane]->b != same[0]->b || same[lane]->a_shared != same[0]->a_shared)
                    emulator::fail("lanes have issued other products");
            }
            same[0]->run(same, warpid());
        }
    }
    __syncwarp();
    auto& products = emulator::self().products;
    std::erase_if(products, [=](const Product& product) { return product.group < before_group; });
    __syncwarp();
}

inline void mma_commit_group() {
    take_step('c');
    ++emulator::self().product_group;
    const bool at_once = broadcast(emulator::random_below(3) == 0);
    if (at_once) finish_products(emulator::self().product_group);
}

template <int left, typename... Tiles>
void mma_async_wait(Tiles&...) {
    take_step('0' + left);
    finish_products(emulator::self().product_group - left);
}

template <typename ST>
uint8_t* address_in(const ST& tile, int row, int col) {
    return raw + address_of(tile, row, col / 8 * 8) + col % 8 * 2;
}
template <typename T, int rows, int cols>
void read_row(const st<T, rows, cols>& tile, int row, float (&values)[cols]) {
    for (int col = 0; col < cols; col += 8) {
        uint16_t bits[8];
        std::memcpy(bits, address_in(tile, row, col), sizeof bits);
        for (int i = 0; i < 8; ++i) values[col + i] = value_of<T>(bits[i]);
    }
}

// An element of the left operand, which the four lanes of a row hold in pairs.
template <typename T>
float value_in(const std::vector<Product*>& lanes, int row, int col) {
    const uint32_t word = lanes[row % 8 * 4 + col % 8 / 2]->a[col / 16 * 4 + col % 16 / 8 * 2 + row / 8];
    return value_of<T>(col % 2 == 0 ? word : word >> 16);
}

template <typename T, int N, int K, int in_registers, bool add>
void run_mm_ABt(const std::vector<Product*>& lanes, int warp) {
    const auto* a_shared = static_cast<const st<T, 64, K>*>(lanes[0]->a_shared);
    const auto& b = *static_cast<const st<T, N, K>*>(lanes[0]->b);
    static float d[16][N], a[16][K], row_of_b[K], transposed_b[K][N];
    for (int row = 0; row < 16; ++row) {
        if (in_registers < K) read_row(*a_shared, warp * 16 + row, a[row]);
        for (int k = 0; k < in_registers; ++k) a[row][k] = value_in<T>(lanes, row, k);
    }
    for (int n = 0; n < N; ++n) {
        read_row(b, n, row_of_b);
        for (int k = 0; k < K; ++k) transposed_b[k][n] = row_of_b[k];
    }
    std::memset(d, 0, sizeof d);
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < K; ++k) {
            for (int n = 0; n < N; ++n) d[row][n] += a[row][k] * transposed_b[k][n];
        }
    }
    for (int lane = 0; lane < kWarpThreads; ++lane) {
        for (int i = 0; i < N / 2; ++i) {
            float& own = lanes[lane]->d[i];
            own = (add ? own : 0.0f) + d[lane / 4 + 8 * row_of(i)][i / 4 * 8 + lane % 4 * 2 + i % 2];
        }
    }
}

template <typename T, int N, int K>
void run_mma_AB(const std::vector<Product*>& lanes, int) {
    const auto& b = *static_cast<const st<T, K, N>*>(lanes[0]->b);
    static float d[16][N], row_of_b[N];
    std::memset(d, 0, sizeof d);
    for (int k = 0; k < K; ++k) {
        read_row(b, k, row_of_b);
        for (int row = 0; row < 16; ++row) {
            const float value = value_in<T>(lanes, row, k);
            for (int n = 0; n < N; ++n) d[row][n] += value * row_of_b[n];
        }
    }
    for (int lane = 0; lane < kWarpThreads; ++lane) {
        for (int i = 0; i < N / 2; ++i) lanes[lane]->d[i] += d[lane / 4 + 8 * row_of(i)][i / 4 * 8 + lane % 4 * 2 + i % 2];
    }
}

template <typename T, int N, int K, int in_registers, int stages>
void mm_ABt(rt_fl<16, N>& d, const rt<T, 16, in_registers>& a, const st<T, 64, K>& a_shared, const st<T, N, K> (&b)[stages],
            int stage) {
    take_step('s');
    emulator::self().products.push_back(
        {run_mm_ABt<T, N, K, in_registers, false>, d.data, a.data, &a_shared, &b[stage], emulator::self().product_group});
}

template <typename T, int N, int K, int stages>
void mm_ABt(rt_fl<16, N>& d, const rt<T, 16, K>& a, const st<T, N, K> (&b)[stages], int stage) {
    take_step('s');
    emulator::self().products.push_back(
        {run_mm_ABt<T, N, K, K, false>, d.data, a.data, nullptr, &b[stage], emulator::self().product_group});
}

template <typename T, int N, int K, int stages>
void mma_ABt(rt_fl<16, N>& d, const st<T, 64, K>& a, const st<T, N, K> (&b)[stages], int stage) {
    take_step('a');
    emulator::self().products.push_back(
        {run_mm_ABt<T, N, K, 0, true>, d.data, nullptr, &a, &b[stage], emulator::self().product_group});
}

template <typename T, int N, int K, int stages>
void mma_AB(rt_fl<16, N>& d, const rt<T, 16, K>& a, const st<T, K, N> (&b)[stages], int stage) {
    take_step('o');
    emulator::self().products.push_back(
        {run_mma_AB<T, N, K>, d.data, a.data, nullptr, &b[stage], emulator::self().product_group});
}

template <typename T, int K, int N, int first_col, bool add>
void run_mm_AtB(const std::vector<Product*>& lanes, int warp) {
    const auto& a = *static_cast<const st<T, K, 64>*>(lanes[0]->a_shared);
    const auto& b = *static_cast<const st<T, K, N>*>(lanes[0]->b);
    static float d[16][64], row_of_a[64], row_of_b[N];
    std::memset(d, 0, sizeof d);
    for (int k = 0; k < K; ++k) {
        read_row(a, k, row_of_a);
        read_row(b, k, row_of_b);
        for (int row = 0; row < 16; ++row) {
            for (int n = 0; n < 64; ++n) d[row][n] += row_of_a[warp * 16 + row] * row_of_b[first_col + n];
        }
    }
    for (int lane = 0; lane < kWarpThreads; ++lane) {
        for (int i = 0; i < 32; ++i) {
            float& own = lanes[lane]->d[i];
            own = (add ? own : 0.0f) + d[lane / 4 + 8 * row_of(i)][i / 4 * 8 + lane % 4 * 2 + i % 2];
        }
    }
}

template <int first_col, bool add, typename T, int K, int N, int a_stages, int stages>
void mm_AtB(rt_fl<16, 64>& d, const st<T, K, 64> (&a)[a_stages], int a_stage, const st<T, K, N> (&b)[stages], int stage) {
    take_step('t');
    emulator::self().products.push_back(
        {run_mm_AtB<T, K, N, first_col, add>, d.data, nullptr, &a[a_stage], &b[stage], emulator::self().product_group});
}

// Where a word of a lane's fragment is in a tile.
template <typename ST>
uint8_t* address_of_word(const ST& tile, int word) {
    const int lane = emulator::lane();
    return address_in(tile, warpid() * 16 + lane / 4 + word % 2 * 8, word / 4 * 16 + word % 4 / 2 * 8 + lane % 4 * 2);
}

template <typename T, int K, int cols>
void load(rt<T, 16, K>& destination, const st<T, 64, cols>& source) {
    for (int i = 0; i < K / 4; ++i) std::memcpy(&destination.data[i], address_of_word(source, i), sizeof(uint32_t));
}

template <typename T, int cols>
void store(st<T, 64, cols>& destination, const rt<T, 16, cols>& source) {
    for (int i = 0; i < cols / 4; ++i) std::memcpy(address_of_word(destination, i), &source.data[i], sizeof(uint32_t));
}

inline void fence_stores() {}

}  // namespace warpgroup
}  // namespace kittens
