// The work tiles and their lists, as the scheduler writes them, one after the other and all kept.
#include "vsa/attend_forward.cu"

// As tests/kernels/test_lists.py reads it.
static_assert(sizeof(WorkTile<kConsumers>) == 24 * sizeof(int));

template <typename Index>
void list_all(const Params& params, const Schedule<Index>& schedule) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    for (int number = 0; number < schedule.num_work_tiles; ++number) {
        WorkTile<kConsumers>& work = shared.work_tiles.tiles[0];
        const int64_t first_row = assign_rows(schedule, params.queries, number, shared.scratch.readers, work);
        __syncwarp();
        KeyTile<kConsumers>* list = params.lists.tiles + number * params.lists.length;
        write_list(schedule.rows, params.keys, first_row, shared.scratch, work.group, list);
        if (laneid() == 0) reinterpret_cast<WorkTile<kConsumers>*>(params.lse)[number] = work;
        __syncwarp();
    }
}

// Of a table or, where `coarse.out_c` points to the offsets of its rows, of compressed sparse rows.
void list_groups(const Params& params) {
    if (params.coarse.out_c == nullptr) return list_all(params, params.schedule);
    const auto& [rows, partitions, first_heads, first_groups, num_work_tiles, heads, kv_group, next] = params.schedule;
    const IndexCsr csr{rows.idx, reinterpret_cast<const int64_t*>(params.coarse.out_c), rows.num_rows, rows.num_cols};
    const Schedule<IndexCsr> inverse{
        csr, {partitions[0], partitions[1]}, first_heads, first_groups, num_work_tiles, heads, kv_group, next};
    list_all(params, inverse);
}
