// The work tiles of the pass for dk and dv, and their lists, as the scheduler writes them, one after the other and all kept.
#include "vsa/attend_backward_kv_64.cu"

// As tests/kernels/test_lists.py reads it.
struct ListedRow {
    int batch, row_head, col_head, block, box, num_tiles;
};

// Of the first head of columns that each row names. `dk` points to the listed rows.
void list_rows(const Params& params) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const auto& schedule = params.schedule;
    for (int number = 0; number < schedule.num_work_tiles; ++number) {
        WorkTile<1>& work = shared.work_tiles.slots[0].tile;
        assign_rows(schedule, params.keys, number, 0, shared.scratch.readers, work);
        write_list(schedule.rows, params.queries, work.batch * schedule.heads.value * schedule.rows.group + work.col_head,
                   shared.scratch, work.group, params.lists.tiles + number * params.lists.length);
        if (laneid() == 0) {
            reinterpret_cast<ListedRow*>(params.dk.data)[number] = {
                work.batch, work.row_head, work.col_head, work.group.block[0], work.group.box[0], work.group.num_tiles};
        }
        __syncwarp();
    }
}
