// The plan of the forward: which boxes of queries a thread block attends together, and the tiles of keys that it loads for
// them.
//
// Query blocks of a head that follow each other make a chunk, and a thread block plans one. Boxes of a block select the same
// keys, and are put together as they follow each other. Blocks of one box are put together where they select the same key
// blocks, since a group loads each only once, and about as many, since a group ends with its longest. Groups with more work
// come first in a head. Nothing depends on which thread is faster.
//
// Specialised at compile time: VSA_MAP_WORDS (of the bits that a chunk selects).
#include "vsa/groups.cuh"

using namespace kittens;

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kMostRows = 24;
constexpr int kRowsOfWarp = (kMostRows + kWarps - 1) / kWarps;
// Which of a group select a box of keys, a bit each: its kind.
constexpr int kKinds = 1 << kConsumers;

struct Params {
    Order keys;
    const int* q2k_idx;  // [rows, width]
    const int* q2k_num;  // [rows]
    Group* groups;
    KeyTile* tiles;  // those of group i start at i * tiles_per_group
    int* next;       // the forward's next item of work
    int64_t tiles_per_group;
    int width;
    int num_q_blocks, num_kv_blocks;
    int rows_per_chunk, chunks_per_head, groups_per_chunk;
};
static_assert(sizeof(Params) == VSA_PARAMS_BYTES, "the host's description of the parameters differs");

// What a warp knows of the tiles that it is writing.
struct Listing {
    int total[kKinds];                   // tiles of each kind
    int before[kWarpThreads][kKinds];    // in 32 words of bits: those of each kind before a word
    struct {
        int key, kind, rank;  // the box, and which of its kind it is
    } found[2 * kWarpThreads];
};

struct SharedStorage {
    uint32_t selected[VSA_MAP_WORDS];  // a bit for each box of keys, row by row
    short likeness[kMostRows][kMostRows + 2];
    int count[kMostRows];
    int poisoned[kMostRows];
    int matched[kMostRows][kConsumers];  // rows of blocks of one box
    Listing listings[kWarps];
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

// Of candidates the most alike wins, and of equals the lower row; 0 is no candidate.
constexpr int kLikenessBias = 1 << 15;
__device__ __forceinline__ int bounded(int likeness) {
    return max(1 - kLikenessBias, min(likeness, kLikenessBias - 1));
}
__device__ __forceinline__ uint32_t candidate(int likeness, int row) {
    return uint32_t(bounded(likeness) + kLikenessBias) << 8 | uint32_t(255 - row);
}
__device__ __forceinline__ int row_of(uint32_t candidate) { return 255 - int(candidate & 255); }

// Words of the bits of a row.
__device__ __forceinline__ int words_of(const Params& params) { return (params.num_kv_blocks * params.keys.boxes + 31) / 32; }

// The sum over the lanes before this one.
__device__ __forceinline__ int sum_before(int x) {
    int sum = x;
#pragma unroll
    for (int step = 1; step < kWarpThreads; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, step);
        if (laneid() >= step) sum += other;
    }
    return sum - x;
}

// Sets the bits of the boxes that a warp's rows name and that have tokens. Rows are read side by side, and names before it is
// known whether they count, so that memory is waited for as seldom as can be. One warp.
__device__ void read_rows(const Params& params, int rows, int64_t first_index, int stride, SharedStorage& shared) {
    const int lane = laneid(), words = words_of(params);
    int num[kRowsOfWarp], upcoming[kRowsOfWarp], most = 0;
    bool poisoned[kRowsOfWarp] = {};
    const auto row_at = [](int i) { return int(warpid()) + i * kWarps; };
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
        const int row = row_at(i);
        num[i] = upcoming[i] = 0;
        if (row >= rows) continue;
        num[i] = params.q2k_num[first_index + row];
        if (lane < params.width) upcoming[i] = params.q2k_idx[(first_index + row) * params.width + lane];
    }
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
        num[i] = max(0, min(num[i], params.width));
        most = max(most, num[i]);
    }
    for (int entry = lane; entry < most; entry += kWarpThreads) {
        int block[kRowsOfWarp];
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i) {
            block[i] = upcoming[i];
            const int64_t index = first_index + row_at(i);
            if (entry + kWarpThreads < num[i]) upcoming[i] = params.q2k_idx[index * params.width + entry + kWarpThreads];
        }
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i) {
            if (entry >= num[i]) continue;
            const bool exists = block[i] >= 0 && block[i] < params.num_kv_blocks;
            poisoned[i] = poisoned[i] || !exists;
            for (int box = 0; exists && box < params.keys.boxes; ++box) {
                if (params.keys.partial && KeyTile::of(params.keys, block[i], box, 0).is_empty()) continue;
                const int key = block[i] * params.keys.boxes + box;
                atomicOr(&shared.selected[row_at(i) * stride + key / 32], 1u << key % 32);
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
        const int row = row_at(i);
        if (row >= rows) break;
        int count = 0;
        for (int word = lane; word < words; word += kWarpThreads) count += __popc(shared.selected[row * stride + word]);
        count = __reduce_add_sync(kAllLanes, count);
        const bool is_poisoned = __any_sync(kAllLanes, poisoned[i]);
        if (lane == 0) {
            shared.count[row] = count;
            shared.poisoned[row] = is_poisoned;
        }
    }
}

// How many keys two rows share, less by how many more one of them selects. All warps.
__device__ void compare_rows(int rows, int words, int stride, SharedStorage& shared) {
    for (int a = warpid(); a < rows; a += kWarps) {
        for (int b = laneid(); b < a; b += kWarpThreads) {
            int common = 0;
            for (int i = 0; i < words; ++i) {
                common += __popc(shared.selected[a * stride + i] & shared.selected[b * stride + i]);
            }
            const int more = abs(shared.count[a] - shared.count[b]);
            shared.likeness[a][b] = shared.likeness[b][a] = bounded(common - more);
        }
    }
}

// Groups of nearly as many rows each: the two that are most alike, then whoever is most like those, until no row is left; a
// short chunk's last groups have none. One warp, a lane for each row: it takes less time than many that wait for each other.
__device__ void match_rows(int rows, int num_groups, int groups_per_chunk, SharedStorage& shared) {
    static_assert(kMostRows <= kWarpThreads, "each row has a lane");
    const int lane = laneid(), own = min(lane, kMostRows - 1);
    const int fewest = rows / num_groups, most_of_group = (rows + num_groups - 1) / num_groups;
    uint32_t free = (1u << rows) - 1;
    for (int group = 0; group < groups_per_chunk; ++group) {
        const int left_to_others = fewest * (num_groups - 1 - group);
        // A row that is left alone is its own candidate.
        int most = -kLikenessBias;
#pragma unroll
        for (int other = 0; other < kMostRows; ++other) {
            const int likeness = shared.likeness[own][other];
            if ((free >> other & 1) && other != lane) most = max(most, likeness);
        }
        uint32_t best = candidate(most, lane);
        int member[kConsumers];
#pragma unroll
        for (int next = 0; next < kConsumers; ++next) {
            if (next > 0) {
                int likeness = 0;
#pragma unroll
                for (int i = 0; i < next; ++i) likeness += shared.likeness[max(member[i], 0)][own];
                best = candidate(likeness, lane);
            }
            const bool is_candidate = (free >> lane & 1) && next < most_of_group && __popc(free) > left_to_others;
            const uint32_t found = __reduce_max_sync(kAllLanes, is_candidate ? best : 0);
            member[next] = found == 0 ? -1 : row_of(found);
            if (found != 0) free &= ~(1u << member[next]);
        }
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < kConsumers; ++i) shared.matched[group][i] = member[i];
        }
    }
}

// How many groups the rows of a chunk make: of blocks of one box, in the proportion of a full chunk.
__device__ __forceinline__ int groups_of(const Params& params, int rows) {
    const int boxes = params.keys.boxes;
    if (boxes > 1) return (rows * boxes + kConsumers - 1) / kConsumers;
    return (rows * params.groups_per_chunk + params.rows_per_chunk - 1) / params.rows_per_chunk;
}

// What a consumer attends: a row of the chunk, or -1, and which box of that query block.
struct Member {
    int row, box;
};
__device__ __forceinline__ Member member_of(const Params& params, const SharedStorage& shared, int rows, int group, int i) {
    const int boxes = params.keys.boxes, index = group * kConsumers + i;
    if (boxes == 1) return {shared.matched[group][i], 0};
    if (index >= rows * boxes) return {-1, 0};
    return {index / boxes, index % boxes};
}

// How long a group takes, in tiles.
__device__ __forceinline__ int work_of(const Params& params, const SharedStorage& shared, int rows, int group) {
    int work = 0;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
        const int row = member_of(params, shared, rows, group, i).row;
        if (row >= 0) work = max(work, shared.count[row]);
    }
    return work;
}

// The keys of a word that are of a kind.
__device__ __forceinline__ uint32_t of_kind(int kind, const uint32_t (&selected)[kConsumers]) {
    uint32_t bits = kAllLanes;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) bits &= kind >> i & 1 ? selected[i] : ~selected[i];
    return bits;
}

// Writes the tile that a lane found in its place in the list.
//
// Tiles that several of the group share and tiles of one alone are spread evenly over the list, so that all consumers advance
// alike, and each kind is in ascending order, so that thread blocks that run at the same time read the same keys: tile p of n
// of a kind has its place at (2p + 1) / 2n of the list, and follows as many tiles of every other kind as have a place before.
__device__ __forceinline__ void write_tile(const Params& params, const Listing& listing, int entry, KeyTile* tiles) {
    const auto [key, kind, rank] = listing.found[entry];
    const int of_kind = listing.total[kind], twice = 2 * of_kind;
    const float inverse = 1.0f / twice;
    int place = rank;
#pragma unroll
    for (int other = 1; other < kKinds; ++other) {
        if (other == kind) continue;
        // Of equal places the lower kind's comes first. Up to 2^20 tiles the quotient in fp32 is at most one too high or low,
        // so that the rest is small, whatever overflows on the way to it.
        const uint32_t of_other = listing.total[other];
        int quotient = static_cast<int>((float(2 * rank + 1) * of_other + of_kind) * inverse);
        const int rest = (2 * rank + 1) * of_other + of_kind - (other > kind) - uint32_t(quotient) * twice;
        quotient += rest < 0 ? -1 : rest >= twice ? 1 : 0;
        place += quotient;
    }
    tiles[place] = KeyTile::of(params.keys, key / params.keys.boxes, key % params.keys.boxes, kind);
}

// Writes those tiles of a group that are in some of the words, and returns how many there are in all. One warp.
__device__ int write_tiles(const Params& params, const uint32_t* const (&rows)[kConsumers], int begin, int end, Listing& listing,
                           KeyTile* tiles) {
    const int lane = laneid();
    const int words = words_of(params);
    const uint32_t lower_lanes = (1u << lane) - 1;
    int total[kKinds] = {}, counted[kKinds] = {};
    for (int word = lane; word < words; word += kWarpThreads) {
        uint32_t selected[kConsumers];
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) selected[i] = rows[i][word];
#pragma unroll
        for (int kind = 1; kind < kKinds; ++kind) {
            const int count = __popc(of_kind(kind, selected));
            total[kind] += count;
            if (word < begin) counted[kind] += count;
        }
    }
    int num_tiles = 0;
#pragma unroll
    for (int kind = 1; kind < kKinds; ++kind) {
        total[kind] = __reduce_add_sync(kAllLanes, total[kind]);
        counted[kind] = __reduce_add_sync(kAllLanes, counted[kind]);
        num_tiles += total[kind];
        if (lane == 0) listing.total[kind] = total[kind];
    }

    int found = 0, written = 0;
    for (int first = begin; first < end; first += kWarpThreads) {
        // A lane counts in its word what each kind has there.
        uint32_t own[kConsumers];
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) own[i] = first + lane < end ? rows[i][first + lane] : 0;
#pragma unroll
        for (int kind = 1; kind < kKinds; ++kind) {
            const int count = __popc(of_kind(kind, own)), before = counted[kind] + sum_before(count);
            listing.before[lane][kind] = before;
            counted[kind] = __shfl_sync(kAllLanes, before + count, kWarpThreads - 1);
        }
        __syncwarp();
        // A lane takes a bit of each word. What is found is gathered, so that all lanes have a tile to write.
        for (int word = first; word < min(end, first + kWarpThreads); ++word) {
            uint32_t selected[kConsumers], any = 0;
            int kind = 0;
#pragma unroll
            for (int i = 0; i < kConsumers; ++i) {
                selected[i] = rows[i][word];
                any |= selected[i];
                kind |= int(selected[i] >> lane & 1) << i;
            }
            if (kind != 0) {
                const int rank = listing.before[word - first][kind] + __popc(of_kind(kind, selected) & lower_lanes);
                listing.found[(found + __popc(any & lower_lanes)) % (2 * kWarpThreads)] = {word * 32 + lane, kind, rank};
            }
            found += __popc(any);
            __syncwarp();
            if (found - written >= kWarpThreads) {
                write_tile(params, listing, (written + lane) % (2 * kWarpThreads), tiles);
                written += kWarpThreads;
                __syncwarp();
            }
        }
    }
    if (lane < found - written) write_tile(params, listing, (written + lane) % (2 * kWarpThreads), tiles);
    __syncwarp();
    return num_tiles;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 3) plan_forward(const __grid_constant__ Params params) {
    extern __shared__ __align__(16) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const int warp = warpid(), lane = laneid();
    const int chunk = blockIdx.x % params.chunks_per_head, head = blockIdx.x / params.chunks_per_head;
    const int first_row = chunk * params.rows_per_chunk;
    const int rows = max(0, min(params.rows_per_chunk, params.num_q_blocks - first_row));
    const int num_groups = groups_of(params, rows);
    // An odd stride keeps rows apart in the banks. After the rows there is one that selects nothing.
    const int words = words_of(params), stride = words | 1;
    if (blockIdx.x == 0 && threadIdx.x == 0) *params.next = 0;

    // What the rows select.
    for (int i = threadIdx.x; i < (rows + 1) * stride; i += kThreads) shared.selected[i] = 0;
    __syncthreads();
    read_rows(params, rows, int64_t(head) * params.num_q_blocks + first_row, stride, shared);
    __syncthreads();

    if (params.keys.boxes == 1) {
        compare_rows(rows, words, stride, shared);
        __syncthreads();
        if (warp == 0) match_rows(rows, num_groups, params.groups_per_chunk, shared);
        __syncthreads();
    }

    // Group i of every chunk of a head comes before group i + 1 of any. Where there are few groups, each has several warps.
    const int warps_of_group = max(1, kWarps / params.groups_per_chunk);
    const int words_of_warp = (words + warps_of_group - 1) / warps_of_group;
    for (int task = warp; task < params.groups_per_chunk * warps_of_group; task += kWarps) {
        const int group = task % params.groups_per_chunk, begin = task / params.groups_per_chunk * words_of_warp;
        int place = group;
        if (group < num_groups) {
            const int work = work_of(params, shared, rows, group);
            place = 0;
            for (int other = lane; other < num_groups; other += kWarpThreads) {
                const int more = work_of(params, shared, rows, other) - work;
                place += more > 0 || (more == 0 && other < group);
            }
            place = __reduce_add_sync(kAllLanes, place);
        }
        const int64_t slot = (int64_t(head) * params.groups_per_chunk + place) * params.chunks_per_head + chunk;
        Group planned = {};
        const uint32_t* selected[kConsumers];
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) {
            const Member member = member_of(params, shared, rows, group, i);
            const bool exists = member.row >= 0;
            selected[i] = shared.selected + (exists ? member.row : rows) * stride;
            planned.q_block[i] = exists ? first_row + member.row : -1;
            planned.q_box[i] = member.box;
            planned.tiles_of[i] = exists ? shared.count[member.row] : 0;
            planned.poisoned |= exists ? shared.poisoned[member.row] << i : 0;
        }
        planned.num_tiles = write_tiles(params, selected, begin, min(words, begin + words_of_warp), shared.listings[warp],
                                        params.tiles + slot * params.tiles_per_group);
        if (lane == 0 && begin == 0) params.groups[slot] = planned;
    }
}
