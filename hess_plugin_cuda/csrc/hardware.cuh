// Hopper's primitives, one function each: barriers, bulk tensor loads, registers, shuffles, small conversions.
// The tests compile the kernel against another file of this name, which emulates them on the host.
#pragma once

namespace hw {

using u32 = unsigned int;
using u64 = unsigned long long;

struct Bf16 {};
struct Fp16 {};

// What cuTensorMapEncodeTiled fills in on the host; opaque here.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// An mbarrier, in shared memory.
struct Barrier {
    u64 state;
};

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int cta_index() { return blockIdx.x; }
__device__ __forceinline__ int cta_count() { return gridDim.x; }

// Dynamic shared memory from its first multiple of 1024 bytes on, the period of the 128-byte swizzle.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ unsigned char raw[];
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(raw));
    return raw + ((1024 - address % 1024) % 1024);
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init(Barrier& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// After `init`, in the thread that called it: shows the barriers to the copy engine too.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrive, and let the phase wait for this many bytes of loads as well.
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

// Wait until the phase of this parity is over. On a fresh barrier parity 1 counts as over.
__device__ __forceinline__ void wait(Barrier& barrier, u32 parity) {
    u32 over;
    do {
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n"
            "}\n"
            : "=r"(over)
            : "r"(shared_address(&barrier)), "r"(parity)
            : "memory");
    } while (over == 0);
}

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Load a box {64 elements, tokens, 1, 1} of a [batch, head, token, 64] tensor; out of bounds is zero.
__device__ __forceinline__ void load_box(void* to, const TensorMap& map, Barrier& barrier, int token, int head,
                                         int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(0), "r"(token), "r"(head), "r"(batch)
        : "memory");
}

template <int Count>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

template <int Count>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

__device__ __forceinline__ void sync_cta() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Named barriers: `threads` counts those that wait and those that only signal.
__device__ __forceinline__ void wait_named(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void signal_named(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <class Value>
__device__ __forceinline__ Value from_lane(Value value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
}
template <class Value>
__device__ __forceinline__ Value from_lane_xor(Value value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

__device__ __forceinline__ int fetch_add(int* counter, int value) { return atomicAdd(counter, value); }

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xFF800000); }
__device__ __forceinline__ float natural_log(float x) { return logf(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// Two rounded values in one register, `low` in the lower half.
template <class Type>
__device__ __forceinline__ u32 pack(float low, float high);
template <>
__device__ __forceinline__ u32 pack<Bf16>(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <>
__device__ __forceinline__ u32 pack<Fp16>(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void store_16_bytes(void* to, const u32 (&words)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace hw
