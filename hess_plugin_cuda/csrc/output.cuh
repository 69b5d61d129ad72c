// The end of a work item: normalise, exchange registers so that every lane has 16 consecutive bytes, store.
#pragma once

#include <hardware.cuh>

#include "softmax.cuh"
#include "work_items.h"

// Four neighbouring lanes hold a 4 x 4 table of words by columns, words[n] being row n; afterwards by rows.
__device__ __forceinline__ void transpose_quad(hw::u32 (&words)[4]) {
    const int lane = hw::thread_index() % 4;
    const bool odd = lane & 1, upper = lane & 2;
    // Selections instead of indices that depend on the lane: those would send the array to local memory.
    const hw::u32 a = hw::from_lane_xor(odd ? words[0] : words[1], 1);
    const hw::u32 b = hw::from_lane_xor(odd ? words[2] : words[3], 1);
    const hw::u32 half[4] = {odd ? a : words[0], odd ? words[1] : a, odd ? b : words[2], odd ? words[3] : b};
    const hw::u32 c = hw::from_lane_xor(upper ? half[0] : half[2], 2);
    const hw::u32 d = hw::from_lane_xor(upper ? half[1] : half[3], 2);
    words[0] = upper ? c : half[0];
    words[1] = upper ? d : half[1];
    words[2] = upper ? half[2] : c;
    words[3] = upper ? half[3] : d;
}

// Store row i (0 or 1) of the two rows that a thread shares with its three neighbours.
template <class Type>
__device__ __forceinline__ void store_row(unsigned short* row, const float (&out)[kOutputs], int i, float factor,
                                          bool inside) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        hw::u32 words[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int at = 4 * (4 * half + n) + 2 * i;
            words[n] = hw::pack<Type>(out[at] * factor, out[at + 1] * factor);
        }
        transpose_quad(words);
        if (inside) hw::store_16_bytes(row + half * 32 + hw::thread_index() % 4 * 8, words);
    }
}

// Write a warpgroup's rows of an item, `group` being its half of the tile.
template <class Type>
__device__ __forceinline__ void store_outputs(const Problem& problem, const Item& item, int group,
                                              const float (&out)[kOutputs], const RunningSoftmax& state) {
    const int thread = hw::thread_index() % 128, lane = thread % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float total = state.total[i];
        total += hw::from_lane_xor(total, 1);
        total += hw::from_lane_xor(total, 2);
        const int row = group * 64 + thread / 32 * 16 + i * 8 + lane / 4;
        const bool inside = row < item.query_count;
        const long long query = item.first_query + row;
        const int batch = item.pair / problem.heads, head = item.pair - batch * problem.heads;
        unsigned short* to = static_cast<unsigned short*>(problem.out) + batch * problem.out_batch +
                             head * problem.out_head + query * problem.out_token;
        store_row<Type>(to, out, i, 1.0f / total, inside);
        if (inside && lane % 4 == 0) {
            const float lse = hw::multiply_add(state.top[i], problem.scale, hw::natural_log(total));
            problem.lse[static_cast<long long>(item.pair) * problem.queries + query] = lse;
        }
    }
}
