// Which query boxes a thread block attends together, and in which order it takes them: work tiles, and the warp that prepares
// them for the others.
#pragma once

#include "vsa/pipeline.cuh"
#include "vsa/tile_list.cuh"

// How the rows of a head are divided into row groups of at most one row for each consumer. The boxes of a row group, row after
// row, are dealt to as many query groups as a block needs consumers.
//
// Two things make a group fast: neighbouring rows, which select the same columns, so that its list is short; and rows of equal
// length, because all its consumers wait for the one with the longest row. Therefore the rows of a head are cut into windows of
// consecutive rows, and within a window they are dealt to its groups from the longest row to the shortest. Rows of nearly the
// same length count as equal and stay in order.
struct HeadPartition {
    Divisor query_groups;                  // of a head
#if VSA_SEGMENTS
    int first_row, end_row;                // of the rows that are divided
#endif
    int group_rows, longer_groups;         // rows of a row group, and how many row groups have one more
    Divisor windows;                       // of a head
    int window_groups, longer_windows;     // row groups of a window, and how many windows have one more
};

// How all query boxes of all heads are numbered as work tiles.
template <typename Index>
struct Schedule {
    Index rows;
    // partitions[0] divides the first heads, counted over all batches. partitions[1] divides the others into row groups of one
    // row less, so that the last round of thread blocks ends together. Of segments, both leave out the first rows, which are
    // long: partitions[2] divides those of all heads, and their work tiles come before all others, so that none ends last.
#if VSA_SEGMENTS
    HeadPartition partitions[3];
    int num_long_tiles;
#else
    HeadPartition partitions[2];
#endif
    int first_heads, first_groups;
    int num_work_tiles;       // of all heads
    Divisor heads, kv_group;  // heads of rows, and those that share one head of columns
    // How many consumers a block needs, each of which takes so many boxes. attend_backward_qkv.cu counts two warpgroups with a
    // box each as one consumer here.
    Divisor consumers;
    int boxes_of_consumer;
    int* taken;  // work tiles that were taken beside the first of each thread block, initially 0

    // Of a work tile, whose number becomes that among those of the partition.
    __device__ __forceinline__ int partition_of(int& number) const {
#if VSA_SEGMENTS
        if (number < num_long_tiles) return 2;
        number -= num_long_tiles;
#endif
        if (number < first_groups) return 0;
        number -= first_groups;
        return 1;
    }
};

// A work tile: the boxes of one group of rows of one head, and the columns of one head that they name. The side of the rows is
// published first, so that their boxes load while the list of columns is still being built. Where rows name columns of several
// heads, as many work tiles of the same rows follow each other.
template <int kConsumers>
struct WorkTile {
    QueryGroup<kConsumers> group;
    BoxOrigin origin[kConsumers];  // of the boxes of the rows
    int batch, row_head, col_head;
    int is_first, is_last;  // of those with the same rows
    int row_phase;  // of the barriers of the rows' boxes, if all work tiles have those of a row
    int round;  // how many work tiles of this thread block came before it
    int ends;  // there is no more work, and the rest is not set
};

// Work tiles that the scheduler has taken and the other warps have not finished.
template <int kConsumers, int kWorkTiles>
struct WorkTileQueue {
    // Beside each other, so that one address leads to all of it.
    struct Slot {
        WorkTile<kConsumers> tile;
        // `rows_known`: the query side is written. `full`: the list of key tiles is, too.
        kittens::semaphore rows_known, full, empty;
    } slots[kWorkTiles];
};

// `warps`: all that read work tiles.
template <int kConsumers, int kWorkTiles>
__device__ __forceinline__ void init_work_tile_barriers(WorkTileQueue<kConsumers, kWorkTiles>& work_tiles, int warps) {
    for (auto& slot : work_tiles.slots) {
        kittens::init_semaphore(slot.rows_known, kittens::kWarpThreads);
        kittens::init_semaphore(slot.full, kittens::kWarpThreads);
        kittens::init_semaphore(slot.empty, warps * kittens::kWarpThreads);
    }
}

// Calls `visit(work, state)` for one work tile after the other when its list is written, and gives it back after that.
template <int kConsumers, int kWorkTiles, typename Visit>
__device__ __forceinline__ void for_each_work_tile(WorkTileQueue<kConsumers, kWorkTiles>& work_tiles, Visit visit) {
    for (int round = 0;;) {
        const PipelineState<kWorkTiles> state(round);
        const WorkTile<kConsumers>& work = work_tiles.slots[state.index].tile;
        kittens::wait(work_tiles.slots[state.index].full, state.phase);
        if (work.ends) return;
        visit(work, state);
        // Read again, so that no register keeps it meanwhile.
        round = work.round + 1;
        kittens::arrive(work_tiles.slots[state.index].empty);
    }
}

// The lists of key tiles in global memory, one for each work tile that a thread block has at a time.
template <int kConsumers>
struct TileLists {
    KeyTile<kConsumers>* tiles;
    int64_t length;  // of each list

    template <int kWorkTiles>
    __device__ __forceinline__ KeyTile<kConsumers>* at(const PipelineState<kWorkTiles>& work) const {
        return tiles + (blockIdx.x * kWorkTiles + work.index) * length;
    }
};

// Where the rows of a row group begin, in the order in which rows are dealt out.
__device__ __forceinline__ int first_row_of(const HeadPartition& partition, int num_rows, int group) {
    const int row = group * partition.group_rows + min(group, partition.longer_groups);
#if VSA_SEGMENTS
    return min(partition.first_row + row, partition.end_row);
#else
    return min(row, num_rows);
#endif
}

// Finds the blocks of a row group. Number n is group n / windows of window n % windows, so that the groups with the longest
// rows of every window come first. One warp.
template <int kConsumers>
__device__ __forceinline__ void find_row_group(const IndexTable& rows, const HeadPartition& partition, int head, int number,
                                               RowGroup<kConsumers>& group) {
    const int in_window = partition.windows.quotient(number), window = number - in_window * partition.windows.value;
    const int first_group = window * partition.window_groups + min(window, partition.longer_windows);
    const int end_group = first_group + partition.window_groups + (window < partition.longer_windows);
    const auto start = [&](int group) { return first_row_of(partition, rows.num_rows, group); };
    const int first = start(first_group), num_rows = start(end_group) - first;
    const int begin = start(first_group + in_window) - first, end = start(first_group + in_window + 1) - first;

    // Prefetches the rows that the group has if all rows of the window are of the same length, before it is known whether they
    // are.
    const int lane = kittens::laneid(), row = begin + lane / kLanesPerRow<kConsumers>;
    const int entry = lane % kLanesPerRow<kConsumers> * kEntriesPerLine;
    if (row < end && entry < rows.width) kittens::prefetch(rows.at(head, rows.ordered(first + row)) + entry);
    // Each lane ranks one row of the window.
    const int block = lane < num_rows ? rows.ordered(first + lane) : -1;
    const int length = lane < num_rows ? rows.length(head, block) : 0;
    const int length_class = lane < num_rows ? length_class_of(length) : -1;
    const int first_class = kittens::broadcast(length_class);
    int rank = lane;
    if (__builtin_expect(__any_sync(kittens::kAllLanes, length_class >= 0 && length_class != first_class), 0)) {
        rank = 0;
#pragma unroll 1
        for (int other = 0; other < kittens::kWarpThreads; ++other) {
            const int other_class = __shfl_sync(kittens::kAllLanes, length_class, other);
            rank += other_class > length_class || (other_class == length_class && other < lane);
        }
    }
    const int in_group = rank - begin;
    if (in_group >= 0 && in_group < kConsumers) {
        group.block[in_group] = rank < end ? block : -1;
        group.length[in_group] = rank < end ? length : 0;
    }
    __syncwarp();
}

// The same where the order of the rows is known.
template <int kConsumers>
__device__ __forceinline__ void find_row_group(const IndexBits& rows, const HeadPartition& partition, int head, int number,
                                               RowGroup<kConsumers>& group) {
    const int lane = kittens::laneid();
    const int row = first_row_of(partition, rows.num_rows, number) + lane;
    if (lane < kConsumers) {
        const bool exists = row < first_row_of(partition, rows.num_rows, number + 1);
        group.block[lane] = exists ? rows.order[int64_t(head) * rows.num_rows + row] : -1;
        group.length[lane] = exists;
    }
    __syncwarp();
}

// Sets the side of the rows of a work tile, and how its rows are read. `part` counts the heads of columns that the rows name.
// One warp.
template <int kConsumers, typename Index>
__device__ __forceinline__ void assign_rows(const Schedule<Index>& schedule, const TokenLayout& row_tokens, int number,
                                            int part, RowReaders<kConsumers>& readers, WorkTile<kConsumers>& work) {
    const Divisor& consumers = schedule.consumers;
    const int which = schedule.partition_of(number);
    const HeadPartition& partition = schedule.partitions[which];
    const int of_head = partition.query_groups.quotient(number), group = number - of_head * partition.query_groups.value;
    const int bh = of_head + (which == 1 ? schedule.first_heads : 0), row_group = consumers.quotient(group);
    find_row_group(schedule.rows, partition, bh, row_group, readers.rows);

    const int lane = kittens::laneid();
    if (lane < kConsumers) {
        const int index = (group - row_group * consumers.value) * kConsumers + lane;
        const int row = consumers.quotient(index), of_block = index - row * consumers.value;
        const int block = readers.rows.block[row], reader = max(0, lane - of_block);
        const int box = of_block * schedule.boxes_of_consumer;
        readers.reader[lane] = reader;
        readers.length[lane] = reader == lane ? readers.rows.length[row] : 0;
        work.group.block[lane] = block;
        work.group.box[lane] = box;
        work.origin[lane] = origin_of_box(row_tokens, max(block, 0), box);
        work.batch = schedule.heads.quotient(bh);
        work.row_head = bh - work.batch * schedule.heads.value;
        work.col_head = schedule.kv_group.quotient(work.row_head) * schedule.rows.col_heads() + part;
        work.is_first = part == 0;
        work.is_last = part == schedule.rows.col_heads() - 1;
    }
    __syncwarp();
}

// The scheduler: one warp that takes work tiles and writes their lists while the others attend the ones before. In the forward
// the tokens of rows are the queries, and those of columns the keys.
template <int kConsumers, int kWorkTiles, typename Index>
__device__ void schedule_work_tiles(const Schedule<Index>& schedule, const TokenLayout& row_tokens,
                                    const TokenLayout& col_tokens, const TileLists<kConsumers>& lists,
                                    TileListScratch<kConsumers>& scratch, WorkTileQueue<kConsumers, kWorkTiles>& work_tiles) {
    // Warms the TLB for the page of the lists; the data is not needed.
    if (kittens::laneid() == 0) kittens::prefetch(lists.at(PipelineState<kWorkTiles>(0)));
    // The first work tiles are dealt out, since reading the counter takes long.
    int number = blockIdx.x, part = 0;
    for (int round = 0;; ++round) {
        const PipelineState<kWorkTiles> state(round);
        WorkTile<kConsumers>& work = work_tiles.slots[state.index].tile;
        const bool ends = number >= schedule.num_work_tiles;
        // No __syncwarp is needed after this wait: `rows_known` and `full` complete only when all 32 lanes have arrived, so
        // that the slot cannot be released, and this phase pass, before every lane has seen it.
        kittens::wait(work_tiles.slots[state.index].empty, state.phase ^ 1);
        if (kittens::laneid() == 0) {
            work.ends = ends;
            work.round = round;
        }
        if (!ends) assign_rows(schedule, row_tokens, number, part, scratch.readers, work);
        if (Index::kHasRowPhases && kittens::laneid() == 0) {
            const auto& before = work_tiles.slots[PipelineState<kWorkTiles>(round + kWorkTiles - 1).index].tile;
            work.row_phase = round == 0 ? 0 : before.row_phase ^ (part == 0);
        }
        __syncwarp();
        kittens::arrive(work_tiles.slots[state.index].rows_known);
        if (!ends) {
            const int head = work.batch * schedule.heads.value + work.row_head;
            write_list(schedule.rows, col_tokens, head * schedule.rows.col_heads() + part, scratch, work.group,
                       lists.at(state));
        }
        kittens::arrive(work_tiles.slots[state.index].full);
        if (ends) return;
        if (++part == schedule.rows.col_heads()) {
            part = 0;
            number =
                kittens::num_thread_blocks() + kittens::broadcast(kittens::laneid() == 0 ? atomicAdd(schedule.taken, 1) : 0);
        }
    }
}

// Loads the boxes of the rows of each work tile as soon as they are known: `load(work, i)` does that for consumer i. Of work
// tiles with the same rows, the first one's are kept for the others.
template <int kConsumers, int kWorkTiles, typename Load>
__device__ __forceinline__ void load_row_boxes(WorkTileQueue<kConsumers, kWorkTiles>& work_tiles,
                                               StageBarriers<kConsumers>& barriers, Load load) {
    int phases = 0;  // of the consumers' boxes, a bit each
    for (int round = 0;; ++round) {
        const PipelineState<kWorkTiles> state(round);
        const WorkTile<kConsumers>& work = work_tiles.slots[state.index].tile;
        kittens::wait(work_tiles.slots[state.index].rows_known, state.phase);
        if (work.ends) return;
#pragma unroll 1
        for (int i = 0; i < kConsumers; ++i) {
            if (work.group.block[i] < 0 || !work.is_first) continue;
            kittens::wait(barriers.empty[i], phases >> i & 1 ^ 1);
            // Every lane has seen the phase before the load can lead to the next one.
            __syncwarp();
            phases ^= 1 << i;
            if (kittens::laneid() == 0) load(work, i);
        }
        __syncwarp();
        kittens::arrive(work_tiles.slots[state.index].empty);
    }
}
