// The plan of the forward: which query blocks a thread block attends together, and the tiles of keys that it loads for them.
//
// Query blocks of a head that follow each other make a chunk, and a thread block plans one. It puts those together that
// select the same key blocks, since a group loads each only once, and that select about as many, since a group ends with its
// longest. Groups with more work come first in a head. Nothing depends on which thread is faster.
//
// Specialised at compile time: VSA_GROUP (query blocks of a group), VSA_MAP_WORDS (of the bits that a chunk selects).
#include "vsa/groups.cuh"

using namespace kittens;

namespace {

constexpr int kGroup = VSA_GROUP;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kMostRows = 48;
constexpr int kMostGroups = (kMostRows + kGroup - 1) / kGroup;
// Which query blocks of a group select a key block, a bit each: its kind.
constexpr int kKinds = 1 << kGroup;

struct Params {
    Order keys;
    const int* q2k_idx;  // [rows, width]
    const int* q2k_num;  // [rows]
    Group* groups;
    TileBox* tiles;  // those of group i start at i * boxes_per_group
    int* next;       // the forward's next item of work
    int64_t boxes_per_group;
    int width;
    int num_q_blocks, num_kv_blocks;
    int rows_per_chunk, chunks_per_head;
    int tile_boxes;
};
static_assert(sizeof(Params) == VSA_PARAMS_BYTES, "the host's description of the parameters differs");

struct SharedStorage {
    uint32_t selected[VSA_MAP_WORDS];  // a bit for each key block, row by row
    short likeness[kMostRows][kMostRows + 2];
    int count[kMostRows];
    int poisoned[kMostRows];
    uint32_t best[2][kMostRows];
    int members[kMostGroups][kGroup];
    int work[kMostGroups];
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

__device__ __forceinline__ uint64_t bit(int i) { return uint64_t(1) << i; }

// Of candidates the most alike wins, and of equals the lower row; 0 is no candidate.
constexpr int kLikenessBias = 1 << 15;
__device__ __forceinline__ uint32_t candidate(int likeness, int row) {
    const int bounded = max(1 - kLikenessBias, min(likeness, kLikenessBias - 1));
    return uint32_t(bounded + kLikenessBias) << 8 | uint32_t(255 - row);
}
__device__ __forceinline__ int row_of(uint32_t candidate) { return 255 - int(candidate & 255); }

// The sum over the lanes before this one.
__device__ __forceinline__ int sum_before(int x) {
    int sum = x;
#pragma unroll
    for (int step = 1; step < kWarpThreads; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, step);
        if (threadIdx.x % kWarpThreads >= step) sum += other;
    }
    return sum - x;
}

// Sets the bits of the key blocks that a row names and that have tokens. One warp.
__device__ void read_row(const Params& params, int row, int64_t index, uint32_t* selected, SharedStorage& shared) {
    const int lane = threadIdx.x % kWarpThreads;
    const int* names = params.q2k_idx + index * params.width;
    const int num = max(0, min(params.q2k_num[index], params.width));
    bool poisoned = false;
    for (int i = lane; i < num; i += kWarpThreads) {
        const int block = names[i];
        const bool exists = block >= 0 && block < params.num_kv_blocks;
        poisoned = poisoned || !exists;
        if (exists && (params.keys.sizes == nullptr || valid_tokens_of_block(params.keys, block) > 0)) {
            atomicOr(&selected[block / 32], 1u << block % 32);
        }
    }
    poisoned = __any_sync(kAllLanes, poisoned);
    __syncwarp();
    int count = 0;
    for (int word = lane; word < (params.num_kv_blocks + 31) / 32; word += kWarpThreads) count += __popc(selected[word]);
    count = __reduce_add_sync(kAllLanes, count);
    if (lane == 0) {
        shared.count[row] = count;
        shared.poisoned[row] = poisoned;
    }
}

// How many key blocks two rows share, less by how many more one of them selects. All warps.
__device__ void compare_rows(int rows, int words, int stride, SharedStorage& shared) {
    for (int a = threadIdx.x / kWarpThreads; a < rows; a += kWarps) {
        for (int b = threadIdx.x % kWarpThreads; b < a; b += kWarpThreads) {
            int common = 0;
            for (int i = 0; i < words; ++i) {
                common += __popc(shared.selected[a * stride + i] & shared.selected[b * stride + i]);
            }
            const int likeness = common - abs(shared.count[a] - shared.count[b]);
            shared.likeness[a][b] = shared.likeness[b][a] = max(1 - kLikenessBias, min(likeness, kLikenessBias - 1));
        }
    }
}

// Groups: the two rows that are most alike, then whoever is most like those, until no row is left. Every warp decides the
// same from what all of them found.
__device__ void match_rows(int rows, SharedStorage& shared) {
    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    uint64_t free = bit(rows) - 1;
    for (int group = 0; free != 0; ++group) {
        uint32_t* best = shared.best[group % 2];
        for (int row = warp; row < rows; row += kWarps) {
            uint32_t found = 0;
            for (int other = lane; other < rows; other += kWarpThreads) {
                if ((free & bit(other)) && other != row) found = max(found, candidate(shared.likeness[row][other], row));
            }
            found = __reduce_max_sync(kAllLanes, found);
            // A row that is left alone is its own candidate.
            if (lane == 0) best[row] = free & bit(row) ? max(found, candidate(-kLikenessBias, row)) : 0;
        }
        __syncthreads();
        int member[kGroup];
#pragma unroll
        for (int next = 0; next < kGroup; ++next) {
            uint32_t found = 0;
            for (int other = lane; other < rows; other += kWarpThreads) {
                if (!(free & bit(other))) continue;
                int likeness = 0;
                // While some row is free, those before were found.
#pragma unroll
                for (int i = 0; i < next; ++i) likeness += shared.likeness[member[i]][other];
                found = max(found, next == 0 ? best[other] : candidate(likeness, other));
            }
            found = __reduce_max_sync(kAllLanes, found);
            member[next] = found == 0 ? -1 : row_of(found);
            if (found != 0) free &= ~bit(member[next]);
        }
        if (threadIdx.x == 0) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) shared.members[group][i] = member[i];
        }
    }
}

// Writes the tiles of a group, each a block of one box, and returns how many. One warp.
//
// Tiles that several query blocks share and tiles of one alone are spread evenly over the list, so that all consumers advance
// alike, and each kind is in ascending order, so that thread blocks that run at the same time read the same keys: tile p of n
// of a kind has its place at (2p + 1) / 2n of the list, and follows as many tiles of every other kind as have a place before.
__device__ int write_tiles(const Params& params, const uint32_t* const (&rows)[kGroup], TileBox* tiles) {
    const int lane = threadIdx.x % kWarpThreads;
    const int words = (params.num_kv_blocks + 31) / 32;
    auto of_kind = [&](int kind, const uint32_t (&selected)[kGroup]) {
        uint32_t bits = kAllLanes;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) bits &= kind >> i & 1 ? selected[i] : ~selected[i];
        return bits;
    };
    int total[kKinds] = {}, written[kKinds] = {};
    for (int word = lane; word < words; word += kWarpThreads) {
        uint32_t selected[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) selected[i] = rows[i][word];
#pragma unroll
        for (int kind = 1; kind < kKinds; ++kind) total[kind] += __popc(of_kind(kind, selected));
    }
    int num_tiles = 0;
#pragma unroll
    for (int kind = 1; kind < kKinds; ++kind) {
        total[kind] = __reduce_add_sync(kAllLanes, total[kind]);
        num_tiles += total[kind];
    }
    for (int word = 0; word < words; ++word) {
        uint32_t selected[kGroup];
        int kind = 0, p = 0, in_kind = 1;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            selected[i] = rows[i][word];
            kind |= int(selected[i] >> lane & 1) << i;
        }
#pragma unroll
        for (int other = 1; other < kKinds; ++other) {
            const uint32_t bits = of_kind(other, selected);
            if (kind == other) {
                p = written[other] + __popc(bits & ((1u << lane) - 1));
                in_kind = total[other];
            }
            written[other] += __popc(bits);
        }
        if (kind == 0) continue;
        const int twice = 2 * in_kind;
        const float inverse = 1.0f / twice;
        int place = p;
#pragma unroll
        for (int other = 1; other < kKinds; ++other) {
            if (other == kind) continue;
            // Of equal places the lower kind's comes first. Up to 2^20 tiles the quotient in fp32 is at most one too high or
            // too low.
            int quotient = static_cast<int>((float(2 * p + 1) * total[other] + in_kind) * inverse);
            const int64_t dividend = int64_t(2 * p + 1) * total[other] + in_kind - (other > kind);
            const int64_t rest = dividend - int64_t(quotient) * twice;
            quotient += rest < 0 ? -1 : rest >= twice ? 1 : 0;
            place += quotient;
        }
        tiles[place] = TileBox::of(params.keys, word * 32 + lane, 0, kind);
    }
    return num_tiles;
}

// The same for a group of one query block, whose key blocks are of one or more tiles; those without a valid token are left
// out.
__device__ int write_tiles_of_row(const Params& params, const uint32_t* row, TileBox* tiles) {
    constexpr int kEveryone = (1 << kMostQueryBlocks) - 1;
    const int lane = threadIdx.x % kWarpThreads;
    int written = 0;
    for (int first = 0; first < params.num_kv_blocks; first += kWarpThreads) {
        const int block = first + lane;
        const bool named = row[first / kWarpThreads] >> lane & 1;
        auto is_used = [&](int first_box) {
            if (!named) return false;
            bool empty = params.keys.partial;
            for (int i = 0; i < params.tile_boxes && empty; ++i) {
                empty = TileBox::of(params.keys, block, first_box + i, kEveryone).is_empty();
            }
            return !empty;
        };
        int count = 0;
        for (int box = 0; box < params.keys.boxes; box += params.tile_boxes) count += is_used(box);
        const int before = sum_before(count);
        TileBox* tile = tiles + (written + before) * params.tile_boxes;
        for (int box = 0; box < params.keys.boxes; box += params.tile_boxes) {
            if (!is_used(box)) continue;
            for (int i = 0; i < params.tile_boxes; ++i) *tile++ = TileBox::of(params.keys, block, box + i, kEveryone);
        }
        written += __shfl_sync(kAllLanes, before + count, kWarpThreads - 1);
    }
    return written;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2) plan_forward(const __grid_constant__ Params params) {
    extern __shared__ __align__(16) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    const int chunk = blockIdx.x % params.chunks_per_head, head = blockIdx.x / params.chunks_per_head;
    const int first_row = chunk * params.rows_per_chunk;
    const int rows = max(0, min(params.rows_per_chunk, params.num_q_blocks - first_row));
    const int num_groups = (rows + kGroup - 1) / kGroup, groups_per_chunk = params.rows_per_chunk / kGroup;
    // An odd stride keeps rows apart in the banks. After the rows there is one that selects nothing.
    const int words = (params.num_kv_blocks + 31) / 32, stride = words | 1;
    if (blockIdx.x == 0 && threadIdx.x == 0) *params.next = 0;

    // What the rows select.
    for (int i = threadIdx.x; i < (rows + 1) * stride; i += kThreads) shared.selected[i] = 0;
    __syncthreads();
    for (int row = warp; row < rows; row += kWarps) {
        const int64_t index = int64_t(head) * params.num_q_blocks + first_row + row;
        read_row(params, row, index, shared.selected + row * stride, shared);
    }
    __syncthreads();

    // Groups, and their work.
    if constexpr (kGroup == 1) {
        if (threadIdx.x < num_groups) shared.members[threadIdx.x][0] = threadIdx.x;
    } else {
        compare_rows(rows, words, stride, shared);
        __syncthreads();
        match_rows(rows, shared);
    }
    __syncthreads();
    if (threadIdx.x < num_groups) {
        int work = 0;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int row = shared.members[threadIdx.x][i];
            if (row >= 0) work = max(work, shared.count[row]);
        }
        shared.work[threadIdx.x] = work;
    }
    __syncthreads();

    // Their tiles. Group i of every chunk of a head comes before group i + 1 of any.
    for (int group = warp; group < groups_per_chunk; group += kWarps) {
        int place = group;
        Group planned = {{-1, -1, -1, -1}, {}, 0, 0};
        if (group < num_groups) {
            place = 0;
            for (int other = lane; other < num_groups; other += kWarpThreads) {
                const int more = shared.work[other] - shared.work[group];
                place += more > 0 || (more == 0 && other < group);
            }
            place = __reduce_add_sync(kAllLanes, place);
        }
        const int64_t slot = (int64_t(head) * groups_per_chunk + place) * params.chunks_per_head + chunk;
        TileBox* tiles = params.tiles + slot * params.boxes_per_group;
        if (group < num_groups) {
            const uint32_t* selected[kGroup];
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                const int row = shared.members[group][i];
                selected[i] = shared.selected + (row >= 0 ? row : rows) * stride;
                if (row >= 0) {
                    planned.q_block[i] = first_row + row;
                    planned.tiles_of[i] = shared.count[row];
                    planned.poisoned |= shared.poisoned[row] << i;
                }
            }
            if constexpr (kGroup == 1) {
                planned.num_tiles = planned.tiles_of[0] = write_tiles_of_row(params, selected[0], tiles);
            } else {
                planned.num_tiles = write_tiles(params, selected, tiles);
            }
        }
        if (lane == 0) params.groups[slot] = planned;
    }
}
