// The running softmax of a warpgroup's 64 queries, on the accumulator fragments of the matrix instructions.
//
// A thread holds two rows of a 64 x N accumulator, r = 16 * warp + lane / 4 and r + 8: register 4 j + 2 i + e is row
// r + 8 i, column 8 j + 2 (lane % 4) + e. Four neighbouring lanes share a row.
#pragma once

#include <hardware.cuh>

#include "work_items.h"

constexpr int kScores = kTileQueries * 2 * kBlockKeys / 256;  // scores of a thread: 64 rows x 128 keys, 128 threads
constexpr int kOutputs = 32;                                  // outputs of a thread: 64 rows x 64 channels

struct RunningSoftmax {
    float top[2];    // largest unscaled score so far
    float total[2];  // sum of exp2(scaled score - scaled top) over this thread's own columns
};

// Scores of keys that do not count become -inf: those from `valid[half]` on in each half of the tile.
__device__ __forceinline__ void mask_scores(float (&scores)[kScores], int first_valid, int second_valid) {
    const int column = hw::thread_index() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
        const int valid = j < 8 ? first_valid : second_valid;
        const int key = j % 8 * 8 + column;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (key + e >= valid) scores[4 * j + e] = scores[4 * j + 2 + e] = hw::minus_infinity();
        }
    }
}

// Replace scores by probabilities up to the row's total; returns in `shrink` what earlier results must be multiplied
// by. A row's every tile has a key that counts, so the new top is finite.
__device__ __forceinline__ void exponentiate(float (&scores)[kScores], RunningSoftmax& state, float scale_log2,
                                             float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        // Two chains: one would be bound by latency.
        float even = scores[2 * i], odd = scores[2 * i + 1];
#pragma unroll
        for (int j = 1; j < kScores / 4; ++j) {
            even = hw::larger(even, scores[4 * j + 2 * i]);
            odd = hw::larger(odd, scores[4 * j + 2 * i + 1]);
        }
        float top = hw::larger(state.top[i], hw::larger(even, odd));
        top = hw::larger(top, hw::from_lane_xor(top, 1));
        top = hw::larger(top, hw::from_lane_xor(top, 2));
        shrink[i] = hw::exp2((state.top[i] - top) * scale_log2);
        state.top[i] = top;
        state.total[i] *= shrink[i];
    }
    const float offset[2] = {-state.top[0] * scale_log2, -state.top[1] * scale_log2};
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& score = scores[4 * j + 2 * i + e];
                score = hw::exp2(hw::multiply_add(score, scale_log2, offset[i]));
                state.total[i] += score;
            }
        }
    }
}

// The probabilities as operand A of eight products of 16 keys each, rounded.
template <class Type>
__device__ __forceinline__ void round_probabilities(hw::u32 (&to)[8][4], const float (&scores)[kScores]) {
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            to[j / 2][j % 2 * 2 + i] = hw::pack<Type>(scores[4 * j + 2 * i], scores[4 * j + 2 * i + 1]);
        }
    }
}

__device__ __forceinline__ void shrink_outputs(float (&out)[kOutputs], const float (&shrink)[2]) {
#pragma unroll
    for (int n = 0; n < kOutputs; ++n) out[n] *= shrink[n / 2 % 2];
}
