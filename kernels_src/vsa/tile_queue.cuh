// From the lists of key tiles to the consumers: the loaders of both operands, and the queue by which each consumer learns in
// which stages its next tile arrives.
//
// A tile is loaded once, whichever consumers attend it. A stage is free again when all consumers' warps have arrived on
// `empty`; for consumers that do not attend its tile the loader arrives itself, so that these skip the stage. The phase of a
// stage therefore does not tell a consumer whether the next tile is its own: its queue of tickets does.
#pragma once

#include "kittens/shared_tile.cuh"
#include "vsa/scheduler.cuh"

// Where one consumer finds its next tile.
struct StageTicket {
    int k_stage, v_stage;
    int k_phase, v_phase;
    bool is_partial;     // some of its keys are not valid
    bool has_successor;  // the consumer's next tile of the work tile is at most kMaxLookahead tiles later
};

// A ticket as it lies in the queue. The two loaders write a byte each: the stage in five bits, its phase, and for K the rest.
struct PackedTicket {
    static constexpr int kStageMask = 31, kPhaseShift = 5, kPartialShift = 6, kSuccessorShift = 7;
    uint8_t k, v;
};

template <int kConsumers_, int kKStages_, int kVStages_>
struct TileQueue {
    static constexpr int kConsumers = kConsumers_, kKStages = kKStages_, kVStages = kVStages_;
    // A consumer holds one V stage while it waits for its next tile. The V ring fills in order, so that a tile at most this
    // much later gets a stage without the one that is held: waiting for it cannot deadlock.
    static constexpr int kMaxLookahead = kVStages - 1;
    // Entries have no `empty` barrier: an entry is free when the stages that it named are. As many tickets as the longer ring
    // has stages can be outstanding, and the next one is read ahead.
    static constexpr int kLength = kVStages <= 6 ? 8 : 16;
    static_assert(kKStages <= kVStages && kVStages + 1 < kLength && kVStages <= PackedTicket::kStageMask);

    kittens::semaphore full[kConsumers][kLength];
    PackedTicket tickets[kConsumers][kLength];
    uint32_t valid[kVStages];  // of the tile whose V is in the stage, see KeyTile::valid
};

// The first and the second operand of a tile. The loader of K is ahead, since its stages are released earlier.
enum class Operand { kK, kV, kBoth };

template <typename Queue>
__device__ __forceinline__ void init_queue_barriers(Queue& queue, int loaders) {
    for (auto& of_consumer : queue.full) init_all(of_consumer, loaders);
}

// A loader: one warp that loads the tiles of K, of V, or of both, of all work tiles, and issues their tickets. `load(work,
// origin, stage)` starts the copy of one. Where one warp loads both operands, they share a stage, and K's half of the ticket is
// all.
template <Operand operand, int kStages, int kConsumers, int kWorkTiles, typename Queue, typename Load>
__device__ __forceinline__ void load_tiles(const TokenLayout& col_tokens, const TileLists<kConsumers>& lists,
                                           WorkTileQueue<kConsumers, kWorkTiles>& work_tiles, StageBarriers<kStages>& barriers,
                                           Queue& queue, Load load) {
    using kittens::kAllLanes, kittens::kWarpThreads;
    constexpr bool kHasK = operand != Operand::kV, kHasV = operand != Operand::kK;
    static_assert((!kHasK || kStages == Queue::kKStages) && (!kHasV || kStages == Queue::kVStages) && kConsumers <= 4);
    const int lane = kittens::laneid();
    int stage = 0, phase = 0;  // of the next tile
    uint32_t issued = 0;       // tickets of each consumer so far, modulo the queue's length, a byte each
    for_each_work_tile(work_tiles, [&](const WorkTile<kConsumers>& work, const PipelineState<kWorkTiles>& state) {
        const KeyTile<kConsumers>* list = lists.at(state);
        const int num_tiles = work.group.num_tiles;

        // Each lane takes one tile of 32. The list is read two steps ahead, to hide the latency of global memory.
        const auto tile_at = [&](int i) { return i < num_tiles ? list[i] : KeyTile<kConsumers>{}; };
        KeyTile<kConsumers> own = tile_at(lane), next = tile_at(kWarpThreads + lane);
#pragma unroll 1
        for (int first = 0; first < num_tiles; first += kWarpThreads) {
            const KeyTile<kConsumers> later = tile_at(first + 2 * kWarpThreads + lane);
            // Each lane finds the entry of its tile in every consumer's queue, and whether the consumer's next tile is near.
            const int mask = own.consumer_mask(), next_mask = next.consumer_mask();
            const BoxOrigin origin = own.origin(col_tokens);
            uint32_t entries = issued;
#pragma unroll
            for (int i = 0; i < kConsumers; ++i) {
                const uint32_t attended = __ballot_sync(kAllLanes, mask >> i & 1);
                if (kHasK) {
                    const uint64_t follow = __ballot_sync(kAllLanes, next_mask >> i & 1);
                    const bool has_successor = (follow << 32 | attended) >> lane & ((uint64_t(2) << Queue::kMaxLookahead) - 2);
                    entries |= uint32_t(has_successor) << (8 * i + PackedTicket::kSuccessorShift);
                }
                entries += __popc(attended & ((1u << lane) - 1)) << 8 * i;
                issued += __popc(attended) << 8 * i;
            }
            issued &= 0x01010101u * (Queue::kLength - 1);

            // Then the lanes load their tiles in turn.
            const int count = min(kWarpThreads, num_tiles - first);
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
                // Every lane waits, since a free stage also means that the consumers have read the tickets of its previous
                // tile. No lane continues before all have seen this phase: the stage could complete another phase and hide it.
                kittens::semaphore& empty = barriers.empty[stage];
                kittens::wait(empty, phase ^ 1);
                __syncwarp();
                if (lane == i) {
                    const int absent = kConsumers - __popc(mask);
                    if (absent > 0) kittens::arrive(empty, absent * kittens::kWarpgroupWarps);
                    if (kHasV) queue.valid[stage] = own.valid;
                    load(work, origin, stage);
                    uint8_t code = stage | phase << PackedTicket::kPhaseShift;
                    if (kHasK) code |= (own.valid != kWholeBox) << PackedTicket::kPartialShift;
#pragma unroll
                    for (int j = 0; j < kConsumers; ++j) {
                        if (!(mask >> j & 1)) continue;
                        const int entry = entries >> 8 * j & (Queue::kLength - 1);
                        PackedTicket& ticket = queue.tickets[j][entry];
                        if (kHasK) ticket.k = code | (entries >> 8 * j & 1 << PackedTicket::kSuccessorShift);
                        if (!kHasK) ticket.v = code;
                        kittens::arrive(queue.full[j][entry]);
                    }
                }
                if (++stage == kStages) stage = 0, phase ^= 1;
            }
            own = next;
            next = later;
        }
    });
}

// The tickets of one consumer, in order.
template <typename Queue>
struct TicketReader {
    Queue& queue;
    const int consumer;
    uint32_t taken = 0;         // tickets of all work tiles so far
    bool is_known = false;      // the next ticket has been read ahead, and
    StageTicket upcoming = {};  // this is it

    // Whether this lane sees that the next ticket is issued.
    __device__ __forceinline__ bool test_next() const {
        const PipelineState<Queue::kLength> state(taken);
        return kittens::test(queue.full[consumer][state.index], state.phase);
    }

    // Reads the next ticket ahead if every lane has seen that it is issued: no lane may read it on another lane's word.
    __device__ __forceinline__ void look_ahead(bool is_issued) {
        is_known = __all_sync(kittens::kAllLanes, is_issued);
        upcoming = read(is_known);
    }

    // Waits for the next ticket, and takes it.
    __device__ __forceinline__ StageTicket next() {
        if (__builtin_expect(!is_known, 0)) {
            const PipelineState<Queue::kLength> state(taken);
            kittens::wait(queue.full[consumer][state.index], state.phase);
            upcoming = read(true);
        }
        ++taken;
        is_known = false;
        return upcoming;
    }

  private:
    // Lane 0 reads, because lane 0 later arrives on `empty` of both stages: its read precedes the release of the entry.
    __device__ __forceinline__ StageTicket read(bool is_readable) const {
        int packed = 0;
        if (is_readable && kittens::laneid() == 0) {
            const PackedTicket& ticket = queue.tickets[consumer][taken % Queue::kLength];
            packed = ticket.k | ticket.v << 8;
        }
        packed = kittens::broadcast(packed);
        const int k = packed & 255, v = packed >> 8;
        return {k & PackedTicket::kStageMask,
                v & PackedTicket::kStageMask,
                k >> PackedTicket::kPhaseShift & 1,
                v >> PackedTicket::kPhaseShift & 1,
                (k >> PackedTicket::kPartialShift & 1) != 0,
                (k >> PackedTicket::kSuccessorShift & 1) != 0};
    }
};
