// The producer warp: claims work items, tells the consumers about them, and loads their queries, keys and values.
#pragma once

#include <hardware.cuh>

#include "pipeline.cuh"
#include "work_items.h"

__device__ __forceinline__ void load_tile(unsigned char* to, const hw::TensorMap& map, hw::Barrier& full,
                                          hw::Barrier& free, hw::u32 parity, int first, int second, int head,
                                          int batch) {
    hw::wait(free, parity ^ 1);
    hw::arrive_expecting(full, kTileBytes);
    hw::load_box(to, map, full, first, head, batch);
    hw::load_box(to + kEntryBytes, map, full, second, head, batch);
}

// Load the tiles of one item. The lanes look up 32 entries at once, one batch ahead; lane 0 issues the loads.
__device__ __forceinline__ void feed(Shared& shared, const Keys& keys, const hw::TensorMap& key_map,
                                     const hw::TensorMap& value_map, int head, int batch, Ring& ring) {
    const int lane = hw::thread_index() % 32, tiles = tile_count(keys);
    int here = 0, ahead = first_key(keys, lane);
    for (int tile = 0; tile < tiles; ++tile) {
        const int within = 2 * tile % kBatchedEntries;
        if (within == 0) {
            here = ahead;
            ahead = first_key(keys, 2 * tile + kBatchedEntries + lane);
        }
        const int first = hw::from_lane(here, within), second = hw::from_lane(here, within + 1);
        if (lane == 0) {
            const int stage = ring.stage;
            load_tile(shared.keys[stage], key_map, shared.keys_full[stage], shared.keys_free[stage], ring.parity, first,
                      second, head, batch);
            load_tile(shared.values[stage], value_map, shared.values_full[stage], shared.values_free[stage],
                      ring.parity, first, second, head, batch);
        }
        ring.advance();
    }
}

// The producer warp: claim items and load them until none is left, which the last order says.
__device__ __forceinline__ void produce(const Problem& problem, const hw::TensorMap& query_map,
                                        const hw::TensorMap& key_map, const hw::TensorMap& value_map, Shared& shared) {
    const int lane = hw::thread_index() % 32;
    Ring ring;
    hw::u32 parity = 1;  // order_free is free at first
    for (int claimed = hw::cta_index();;) {
        const bool over = claimed >= problem.work;
        Order order = {};
        Keys keys;
        if (!over) {
            order.item = locate(problem, problem.order[claimed]);
            keys = find_keys(problem, order.item);
            order.tiles = tile_count(keys);
            order.clean = clean_tiles(keys);
        }
        const int batch = order.item.pair / problem.heads, head = order.item.pair - batch * problem.heads;
        if (lane == 0) {
            hw::wait(shared.order_free, parity);
            shared.order = order;
            if (over) {
                hw::arrive(shared.order_full);
            } else {
                for (int entry = 0; entry < 4; ++entry) {
                    shared.order.valid[entry] = valid_keys(keys, 2 * order.clean + entry);
                }
                hw::arrive_expecting(shared.order_full, kQueryBytes);
                hw::load_box(shared.queries, query_map, shared.order_full, order.item.first_query, head, batch);
            }
        }
        if (over) return;
        parity ^= 1;
        feed(shared, keys, key_map, value_map, head, batch, ring);
        // Claimed only now, with all of this item's loads under way: whoever is done first takes the next item, and the
        // consumers still have the ring to work on while this and the look-ups above are answered.
        if (lane == 0) claimed = hw::cta_count() + hw::fetch_add(problem.claimed, 1);
        claimed = hw::from_lane(claimed, 0);
    }
}
