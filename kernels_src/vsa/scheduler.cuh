// Which query boxes a thread block attends together, and in which order it takes them: work tiles, and the warp that prepares
// them for the others.
#pragma once

#include "vsa/pipeline.cuh"
#include "vsa/tile_list.cuh"

// How the rows of a head are divided. Consecutive rows form row groups of at most one row for each consumer; the boxes of a row
// group, row after row, are dealt to as many query groups as a block has boxes. Consecutive rows select similar columns, so
// their query group loads few tiles, but it ends with its longest row. Therefore consecutive row groups form a window, whose
// rows are dealt out from the longest to the shortest, and rows of nearly the same length keep their order.
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
    // Of the first heads (of all batches), and of the others, whose row groups are shorter so that thread blocks end together.
    HeadPartition partitions[2];
    int first_heads, first_groups;
    int num_groups;           // work tiles in all
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

// Finds the blocks of a row group. Groups are numbered window by window first, so that all windows begin with their longer row
// groups. One warp.
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

    // The rows that the group has where all rows of the window are alike: they are prefetched before that is known.
    const int lane = kittens::laneid(), row = begin + lane / kLanesPerRow<kConsumers>;
    const int entry = lane % kLanesPerRow<kConsumers> * kEntriesPerLine;
    if (row < end && entry < rows.capacity(first_row + first + row))
        kittens::prefetch(rows.row(first_row + first + row) + entry);
    // Each lane ranks one row of the window. Lengths count as equal where exponent and upper three bits of the mantissa are.
    const int length = lane < num_rows ? rows.length(first_row + first + lane) : 0;
    const int work = lane < num_rows ? __float_as_int(float(length)) >> 20 : -1;
    const int work_of_first = kittens::uniform(work);
    int rank = lane;
    if (__builtin_expect(__any_sync(kittens::kAllLanes, work >= 0 && work != work_of_first), 0)) {
        rank = 0;
#pragma unroll 1
        for (int other = 0; other < kittens::kWarpThreads; ++other) {
            const int work_of_other = __shfl_sync(kittens::kAllLanes, work, other);
            rank += work_of_other > work || (work_of_other == work && other < lane);
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
__device__ __forceinline__ int64_t assign_rows(const Schedule<Index>& schedule, const TokenLayout& queries, int number,
                                               RowReaders<kConsumers>& readers, WorkTile<kConsumers>& work) {
    const Divisor& boxes = queries.boxes;
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
        work.origin[lane] = origin_of_box(queries, max(block, 0), box);
        work.batch = schedule.heads.quotient(bh);
        work.head = bh - work.batch * schedule.heads.value;
        work.kv_head = schedule.kv_group.quotient(work.head);
    }
    return first_row;
}

// The scheduler: one warp that takes work tiles and writes their lists while the others attend the ones before.
template <int kConsumers, int kWorkTiles, typename Index>
__device__ void schedule_work_tiles(const Schedule<Index>& schedule, const TokenLayout& queries, const TokenLayout& keys,
                                    const TileLists<kConsumers>& lists, TileListScratch<kConsumers>& scratch,
                                    WorkTileQueue<kConsumers, kWorkTiles>& work_tiles) {
    // Warms the TLB for the page of the lists; the data is not needed.
    if (kittens::laneid() == 0) kittens::prefetch(lists.at(PipelineState<kWorkTiles>(0)));
    // The first work tiles are dealt out, since reading the counter takes long.
    int number = blockIdx.x;
    for (int round = 0;; ++round) {
        const PipelineState<kWorkTiles> state(round);
        WorkTile<kConsumers>& work = work_tiles.tiles[state.index];
        const bool last = number >= schedule.num_groups;
        // The barriers below complete only when every lane has arrived, so that no lane can miss this phase.
        kittens::wait(work_tiles.empty[state.index], state.phase ^ 1);
        if (kittens::laneid() == 0) work.last = last;
        const int64_t first_row = last ? 0 : assign_rows(schedule, queries, number, scratch.readers, work);
        __syncwarp();
        kittens::arrive(work_tiles.rows_known[state.index]);
        if (!last) write_list(schedule.rows, keys, first_row, scratch, work.group, lists.at(state));
        kittens::arrive(work_tiles.full[state.index]);
        if (last) return;
        number = kittens::uniform(kittens::laneid() == 0 ? atomicAdd(schedule.next, 1) : 0);
    }
}
