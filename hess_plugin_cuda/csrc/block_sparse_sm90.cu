// Block-sparse attention for Hopper, head width 64: out and log-sum-exp of every query over the keys its list keeps.
//
// One CTA per multiprocessor works through items of 128 queries. A producer warp loads: the item's queries, then tiles
// of 128 keys, each gathered from two entries of the item's list by two bulk tensor loads, into a ring of stages.
// Two consumer warpgroups hold 64 queries each in registers and multiply: while the tensor cores compute the scores of
// tile t + 1 and add tile t's values, the softmax of t + 1 waits only for the scores. At head width 64 the exponentials
// take as long as the products, so the two warpgroups take turns at issuing products: one's softmax then runs under the
// other's products.
#include <hardware.cuh>

#include "consumer.cuh"
#include "pipeline.cuh"
#include "producer.cuh"
#include "work_items.h"

template <class Type>
__device__ __forceinline__ void run(const hw::TensorMap& query_map, const hw::TensorMap& key_map,
                                    const hw::TensorMap& value_map, const Problem& problem) {
    Shared& shared = *reinterpret_cast<Shared*>(hw::shared_memory());
    if (hw::thread_index() == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            hw::init(shared.keys_full[stage], 1);
            hw::init(shared.values_full[stage], 1);
            hw::init(shared.keys_free[stage], kConsumerWarps);
            hw::init(shared.values_free[stage], kConsumerWarps);
        }
        hw::init(shared.order_full, 1);
        hw::init(shared.order_free, kConsumerWarps);
        hw::publish_barriers();
        hw::prefetch(query_map);
        hw::prefetch(key_map);
        hw::prefetch(value_map);
    }
    hw::sync_cta();
    const int group = hw::from_lane(hw::thread_index() / 128, 0);  // the same for a warp, and known to be
    if (group == 0) {
        hw::give_registers<kProducerRegisters>();
        if (hw::thread_index() < 32) produce(problem, query_map, key_map, value_map, shared);
    } else {
        hw::take_registers<kConsumerRegisters>();
        consume<Type>(problem, shared, group - 1);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    block_sparse_bf16(const __grid_constant__ hw::TensorMap query_map, const __grid_constant__ hw::TensorMap key_map,
                      const __grid_constant__ hw::TensorMap value_map, const __grid_constant__ Problem problem) {
    run<hw::Bf16>(query_map, key_map, value_map, problem);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    block_sparse_fp16(const __grid_constant__ hw::TensorMap query_map, const __grid_constant__ hw::TensorMap key_map,
                      const __grid_constant__ hw::TensorMap value_map, const __grid_constant__ Problem problem) {
    run<hw::Fp16>(query_map, key_map, value_map, problem);
}
