// The work tiles and their lists, as the scheduler writes them, one after the other and all kept.
#include "vsa/attend_forward.cu"

// As tests/kernels/test_lists.py reads it.
static_assert(sizeof(WorkTile<kConsumers>) == 26 * sizeof(int));

template <typename Index>
void list_all(const Params& params, const Schedule<Index>& schedule) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    for (int number = 0; number < schedule.num_work_tiles; ++number) {
        WorkTile<kConsumers>& work = shared.work_tiles.tiles[0];
        assign_rows(schedule, params.queries, number, 0, shared.scratch.readers, work);
        KeyTile<kConsumers>* list = params.lists.tiles + number * params.lists.length;
        write_list(schedule.rows, params.keys, work.batch * schedule.heads.value + work.row_head, shared.scratch, work.group,
                   list);
        if (laneid() == 0) reinterpret_cast<WorkTile<kConsumers>*>(params.lse)[number] = work;
        __syncwarp();
    }
}

// Of a table or, where `coarse.out_c` points to them, of the bits of an inverse. `coarse.gate` then points to the order of its
// rows.
void list_groups(const Params& params) {
    if (params.coarse.out_c == nullptr) return list_all(params, params.schedule);
    const auto& [rows, partitions, first_heads, first_groups, num_work_tiles, heads, kv_group, next] = params.schedule;
    const IndexBits bits{reinterpret_cast<const uint32_t*>(params.coarse.out_c),
                         static_cast<const int*>(params.coarse.gate),
                         (rows.num_cols + 31) / 32,
                         rows.num_rows,
                         rows.num_cols,
                         1};
    const Schedule<IndexBits> inverse{
        bits, {partitions[0], partitions[1]}, first_heads, first_groups, num_work_tiles, heads, kv_group, next};
    list_all(params, inverse);
}
