// A consumer warpgroup: scores, softmax and outputs of its 64 queries of every work item.
#pragma once

#include <hardware.cuh>
#include <wgmma.cuh>

#include "output.cuh"
#include "pipeline.cuh"
#include "softmax.cuh"

// Descriptor of operand B in shared memory, 128-byte swizzle: 8 rows of 128 bytes follow each other every 1024 bytes.
__device__ __forceinline__ hw::u64 describe(hw::u32 address) {
    constexpr hw::u64 leading = 1, stride = 1024 / 16, swizzle_128 = 1;
    return (address & 0x3FFFF) / 16 | leading << 16 | stride << 32 | swizzle_128 << 62;
}

// A warp's 16 queries as operand A of four products of 16 channels each.
__device__ __forceinline__ void load_queries(hw::u32 (&to)[4][4], const Shared& shared, int first_row) {
    const int lane = hw::thread_index() % 32, row = first_row + lane % 16;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        // 16-byte chunk `chunk` of row r lies at chunk ^ (r % 8).
        const int chunk = 2 * step + lane / 16;
        hw::load_matrices(to[step],
                          hw::shared_address(shared.queries) + row * kRowBytes + (chunk ^ row % 8) * 16);
    }
}

// Issue scores = queries @ keys^T.
template <class Type>
__device__ __forceinline__ void multiply_keys(float (&scores)[kScores], const hw::u32 (&queries)[4][4],
                                              const unsigned char* keys) {
    const hw::u64 keys_at = describe(hw::shared_address(keys));
    hw::begin_products();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        // 16 channels are 32 of a row's 128 bytes.
        hw::multiply_qk<Type>(scores, queries[step], keys_at + step * (32 / 16), step > 0);
    }
    hw::commit_products();
}

// Issue out += probabilities @ values.
template <class Type>
__device__ __forceinline__ void multiply_values(float (&out)[kOutputs], const hw::u32 (&probabilities)[8][4],
                                                const unsigned char* values) {
    const hw::u64 values_at = describe(hw::shared_address(values));
    hw::begin_products();
#pragma unroll
    for (int step = 0; step < 8; ++step) {
        // 16 keys are 16 rows.
        hw::multiply_pv<Type>(out, probabilities[step], values_at + step * (16 * kRowBytes / 16));
    }
    hw::commit_products();
}

// One arrival for each warp: its own part of the products is done, whatever the other warps are at.
__device__ __forceinline__ void release(hw::Barrier& barrier) {
    if (hw::thread_index() % 32 == 0) hw::arrive(barrier);
}

// The same, but not before the exponentials, whose sums cannot be negative. The assembler moves a wait for products up
// as far as it can, past arithmetic though not past an arrival: without this, the values' products of the tile before
// would be waited for before the softmax that is to run beside them. The stage is not needed earlier: the producer has
// to fill the values' stage of the tile before first.
__device__ __forceinline__ void release_after(hw::Barrier& barrier, const RunningSoftmax& state) {
    const bool impossible = state.total[0] < 0.0f || state.total[1] < 0.0f;
    if (hw::thread_index() % 32 == 0 && !impossible) hw::arrive(barrier);
}

// The warpgroups' turns at issuing products, on named barriers 1 and 2 (0 is the whole CTA's).
__device__ __forceinline__ void wait_for_turn(int group) {
    if (HESS_TAKE_TURNS) hw::wait_named(1 + group, 256);
}
__device__ __forceinline__ void give_turn(int group) {
    if (HESS_TAKE_TURNS) hw::signal_named(1 + group, 256);
}

// All tiles of one item. Two products are under way at a time, the scores of a tile and the values of the one before.
template <class Type>
__device__ __forceinline__ void attend(Shared& shared, const Order& order, const hw::u32 (&queries)[4][4],
                                       float scale_log2, int group, Ring& ring, float (&out)[kOutputs],
                                       RunningSoftmax& state) {
    float scores[kScores], shrink[2];
    hw::u32 probabilities[8][4];
    hw::wait(shared.keys_full[ring.stage], ring.parity);
    multiply_keys<Type>(scores, queries, shared.keys[ring.stage]);
    hw::wait_products<0>();
    hw::pin(scores);
    release(shared.keys_free[ring.stage]);
    if (order.clean == 0) mask_scores(scores, order.valid[0], order.valid[1]);
    exponentiate(scores, state, scale_log2, shrink);
    round_probabilities<Type>(probabilities, scores);
    for (int tile = 1; tile < order.tiles; ++tile) {
        const Ring before = ring;
        ring.advance();
        hw::wait(shared.keys_full[ring.stage], ring.parity);
        wait_for_turn(group);
        multiply_keys<Type>(scores, queries, shared.keys[ring.stage]);
        hw::wait(shared.values_full[before.stage], before.parity);
        multiply_values<Type>(out, probabilities, shared.values[before.stage]);
        give_turn(1 - group);
        hw::wait_products<1>();
        hw::pin(scores);
        if (tile >= order.clean) {
            const bool next = tile > order.clean;
            mask_scores(scores, next ? order.valid[2] : order.valid[0], next ? order.valid[3] : order.valid[1]);
        }
        exponentiate(scores, state, scale_log2, shrink);
        release_after(shared.keys_free[ring.stage], state);
        hw::wait_products<0>();
        hw::pin(out);
        release(shared.values_free[before.stage]);
        shrink_outputs(out, shrink);
        round_probabilities<Type>(probabilities, scores);
    }
    hw::wait(shared.values_full[ring.stage], ring.parity);
    multiply_values<Type>(out, probabilities, shared.values[ring.stage]);
    hw::wait_products<0>();
    hw::pin(out);
    release(shared.values_free[ring.stage]);
    ring.advance();
}

// A consumer warpgroup: its half of every item's queries.
template <class Type>
__device__ __forceinline__ void consume(const Problem& problem, Shared& shared, int group) {
    const int warp = hw::thread_index() / 32 % 4;
    const float scale_log2 = problem.scale * kLog2E;
    Ring ring;
    if (group == 1) give_turn(0);
    for (hw::u32 parity = 0;; parity ^= 1) {
        hw::wait(shared.order_full, parity);
        const Order order = shared.order;
        if (order.tiles == 0) break;
        hw::u32 queries[4][4];
        load_queries(queries, shared, group * 64 + warp * 16);
        hw::sync_warp();  // every lane has read the order and its queries
        release(shared.order_free);
        float out[kOutputs];
#pragma unroll
        for (int n = 0; n < kOutputs; ++n) out[n] = 0.0f;
        RunningSoftmax state = {{hw::minus_infinity(), hw::minus_infinity()}, {0.0f, 0.0f}};
        attend<Type>(shared, order, queries, scale_log2, group, ring, out, state);
        store_outputs<Type>(problem, order.item, group, out, state);
    }
    if (group == 0) wait_for_turn(0);  // the other's last signal: no barrier is left half full
}
