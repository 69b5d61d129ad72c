// Hopper's warpgroup matrix instructions: accumulators and A in registers, B in shared memory. The instructions run
// asynchronously: between issue and `wait_products` nothing may touch the registers they use.
// The tests compile the kernel against another file of this name, which emulates them on the host.
#pragma once

#include <hardware.cuh>

namespace hw {

// Before the first product after registers were written: orders those writes before the products.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most `Pending` of the committed groups are still running.
template <int Pending>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving computations with these registers across this point: after `wait_products`, from
// reading accumulators too early.
template <int Count>
__device__ __forceinline__ void pin(float (&registers)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

#define HESS_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define HESS_16(c, i) HESS_4(c, i), HESS_4(c, i + 4), HESS_4(c, i + 8), HESS_4(c, i + 12)

// B is [128 keys][16 channels], channels contiguous (K-major).
#define HESS_MULTIPLY_QK(TYPES) \
    asm volatile( \
        "{\n" \
        ".reg .pred add;\n" \
        "setp.ne.b32 add, %69, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " " \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
        "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n" \
        "}\n" \
        : HESS_16(c, 0), HESS_16(c, 16), HESS_16(c, 32), HESS_16(c, 48) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

// B is [16 keys][64 channels], channels contiguous (N-major, hence the transposing 1 at the end).
#define HESS_MULTIPLY_PV(TYPES) \
    asm volatile( \
        "{\n" \
        ".reg .pred add;\n" \
        "setp.ne.b32 add, 1, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " " \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
        "{%32, %33, %34, %35}, %36, add, 1, 1, 1;\n" \
        "}\n" \
        : HESS_16(c, 0), HESS_16(c, 16) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// c [64 x 128] = a [64 x 16] @ b^T, plus c if `add`.
template <class Type>
__device__ __forceinline__ void multiply_qk(float (&c)[64], const u32 (&a)[4], u64 b, int add);
template <>
__device__ __forceinline__ void multiply_qk<Bf16>(float (&c)[64], const u32 (&a)[4], u64 b, int add) {
    HESS_MULTIPLY_QK("bf16.bf16");
}
template <>
__device__ __forceinline__ void multiply_qk<Fp16>(float (&c)[64], const u32 (&a)[4], u64 b, int add) {
    HESS_MULTIPLY_QK("f16.f16");
}

// c [64 x 64] += a [64 x 16] @ b.
template <class Type>
__device__ __forceinline__ void multiply_pv(float (&c)[32], const u32 (&a)[4], u64 b);
template <>
__device__ __forceinline__ void multiply_pv<Bf16>(float (&c)[32], const u32 (&a)[4], u64 b) {
    HESS_MULTIPLY_PV("bf16.bf16");
}
template <>
__device__ __forceinline__ void multiply_pv<Fp16>(float (&c)[32], const u32 (&a)[4], u64 b) {
    HESS_MULTIPLY_PV("f16.f16");
}

#undef HESS_MULTIPLY_QK
#undef HESS_MULTIPLY_PV
#undef HESS_16
#undef HESS_4

}  // namespace hw
