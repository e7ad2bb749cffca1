// The items of work and their lists, as the forward's scheduler writes them, one after the other and all kept.
#include "vsa/attend_forward.cu"

// As tests/kernels/test_lists.py reads it.
static_assert(sizeof(Item) == 24 * sizeof(int));

void list_groups(const Params& params) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    for (int number = 0; number < params.num_groups; ++number) {
        Item& item = shared.items[0];
        const int64_t first_row = write_rows(params, number, shared.listing, item);
        __syncwarp();
        KeyTile* list = params.lists + number * params.list_length;
        write_list(params.selected, params.keys, first_row, shared.listing, item.group, list);
        if (laneid() == 0) reinterpret_cast<Item*>(params.lse)[number] = item;
        __syncwarp();
    }
}
