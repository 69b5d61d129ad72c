// The kernel's primitives on the emulated machine: same names as the hardware's, semantics as in the PTX manual.
#pragma once

#include <cmath>

#include "machine.h"
#include "products.h"
#include "tensor_map.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace hw {

using u32 = unsigned int;
using u64 = unsigned long long;

struct Bf16 {
    static constexpr bool half = false;
};
struct Fp16 {
    static constexpr bool half = true;
};

using TensorMap = machine::TensorMap;

// mbarrier: a phase is over when all arrivals and all expected bytes are in.
struct Barrier {
    unsigned magic : 8, phase : 1, expected : 10;
    int pending : 12;
    int bytes;
};
static_assert(sizeof(Barrier) == 8, "as large as the hardware's");
constexpr unsigned kMagic = 0x5A;

inline int thread_index() { return machine::current->index; }
inline int cta_index() { return machine::current->cta->index; }
inline int cta_count() { return machine::current->cta->count; }

inline unsigned char* shared_memory() { return machine::current->cta->shared; }
inline u32 shared_address(const void* pointer) {
    return static_cast<u32>(static_cast<const unsigned char*>(pointer) - machine::current->cta->shared) +
           machine::kSharedBase;
}

inline void check(const Barrier& barrier) {
    if (barrier.magic != kMagic) machine::fail("An mbarrier is used before its init.");
}
inline void end_phase(Barrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
}
inline void init(Barrier& barrier, int arrivals) {
    barrier = {kMagic, 0, static_cast<unsigned>(arrivals), arrivals, 0};
}
inline void publish_barriers() { machine::current->cta->barriers_published = true; }
inline void arrive(Barrier& barrier) {
    machine::pause();
    check(barrier);
    if (barrier.pending < 1) machine::fail("An mbarrier's phase has more arrivals than it was made for.");
    barrier.pending -= 1;
    end_phase(barrier);
}
inline void arrive_expecting(Barrier& barrier, int bytes) {
    barrier.bytes += bytes;
    arrive(barrier);
}
inline void wait(Barrier& barrier, u32 parity) {
    check(barrier);
    machine::block_until("an mbarrier", [&] { return barrier.phase != parity; });
}

inline void prefetch(const TensorMap&) {}

inline void load_box(void* to, const TensorMap& map, Barrier& barrier, int token, int head, int batch) {
    machine::pause();
    machine::Cta& cta = *machine::current->cta;
    if (!cta.barriers_published) machine::fail("A load uses an mbarrier that was not fenced after its init.");
    const u32 address = shared_address(to);
    machine::at(address, map.box_bytes());
    if (address % 128 != 0) machine::fail("A load's destination is not 128-byte aligned.");
    check(barrier);
    unsigned char* base = cta.shared - machine::kSharedBase;
    memset(base + address, 0xFF, map.box_bytes());
    const int at[4] = {0, token, head, batch};
    const std::vector<int> where(at, at + 4);
    machine::start_copy([base, address, map, &barrier, where] {
        map.copy_box(base, address, where.data());
        barrier.bytes -= map.box_bytes();
        end_phase(barrier);
    });
}

template <int Count>
void give_registers() {
    machine::meet("setmaxnreg", Count);
}
template <int Count>
void take_registers() {
    machine::meet("setmaxnreg", Count);
}

inline void sync_cta() { machine::sync_named(0, machine::current->cta->threads, true); }
inline void sync_warp() { machine::meet("__syncwarp", 0); }
inline void wait_named(int id, int threads) { machine::sync_named(id, threads, true); }
inline void signal_named(int id, int threads) {
    machine::pause();
    machine::sync_named(id, threads, false);
}

template <class Value>
Value exchange(Value value, int lane) {
    static_assert(sizeof(Value) == 4, "");
    u32 bits;
    memcpy(&bits, &value, 4);
    const u32 given = machine::meet("a shuffle", bits)[lane];
    memcpy(&value, &given, 4);
    return value;
}
template <class Value>
Value from_lane(Value value, int lane) {
    return exchange(value, lane);
}
template <class Value>
Value from_lane_xor(Value value, int mask) {
    return exchange(value, thread_index() % 32 ^ mask);
}

inline int fetch_add(int* counter, int value) {
    machine::pause();
    const int before = *counter;
    *counter += value;
    return before;
}

inline float exp2(float x) { return std::exp2(x); }
inline float minus_infinity() { return -INFINITY; }
inline float natural_log(float x) { return std::log(x); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

template <class Type>
u32 pack(float low, float high) {
    using machine::Bits16;
    const u32 first = Type::half ? Bits16::to_fp16(low) : Bits16::to_bf16(low);
    const u32 second = Type::half ? Bits16::to_fp16(high) : Bits16::to_bf16(high);
    return second << 16 | first;
}

// Lane l receives row l / 4, elements 2 (l % 4) and the next one, of each matrix; lane l gave row l % 8 of matrix l
// / 8.
inline void load_matrices(u32 (&to)[4], u32 address) {
    const u32* addresses = machine::meet("ldmatrix", address);
    const int lane = thread_index() % 32;
    for (int matrix = 0; matrix < 4; ++matrix) {
        const u32 row = addresses[8 * matrix + lane / 4];
        if (row % 16 != 0) machine::fail("ldmatrix is given an address that is not 16-byte aligned.");
        memcpy(&to[matrix], machine::at(row, 16) + lane % 4 * 4, 4);
    }
}

inline void store_16_bytes(void* to, const u32 (&words)[4]) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) machine::fail("A 16-byte store is not aligned.");
    memcpy(to, words, 16);
}

}  // namespace hw
