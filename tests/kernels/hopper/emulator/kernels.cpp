// The kernel source itself, compiled for the emulated machine, and its integer arithmetic for the tests.
#include <block_sparse_sm90.cu>

#include "kernels.h"

bool run_kernel(const std::string& name, int ctas, int threads, size_t shared_bytes, uint64_t seed, void** parameters) {
    const auto& q = *static_cast<const hw::TensorMap*>(parameters[0]);
    const auto& k = *static_cast<const hw::TensorMap*>(parameters[1]);
    const auto& v = *static_cast<const hw::TensorMap*>(parameters[2]);
    const auto& problem = *static_cast<const Problem*>(parameters[3]);
    const auto kernel = name == "block_sparse_fp16" ? block_sparse_fp16 : block_sparse_bf16;
    return machine::launch(ctas, threads, shared_bytes, seed, [&] { kernel(q, k, v, problem); });
}

extern "C" {

int emulator_problem_bytes() { return sizeof(Problem); }

// `to`: pair, first query, queries, tiles, clean tiles, entries, then first key and valid keys of `room` entries.
void emulator_item(const Problem* problem, int id, int room, int* to) {
    const Item item = locate(*problem, id);
    const Keys keys = find_keys(*problem, item);
    const int head[6] = {item.pair,        item.first_query,  item.query_count,
                         tile_count(keys), clean_tiles(keys), keys.entries};
    memcpy(to, head, sizeof(head));
    for (int entry = 0; entry < room; ++entry) {
        to[6 + 2 * entry] = first_key(keys, entry);
        to[7 + 2 * entry] = valid_keys(keys, entry);
    }
}
}
