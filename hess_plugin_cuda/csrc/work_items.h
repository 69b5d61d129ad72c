// Which queries a work item computes and which keys they see: integer arithmetic only, compiled for the GPU and,
// by the tests, for the host.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

constexpr int kTileQueries = 128;  // rows of a work item, and of a query block
constexpr int kBlockKeys = 64;     // keys of an entry, and of a key block
constexpr int kBatchedEntries = 32;  // entries the producer looks up at once, one for each lane

// Everything of a call but the three tensor maps. launch.py packs the same fields in the same order.
struct Problem {
    const long long* row_ptr;  // [batch * heads * query_blocks + 1]
    const int* col;            // kept patch key blocks of every row, ascending
    const int* order;          // [work] items, heaviest first: pair * (query_blocks + special_tiles) + tile
    int* claimed;              // items claimed beyond the first of every CTA; zero at launch
    void* out;                 // [batch, heads, queries, 64], rows 16-byte aligned
    float* lse;                // [batch, heads, queries], contiguous
    long long out_batch, out_head, out_token;  // strides of out, in elements
    int work;
    int heads;
    int query_blocks, special_tiles;  // tiles of patch queries and of special queries of one head
    int queries, patch_queries;       // of one head; the tokens after the patches are special
    int keys, patch_keys;
    float scale;  // not negative: the running maximum is taken before scaling
};

// Queries of one work item.
struct Item {
    int pair;         // batch * heads + head
    int first_query;  // of `pair`
    int query_count;  // 1..kTileQueries of them are written
    int row;          // of row_ptr; -1: special queries, which see every key
};

HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

HOST_DEVICE Item locate(const Problem& problem, int id) {
    const int tiles = problem.query_blocks + problem.special_tiles;
    Item item;
    item.pair = id / tiles;
    int tile = id - item.pair * tiles;
    int begin = 0, end = problem.patch_queries;
    item.row = item.pair * problem.query_blocks + tile;
    if (tile >= problem.query_blocks) {
        tile -= problem.query_blocks;
        begin = problem.patch_queries;
        end = problem.queries;
        item.row = -1;
    }
    item.first_query = begin + tile * kTileQueries;
    item.query_count = smaller(kTileQueries, end - item.first_query);
    return item;
}

// The entries of an item, in the order in which the kernel visits them: `listed` full patch blocks, `run` full blocks
// of consecutive keys from `run_first`, then whatever needs a mask: the ragged patch block, the ragged end of the run.
// The run holds the special keys, which start anywhere; for special queries it holds all keys and nothing is listed.
struct Keys {
    const int* col;
    int listed;
    int run, run_first;
    int ragged_patch;  // keys of the listed last patch block if it is ragged, else 0
    int ragged_run;    // keys left over after the run's full blocks
    int entries;
    int patch_keys, keys;
};

HOST_DEVICE Keys find_keys(const Problem& problem, const Item& item) {
    Keys found;
    found.col = problem.col;
    found.listed = found.ragged_patch = found.run_first = 0;
    found.patch_keys = problem.patch_keys;
    found.keys = problem.keys;
    if (item.row >= 0) {
        const long long begin = problem.row_ptr[item.row], end = problem.row_ptr[item.row + 1];
        const int last = (problem.patch_keys - 1) / kBlockKeys, ragged = problem.patch_keys % kBlockKeys;
        found.col = problem.col + begin;
        found.listed = static_cast<int>(end - begin);
        found.run_first = problem.patch_keys;
        // Lists ascend, so only a row's last block can be the ragged one.
        if (ragged != 0 && found.listed > 0 && found.col[found.listed - 1] == last) {
            found.listed -= 1;
            found.ragged_patch = ragged;
        }
    }
    const int run_keys = problem.keys - found.run_first;
    found.run = run_keys / kBlockKeys;
    found.ragged_run = run_keys % kBlockKeys;
    found.entries = found.listed + found.run + (found.ragged_patch > 0) + (found.ragged_run > 0);
    return found;
}

// First key of an entry. Past the last entry it lies beyond the tensor, where a load brings zeros.
HOST_DEVICE int first_key(const Keys& keys, int entry) {
    if (entry < keys.listed) return keys.col[entry] * kBlockKeys;
    entry -= keys.listed;
    if (entry < keys.run) return keys.run_first + entry * kBlockKeys;
    entry -= keys.run;
    if (keys.ragged_patch > 0 && entry == 0) return keys.patch_keys - keys.ragged_patch;
    entry -= keys.ragged_patch > 0;
    return keys.ragged_run > 0 && entry == 0 ? keys.keys - keys.ragged_run : keys.keys;
}

// Keys that count in an entry, from its first one on; 0 past the last entry.
HOST_DEVICE int valid_keys(const Keys& keys, int entry) {
    entry -= keys.listed + keys.run;
    if (entry < 0) return kBlockKeys;
    if (keys.ragged_patch > 0 && entry == 0) return keys.ragged_patch;
    entry -= keys.ragged_patch > 0;
    return entry == 0 ? keys.ragged_run : 0;
}

// Two entries make a tile. The first `clean` tiles need no mask; at most two more follow.
HOST_DEVICE int tile_count(const Keys& keys) { return (keys.entries + 1) / 2; }
HOST_DEVICE int clean_tiles(const Keys& keys) { return (keys.listed + keys.run) / 2; }
