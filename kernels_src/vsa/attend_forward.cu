// The forward of the fine branch: every query block attends the keys of its key blocks, online softmax, and the coarse
// output added before the store.
//
// A thread block stays on its multiprocessor and takes one item of work after the other: 64 rows for each of its consumer
// warpgroups, or for some of them. Of the other four warps one schedules: it takes the items and lists the tiles of each while
// the one before is attended. One loads Q, one the tiles of K and one those of V by TMA, into rings of stages, and the
// consumers attend them; a tile that several consumers need is loaded once. A stage is free when every consumer has arrived,
// and for those that have no use for its tile the loader arrives itself, so that a consumer never meets a tile that is not its
// own.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128), VSA_K_STAGES and VSA_V_STAGES.
#include "kittens/tma.cuh"
#include "kittens/warpgroup.cuh"
#include "vsa/listing.cuh"
#include "vsa/softmax.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kKStages = VSA_K_STAGES;
constexpr int kVStages = VSA_V_STAGES;
// Columns of Q that registers hold beside all else; the others are read from shared memory.
constexpr int kQCols = 32;
constexpr float kLn2 = 0.693147181f;
constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;

// Registers for each thread: the launch gives all of them as many, and then the consumers take from the others.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 152;
constexpr int kRegisters = 65536 / kThreads / 8 * 8;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * kRegisters);

using box_tile = st<element, kBoxTokens, kHeadDim>;
using q_fragment = rt<element, 16, kQCols>;
using s_fragment = rt_fl<16, kBoxTokens>;
using p_fragment = rt<element, 16, kBoxTokens>;
using o_fragment = rt_fl<16, kHeadDim>;

// A tensor of tokens.
struct Tensor {
    tensor_map map;
    HeadSteps steps;
};

struct Params {
    Tensor q, k, v;
    element* out;
    element* out_s;          // the output without the coarse part, or null
    int64_t out_strides[3];  // of both: batches, heads, tokens
    Order queries, keys;
    Map selected;
    // Of the first heads of all batches and of the others, whose trios are shorter: so that thread blocks end together.
    Cut cuts[2];
    int first_heads, first_groups;
    KeyTile* lists;  // kItems for each thread block, of list_length each
    int64_t list_length;
    int* next;           // the next item of work: at first the one after the first of every thread block
    float* lse;          // [batch, heads, q_len]
    const float* out_c;  // [batch, heads, num_q_blocks, kHeadDim], or null
    const void* gate;    // of q's shape, or null
    int64_t gate_strides[4];
    float gate_value;
    int gate_is_fp32;
    int num_groups;
    Divisor heads, kv_group;  // query heads, and those that share a key/value head
    int q_len;
    float scale_log2;
};
static_assert(sizeof(Params) == VSA_PARAMS_BYTES, "the host's description of the parameters differs");

// An item of work: a group, and whose. Who attends is known before what.
struct Item {
    Group group;
    Video origin[kConsumers];  // of the boxes of queries
    int batch, head, kv_head;
    int last;  // there is no more work
};
constexpr int kItems = 2;

// A tile for one consumer: where its K and V are. Consumers skip stages that hold no tile of theirs, so that the phase of a
// stage alone does not tell them whether their tile is on its way: the queue does. It is longer than the rings.
struct Ticket {
    int k_stage, v_stage;
    int k_phase, v_phase;
    bool is_partial;    // not every key is valid
    bool next_is_near;  // the consumer's next tile of the item is at most kNear tiles later
};
// A consumer may wait for a tile that is so near while it holds the V of another: the oldest one that is held is never in the
// way of its holder's next.
constexpr int kNear = kVStages - 1;

// As it lies in the queue: five bits of the stages, above them the phases, and for K the rest.
struct PackedTicket {
    static constexpr int kStageMask = 31, kPhaseShift = 5, kPartialShift = 6, kNearShift = 7;
    uint8_t k, v;
};
constexpr int kQueue = kVStages <= 6 ? 8 : 16;
static_assert(kKStages <= kVStages && kVStages + 1 < kQueue);

struct SharedStorage {
    box_tile k[kKStages], v[kVStages];
    box_tile q[kConsumers];
    Item items[kItems];
    Listing listing;
    PackedTicket queue[kConsumers][kQueue];
    uint32_t valid[kVStages];  // tokens of the tile whose V is in the stage, see KeyTile
    semaphore k_full[kKStages], k_empty[kKStages];
    semaphore v_full[kVStages], v_empty[kVStages];
    semaphore queue_full[kConsumers][kQueue];
    semaphore q_full[kConsumers], q_empty[kConsumers];
    semaphore rows_known[kItems], item_full[kItems], item_empty[kItems];
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

// The place of something in a ring of N: which entry, and in which phase of its semaphores.
template <int N>
struct Place {
    uint32_t index, phase;
    __device__ __forceinline__ explicit Place(uint32_t count) : index(count % N), phase(count / N % 2) {}
};

// Waits for two, whose tests take no longer than one where both have ended.
__device__ __forceinline__ void wait_both(semaphore& a, int phase_a, semaphore& b, int phase_b) {
    const bool a_ended = test(a, phase_a), b_ended = test(b, phase_b);
    if (__builtin_expect(!(a_ended && b_ended), 0)) {
        wait(a, phase_a);
        wait(b, phase_b);
    }
}

__device__ __forceinline__ void release(semaphore& empty) {
    if (laneid() == 0) arrive(empty);
}

__device__ __forceinline__ coordinates coordinates_of(const Tensor& tensor, int batch, int head, const Video& at) {
    return {{tensor.steps.channel(batch, head), at.w, at.h, at.t, tensor.steps.outer(batch, head)}};
}

// Starts the load of a box of tokens.
__device__ __forceinline__ void load_box(box_tile& tile, const Tensor& tensor, coordinates from, semaphore& full) {
    tma::expect_bytes(full, box_tile::bytes);
#pragma unroll
    for (int panel = 0; panel < box_tile::panels; ++panel, from.x[0] += box_tile::panel_cols) {
        tma::load_async(tile.panel(panel), tensor.map, from, full);
    }
}

__device__ __forceinline__ KeyTile* list_of(const Params& params, const Place<kItems>& at) {
    return params.lists + (blockIdx.x * kItems + at.index) * params.list_length;
}

// Writes an item but what it attends: who does, by its number. Returns the first row of its head.
__device__ __forceinline__ int64_t write_rows(const Params& params, int number, Listing& listing, Item& item) {
    const Divisor& boxes = params.queries.boxes;
    const bool is_of_first = number < params.first_groups;
    const Cut& cut = params.cuts[is_of_first ? 0 : 1];
    if (!is_of_first) number -= params.first_groups;
    const int of_head = cut.groups.quotient(number), group = number - of_head * cut.groups.value;
    const int bh = of_head + (is_of_first ? 0 : params.first_heads), in_head = boxes.quotient(group);
    const int64_t first_row = int64_t(bh) * params.selected.num_q_blocks;
    find_trio(params.selected, cut, first_row, in_head, listing.trio);

    const int lane = laneid();
    if (lane < kConsumers) {
        const int index = (group - in_head * boxes.value) * kConsumers + lane;
        const int row = boxes.quotient(index), box = index - row * boxes.value;
        const int block = listing.trio.q_block[row], reader = max(0, lane - box);
        listing.reader[lane] = reader;
        listing.length[lane] = reader == lane ? listing.trio.length[row] : 0;
        item.group.q_block[lane] = block;
        item.group.q_box[lane] = box;
        item.origin[lane] = origin_of_box(params.queries, max(block, 0), box);
        item.batch = params.heads.quotient(bh);
        item.head = bh - item.batch * params.heads.value;
        item.kv_head = params.kv_group.quotient(item.head);
    }
    return first_row;
}

// Takes items of work, and lists their tiles.
__device__ void schedule(const Params& params, SharedStorage& shared) {
    // Nobody needs what is there: the page's address is what is far.
    if (laneid() == 0) prefetch(list_of(params, Place<kItems>(0)));
    // The first ones are dealt out: the counter is far.
    int number = blockIdx.x;
    for (int round = 0;; ++round) {
        const Place<kItems> at(round);
        Item& item = shared.items[at.index];
        const bool last = number >= params.num_groups;
        // It is told of when every lane has arrived: none can miss that it is free.
        wait(shared.item_empty[at.index], at.phase ^ 1);
        if (laneid() == 0) item.last = last;
        const int64_t first_row = last ? 0 : write_rows(params, number, shared.listing, item);
        __syncwarp();
        arrive(shared.rows_known[at.index]);
        if (!last) write_list(params.selected, params.keys, first_row, shared.listing, item.group, list_of(params, at));
        arrive(shared.item_full[at.index]);
        if (last) return;
        number = uniform(laneid() == 0 ? atomicAdd(params.next, 1) : 0);
    }
}

// Loads the boxes of queries, as soon as it is known which.
__device__ void load_queries(const Params& params, SharedStorage& shared) {
    int phases = 0;  // of the consumers, a bit each
    for (int round = 0;; ++round) {
        const Place<kItems> at(round);
        const Item& item = shared.items[at.index];
        wait(shared.rows_known[at.index], at.phase);
        if (item.last) return;
#pragma unroll 1
        for (int i = 0; i < kConsumers; ++i) {
            if (item.group.q_block[i] < 0) continue;
            wait(shared.q_empty[i], phases >> i & 1 ^ 1);
            // Every lane has seen it before it is free once more, in the other phase.
            __syncwarp();
            phases ^= 1 << i;
            const coordinates from = coordinates_of(params.q, item.batch, item.head, item.origin[i]);
            if (laneid() == 0) load_box(shared.q[i], params.q, from, shared.q_full[i]);
        }
        __syncwarp();
        arrive(shared.item_empty[at.index]);
    }
}

enum class Operand { kK, kV };

// Loads the tiles of K, or of V.
template <Operand operand>
__device__ void load(const Params& params, SharedStorage& shared) {
    constexpr bool kIsK = operand == Operand::kK;
    constexpr int kStages = kIsK ? kKStages : kVStages;
    const int lane = laneid();
    const Tensor& tensor = kIsK ? params.k : params.v;
    int stage = 0, phase = 0;  // of the next tile
    uint32_t queued = 0;       // tiles of each consumer so far, modulo the queue, a byte each
    for (int round = 0;; ++round) {
        const Place<kItems> from(round);
        const Item& item = shared.items[from.index];
        wait(shared.item_full[from.index], from.phase);
        if (item.last) return;
        const coordinates start = coordinates_of(tensor, item.batch, item.kv_head, {});
        const KeyTile* tiles = list_of(params, from);
        const int num_tiles = item.group.num_tiles;

        // Each lane takes a tile. The list is read long before its tiles' turn, since memory is far.
        const auto tile_at = [&](int i) { return i < num_tiles ? tiles[i] : KeyTile{}; };
        KeyTile own = tile_at(lane), next = tile_at(kWarpThreads + lane);
#pragma unroll 1
        for (int first = 0; first < num_tiles; first += kWarpThreads) {
            const KeyTile later = tile_at(first + 2 * kWarpThreads + lane);
            // A lane finds its place in the queues of the consumers, and whether their next tile is near.
            const int members = own.members(), next_members = next.members();
            uint32_t place = queued;
#pragma unroll
            for (int i = 0; i < kConsumers; ++i) {
                const uint32_t attended = __ballot_sync(kAllLanes, members >> i & 1);
                if (kIsK) {
                    const uint64_t follow = __ballot_sync(kAllLanes, next_members >> i & 1);
                    const bool is_near = (follow << 32 | attended) >> lane & ((uint64_t(2) << kNear) - 2);
                    place |= uint32_t(is_near) << (8 * i + PackedTicket::kNearShift);
                }
                place += __popc(attended & ((1u << lane) - 1)) << 8 * i;
                queued += __popc(attended) << 8 * i;
            }
            queued &= 0x01010101u * (kQueue - 1);

            // Then they load theirs in turn.
            const int count = min(kWarpThreads, num_tiles - first);
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
                // All of them wait: it also tells each that the consumers are done with the entries of the queues. And nobody
                // goes on before all have seen it, since the stage may be free once more then, in the other phase.
                semaphore& empty = (kIsK ? shared.k_empty : shared.v_empty)[stage];
                wait(empty, phase ^ 1);
                __syncwarp();
                if (lane == i) {
                    const int absent = kConsumers - __popc(members);
                    if (absent > 0) arrive(empty, absent * kWarpgroupWarps);
                    if (!kIsK) shared.valid[stage] = own.valid;
                    load_box((kIsK ? shared.k : shared.v)[stage], tensor, {{start.x[0], own.w, own.h, own.t(), start.x[4]}},
                             (kIsK ? shared.k_full : shared.v_full)[stage]);
                    uint8_t code = stage | phase << PackedTicket::kPhaseShift;
                    if (kIsK) code |= (own.valid != KeyTile::kWhole) << PackedTicket::kPartialShift;
#pragma unroll
                    for (int j = 0; j < kConsumers; ++j) {
                        if (!(members >> j & 1)) continue;
                        const int entry = place >> 8 * j & (kQueue - 1);
                        PackedTicket& ticket = shared.queue[j][entry];
                        if (kIsK) ticket.k = code | (place >> 8 * j & 1 << PackedTicket::kNearShift);
                        if (!kIsK) ticket.v = code;
                        arrive(shared.queue_full[j][entry]);
                    }
                }
                if (++stage == kStages) stage = 0, phase ^= 1;
            }
            own = next;
            next = later;
        }
        arrive(shared.item_empty[from.index]);
    }
}

// The tiles of one consumer, in order.
struct TileQueue {
    SharedStorage& shared;
    const int consumer;
    uint32_t taken = 0;     // of all items so far
    bool is_known = false;  // the next one was looked at already, and
    Ticket upcoming = {};   // this is its ticket

    // Whether the next tile is on its way: for a lane, which the others may be ahead of.
    __device__ __forceinline__ bool test_next() const {
        const Place<kQueue> at(taken);
        return test(shared.queue_full[consumer][at.index], at.phase);
    }

    // Looks at the next tile's ticket if the test of every lane has found it on its way: nothing less makes it readable.
    __device__ __forceinline__ void look(bool is_ready) {
        is_known = __all_sync(kAllLanes, is_ready);
        upcoming = read(is_known);
    }

    // Waits until the next tile is on its way, and takes it.
    __device__ __forceinline__ Ticket next() {
        if (__builtin_expect(!is_known, 0)) {
            const Place<kQueue> at(taken);
            wait(shared.queue_full[consumer][at.index], at.phase);
            upcoming = read(true);
        }
        ++taken;
        is_known = false;
        return upcoming;
    }

  private:
    // The lane reads that will say when the stages, and with them the ticket, are free.
    __device__ __forceinline__ Ticket read(bool is_readable) const {
        int packed = 0;
        if (is_readable && laneid() == 0) {
            const PackedTicket& ticket = shared.queue[consumer][taken % kQueue];
            packed = ticket.k | ticket.v << 8;
        }
        packed = uniform(packed);
        const int k = packed & 255, v = packed >> 8;
        return {k & PackedTicket::kStageMask,
                v & PackedTicket::kStageMask,
                k >> PackedTicket::kPhaseShift & 1,
                v >> PackedTicket::kPhaseShift & 1,
                (k >> PackedTicket::kPartialShift & 1) != 0,
                (k >> PackedTicket::kNearShift & 1) != 0};
    }
};

// Scores of keys that are not valid become -inf.
__device__ __forceinline__ void mask(const Order& keys, const uint32_t& valid, s_fragment& scores) {
    // The lane reads that will say when the stage is free.
    const uint32_t packed = uniform(laneid() == 0 ? valid : 0);
#pragma unroll
    for (int first = 0; first < kBoxTokens; first += kWarpThreads) {
        const uint32_t bits = __ballot_sync(kAllLanes, KeyTile::is_valid(keys, packed, first + laneid()));
#pragma unroll
        for (int i = 0; i < kWarpThreads / 2; ++i) {
            if (!(bits >> (i / 4 * 8 + i % 2 + laneid() % 4 * 2) & 1)) scores.data[first / 2 + i] = -infinity();
        }
    }
}

// Scores become probabilities, when no product takes those before or adds to the output.
__device__ __forceinline__ void soften(const Params& params, SharedStorage& shared, const Ticket& tile, Softmax& softmax,
                                       s_fragment& scores, p_fragment& p, o_fragment& out) {
    if (__builtin_expect(tile.is_partial, 0)) mask(params.keys, shared.valid[tile.v_stage], scores);
    softmax.exponentiate(p, scores, out);
}

// Attends the tiles of an item, the scores of one under way while the output of the one before is. Where the next is far, the
// run ends, and what is held is given back before the next is waited for. After the last scores Q is given back.
__device__ __forceinline__ void attend(const Params& params, SharedStorage& shared, TileQueue& tiles, int num_tiles,
                                       const q_fragment& q, Softmax& softmax, o_fragment& out) {
    const box_tile& q_shared = shared.q[tiles.consumer];
    semaphore& q_empty = shared.q_empty[tiles.consumer];
    if (num_tiles == 0) {
        __syncwarp();
        release(q_empty);
    }
    s_fragment scores;
    p_fragment p;
    for (int left = num_tiles; left > 0; --left) {
        Ticket before = tiles.next();
        wait(shared.k_full[before.k_stage], before.k_phase);
        warpgroup::mma_fence();
        warpgroup::mm_ABt(scores, q, q_shared, shared.k, before.k_stage);
        warpgroup::mma_commit_group();
        const bool is_next_ready = tiles.test_next();
        warpgroup::mma_async_wait<0>(scores);
        release(shared.k_empty[before.k_stage]);
        tiles.look(is_next_ready);
        soften(params, shared, before, softmax, scores, p, out);
        for (; before.next_is_near; --left) {
            const Ticket tile = tiles.next();
            wait_both(shared.k_full[tile.k_stage], tile.k_phase, shared.v_full[before.v_stage], before.v_phase);
            warpgroup::mma_fence(p);
            warpgroup::mm_ABt(scores, q, q_shared, shared.k, tile.k_stage);
            warpgroup::mma_commit_group();
            warpgroup::mma_AB(out, p, shared.v, before.v_stage);
            warpgroup::mma_commit_group();
            const bool is_next_ready = tiles.test_next();
            warpgroup::mma_async_wait<1>(scores);
            release(shared.k_empty[tile.k_stage]);
            tiles.look(is_next_ready);
            warpgroup::mma_async_wait<0>(out, p);
            release(shared.v_empty[before.v_stage]);
            soften(params, shared, tile, softmax, scores, p, out);
            before = tile;
        }
        wait(shared.v_full[before.v_stage], before.v_phase);
        warpgroup::mma_fence(p);
        warpgroup::mma_AB(out, p, shared.v, before.v_stage);
        warpgroup::mma_commit_group();
        if (left == 1) release(q_empty);
        warpgroup::mma_async_wait<0>(out);
        release(shared.v_empty[before.v_stage]);
    }
}

// Where the rows of a warpgroup go: a lane has two.
struct Rows {
    int batch, head, block;
    int64_t bh;
    Video origin;
    int token[2];
    bool exists[2];  // as tokens of the sequence
    bool valid[2];

    __device__ __forceinline__ Rows(const Params& params, const Item& item, int consumer)
        : batch(item.batch), head(item.head), block(item.group.q_block[consumer]),
          bh(int64_t(batch) * params.heads.value + head), origin(item.origin[consumer]) {
        const Order& queries = params.queries;
        const int box = item.group.q_box[consumer];
        const int size = queries.sizes == nullptr ? kBoxTokens : valid_tokens_of_box(queries, block, box);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = warpgroup::warpid() * 16 + laneid() / 4 + 8 * i;
            const Video inside = position_in_box(queries, row);
            const Video at = {origin.t + inside.t, origin.h + inside.h, origin.w + inside.w};
            exists[i] = at.t < queries.extent.t && at.h < queries.extent.h && at.w < queries.extent.w;
            valid[i] = exists[i] && row < size;
            token[i] = (at.t * queries.extent.h + at.h) * queries.extent.w + at.w;
        }
    }
};

__device__ __forceinline__ float load_gate(const Params& params, int64_t offset) {
    if (params.gate_is_fp32) return static_cast<const float*>(params.gate)[offset];
    return unpack<element>(static_cast<const uint16_t*>(params.gate)[offset]).x;
}

// Adds the coarse output of the query block, weighted.
__device__ __forceinline__ void combine(const Params& params, const Rows& rows, o_fragment& out) {
    const int first_channel = laneid() % 4 * 2;
    const float* out_c = params.out_c + (rows.bh * params.selected.num_q_blocks + rows.block) * kHeadDim;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
        const int row = row_of(i), channel = i / 4 * 8 + first_channel + i % 2;
        if (!rows.valid[row]) continue;
        float weight = params.gate_value;
        if (params.gate != nullptr) {
            weight = load_gate(params, rows.batch * params.gate_strides[0] + rows.head * params.gate_strides[1] +
                                           rows.token[row] * params.gate_strides[2] + channel * params.gate_strides[3]);
        }
        out.data[i] += weight * out_c[channel];
    }
}

// Stores the rows that exist.
__device__ __forceinline__ void store(const Params& params, element* out, const Rows& rows, const o_fragment& values) {
    const auto& strides = params.out_strides;
    element* row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        row[i] = out + rows.batch * strides[0] + rows.head * strides[1] + rows.token[i] * strides[2];
    }
    rt<element, 16, kHeadDim> rounded;
    copy(rounded, values);
    store_rows(row, rows.exists, rounded);
}

__device__ void consume(const Params& params, SharedStorage& shared, int consumer) {
    TileQueue tiles{shared, consumer};
    int q_phase = 0;
    for (int round = 0;; ++round) {
        const Place<kItems> at(round);
        const Item& item = shared.items[at.index];
        wait(shared.item_full[at.index], at.phase);
        if (item.last) return;
        if (item.group.q_block[consumer] < 0) {
            arrive(shared.item_empty[at.index]);
            continue;
        }

        wait(shared.q_full[consumer], q_phase);
        q_phase ^= 1;
        q_fragment q;
        warpgroup::load(q, shared.q[consumer]);
        o_fragment out;
        zero(out);
        Softmax softmax{params.scale_log2};
        attend(params, shared, tiles, item.group.tiles_of[consumer], q, softmax, out);

        // Epilogue
        const Rows rows(params, item, consumer);
        const bool poisoned = item.group.poisoned >> consumer & 1;
        arrive(shared.item_empty[at.index]);
        col_vec& sum = softmax.sum;
        sum_over_lanes(sum);
        col_vec share;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            share[i] = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
            float lse = sum[i] == 0.0f ? -infinity() : softmax.shift[i] * kLn2 + logf(sum[i]);
            if (poisoned) share[i] = lse = not_a_number();
            if (!rows.valid[i]) lse = -infinity();
            if (rows.exists[i] && laneid() % 4 == 0) params.lse[rows.bh * params.q_len + rows.token[i]] = lse;
        }
        mul_row(out, share);
        if (!__all_sync(kAllLanes, rows.valid[0] && rows.valid[1])) {
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) out.data[i] = rows.valid[row_of(i)] ? out.data[i] : 0.0f;
        }
        if (params.out_s != nullptr) store(params, params.out_s, rows, out);
        if (params.out_c != nullptr) combine(params, rows, out);
        store(params, params.out, rows, out);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) attend_forward(const __grid_constant__ Params params) {
    // Setup
    extern __shared__ __align__(1024) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    if (threadIdx.x == 0) {
        // Every consumer's warps arrive when a stage is free, and every thread that writes or reads an item when it has.
        constexpr int kConsumerWarps = kConsumers * kWarpgroupWarps;
        for (semaphore& full : shared.k_full) init_semaphore(full, 1);
        for (semaphore& full : shared.v_full) init_semaphore(full, 1);
        for (semaphore& empty : shared.k_empty) init_semaphore(empty, kConsumerWarps);
        for (semaphore& empty : shared.v_empty) init_semaphore(empty, kConsumerWarps);
        for (semaphore& known : shared.rows_known) init_semaphore(known, kWarpThreads);
        for (semaphore& full : shared.item_full) init_semaphore(full, kWarpThreads);
        for (semaphore& empty : shared.item_empty) init_semaphore(empty, (kConsumerWarps + 3) * kWarpThreads);
        for (semaphore& full : shared.q_full) init_semaphore(full, 1);
        for (semaphore& empty : shared.q_empty) init_semaphore(empty, kWarpgroupWarps);
        for (auto& queue : shared.queue_full) {
            for (semaphore& full : queue) init_semaphore(full, 2);
        }
        fence_init_semaphores();
    }
    __syncthreads();

    const int warpgroup_index = uniform(threadIdx.x / kWarpgroupThreads);
    if (warpgroup_index == kConsumers) {
        warpgroup::decrease_registers<kProducerRegisters>();
        const int warp = warpid() % kWarpgroupWarps;
        if (warp == 0) load<Operand::kK>(params, shared);
        if (warp == 1) load<Operand::kV>(params, shared);
        if (warp == 2) load_queries(params, shared);
        if (warp == 3) schedule(params, shared);
    } else {
        warpgroup::increase_registers<kConsumerRegisters>();
        consume(params, shared, warpgroup_index);
    }
}
