// What the producer and the consumers share: the ring of stages, the orders, the barriers that guard both.
#pragma once

#include <hardware.cuh>

#include "work_items.h"

#ifndef HESS_STAGES
#error "compilers.py sets HESS_STAGES and HESS_SHARED_BYTES"
#endif
#ifndef HESS_TAKE_TURNS
#define HESS_TAKE_TURNS 1
#endif

constexpr int kStages = HESS_STAGES;
constexpr int kThreads = 384;      // producer warpgroup, two consumer warpgroups
constexpr int kConsumerWarps = 8;
constexpr int kRowBytes = 128;     // 64 channels of two bytes
constexpr int kEntryBytes = kBlockKeys * kRowBytes;
constexpr int kTileBytes = 2 * kEntryBytes;
constexpr int kQueryBytes = kTileQueries * kRowBytes;
// 384 threads start with 168 registers each; 40 + 2 * 232 is what the multiprocessor has for the three warpgroups.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr float kLog2E = 1.4426950408889634f;

// What the consumers need to know of an item; the producer looks it up ahead of them.
struct Order {
    Item item;
    int tiles, clean;  // tiles == 0: no more items
    int valid[4];      // keys that count in the halves of tile `clean` and of the one after it
};

struct Shared {
    unsigned char queries[kQueryBytes];
    unsigned char keys[kStages][kTileBytes];
    unsigned char values[kStages][kTileBytes];
    hw::Barrier keys_full[kStages], keys_free[kStages];
    hw::Barrier values_full[kStages], values_free[kStages];
    hw::Barrier order_full, order_free;  // guard `queries` and `order`
    Order order;
};
static_assert(sizeof(Shared) + 1024 <= HESS_SHARED_BYTES, "the swizzle's alignment may take up to 1024 bytes");

// Which stage is next, and the parity of its current phase.
struct Ring {
    int stage = 0;
    hw::u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};
