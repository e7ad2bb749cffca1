// The work tiles and their lists, as the scheduler writes them, one after the other and all kept.
#include "vsa/attend_forward.cu"

// As tests/kernels/test_lists.py reads it.
#if !VSA_SEGMENTS
static_assert(sizeof(WorkTile<kConsumers>) == 28 * sizeof(int));
#endif

void list_groups(const Params& params) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const auto& schedule = params.schedule;
    for (int number = 0; number < schedule.num_work_tiles; ++number) {
        WorkTile<kConsumers>& work = shared.work_tiles.slots[0].tile;
        assign_rows(schedule, params.queries, number, 0, shared.scratch.readers, work);
        KeyTile<kConsumers>* list = params.lists.tiles + number * params.lists.length;
        write_list(schedule.rows, params.keys, work.batch * schedule.heads.value + work.row_head, shared.scratch, work.group,
                   list);
        if (laneid() == 0) reinterpret_cast<WorkTile<kConsumers>*>(params.lse)[number] = work;
        __syncwarp();
    }
}
