// Which query boxes a thread block attends together, and in which order it takes them: work tiles, and the warp that prepares
// them for the others.
#pragma once

#include "vsa/pipeline.cuh"
#include "vsa/tile_list.cuh"

// How the rows of a head are divided into row groups of at most one row for each consumer. The boxes of a row group, row after
// row, are dealt to as many query groups as a block has boxes.
//
// Two things make a group fast: neighbouring rows, which select the same columns, so that its list is short; and rows of equal
// length, because all its consumers wait for the one with the longest row. Therefore the rows of a head are cut into windows of
// consecutive rows, and within a window they are dealt to its groups from the longest row to the shortest. Rows of nearly the
// same length count as equal and stay in order.
struct HeadPartition {
    Divisor query_groups;                  // of a head
    int group_rows, longer_groups;         // rows of a row group, and how many row groups have one more
    Divisor windows;                       // of a head
    int window_groups, longer_windows;     // row groups of a window, and how many windows have one more
};

// How all query boxes of all heads are numbered as work tiles.
template <typename Index>
struct Schedule {
    Index rows;
    // partitions[0] divides the first heads, counted over all batches. partitions[1] divides the others into row groups of one
    // row less, so that the last round of thread blocks ends together.
    HeadPartition partitions[2];
    int first_heads, first_groups;
    int num_work_tiles;       // of all heads
    Divisor heads, kv_group;  // query heads, and query heads of one key/value head
    int* next;                // the next work tile, initially the number of thread blocks
};

// A work tile: the query boxes of one group of one head. The query side is published first, so that Q loads while the list of
// key tiles is still being built.
template <int kConsumers>
struct WorkTile {
    QueryGroup<kConsumers> group;
    Extent3 origin[kConsumers];  // of the query boxes
    int batch, head, kv_head;
    int last;  // there is no more work, and the rest is not set
};

// Work tiles that the scheduler has taken and the other warps have not finished.
template <int kConsumers, int kWorkTiles>
struct WorkTileQueue {
    WorkTile<kConsumers> tiles[kWorkTiles];
    // `rows_known`: the query side is written. `full`: the list of key tiles is, too.
    kittens::semaphore rows_known[kWorkTiles], full[kWorkTiles], empty[kWorkTiles];
};

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

// Finds the blocks of a row group. Number n is group n / windows of window n % windows, so that the groups with the longest
// rows of every window come first. One warp.
template <int kConsumers, typename Index>
__device__ __forceinline__ void find_row_group(const Index& rows, const HeadPartition& partition, int64_t first_row, int number,
                                               RowGroup<kConsumers>& group) {
    const auto first_row_of = [&](int i) {
        return min(i * partition.group_rows + min(i, partition.longer_groups), rows.num_rows);
    };
    const int in_window = partition.windows.quotient(number), window = number - in_window * partition.windows.value;
    const int first_group = window * partition.window_groups + min(window, partition.longer_windows);
    const int end_group = first_group + partition.window_groups + (window < partition.longer_windows);
    const int first = first_row_of(first_group), num_rows = first_row_of(end_group) - first;
    const int begin = first_row_of(first_group + in_window) - first, end = first_row_of(first_group + in_window + 1) - first;

    // Prefetches the rows that the group has if all rows of the window are of the same length, before it is known whether they
    // are.
    const int lane = kittens::laneid(), row = begin + lane / kLanesPerRow<kConsumers>;
    const int entry = lane % kLanesPerRow<kConsumers> * kEntriesPerLine;
    if (row < end && entry < rows.capacity(first_row + first + row))
        kittens::prefetch(rows.row(first_row + first + row) + entry);
    // Each lane ranks one row of the window. Lengths count as equal where exponent and upper three bits of the mantissa are.
    const int length = lane < num_rows ? rows.length(first_row + first + lane) : 0;
    const int length_class = lane < num_rows ? __float_as_int(float(length)) >> 20 : -1;
    const int first_class = kittens::uniform(length_class);
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
        group.block[in_group] = rank < end ? first + lane : -1;
        group.length[in_group] = rank < end ? length : 0;
    }
    __syncwarp();
}

// Sets the query side of a work tile, and how its rows are read. Returns the first row of its head. One warp.
template <int kConsumers, typename Index>
__device__ __forceinline__ int64_t assign_rows(const Schedule<Index>& schedule, const TokenLayout& row_tokens, int number,
                                               RowReaders<kConsumers>& readers, WorkTile<kConsumers>& work) {
    const Divisor& boxes = row_tokens.boxes;
    const bool in_first = number < schedule.first_groups;
    const HeadPartition& partition = schedule.partitions[in_first ? 0 : 1];
    if (!in_first) number -= schedule.first_groups;
    const int of_head = partition.query_groups.quotient(number), group = number - of_head * partition.query_groups.value;
    const int bh = of_head + (in_first ? 0 : schedule.first_heads), row_group = boxes.quotient(group);
    const int64_t first_row = int64_t(bh) * schedule.rows.num_rows;
    find_row_group(schedule.rows, partition, first_row, row_group, readers.rows);

    const int lane = kittens::laneid();
    if (lane < kConsumers) {
        const int index = (group - row_group * boxes.value) * kConsumers + lane;
        const int row = boxes.quotient(index), box = index - row * boxes.value;
        const int block = readers.rows.block[row], reader = max(0, lane - box);
        readers.reader[lane] = reader;
        readers.length[lane] = reader == lane ? readers.rows.length[row] : 0;
        work.group.block[lane] = block;
        work.group.box[lane] = box;
        work.origin[lane] = origin_of_box(row_tokens, max(block, 0), box);
        work.batch = schedule.heads.quotient(bh);
        work.head = bh - work.batch * schedule.heads.value;
        work.kv_head = schedule.kv_group.quotient(work.head);
    }
    return first_row;
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
    int number = blockIdx.x;
    for (int round = 0;; ++round) {
        const PipelineState<kWorkTiles> state(round);
        WorkTile<kConsumers>& work = work_tiles.tiles[state.index];
        const bool last = number >= schedule.num_work_tiles;
        // No __syncwarp is needed after this wait: `rows_known` and `full` complete only when all 32 lanes have arrived, so
        // that the slot cannot be released, and this phase pass, before every lane has seen it.
        kittens::wait(work_tiles.empty[state.index], state.phase ^ 1);
        if (kittens::laneid() == 0) work.last = last;
        const int64_t first_row = last ? 0 : assign_rows(schedule, row_tokens, number, scratch.readers, work);
        __syncwarp();
        kittens::arrive(work_tiles.rows_known[state.index]);
        if (!last) write_list(schedule.rows, col_tokens, first_row, scratch, work.group, lists.at(state));
        kittens::arrive(work_tiles.full[state.index]);
        if (last) return;
        number = kittens::uniform(kittens::laneid() == 0 ? atomicAdd(schedule.next, 1) : 0);
    }
}
