// wgmma as the PTX manual defines it: fragments of A and of the accumulators, matrix descriptors, 128-byte swizzle.
#pragma once

#include "machine.h"

namespace machine {

struct Bits16 {
    static float bf16(uint16_t bits) {
        const uint32_t word = static_cast<uint32_t>(bits) << 16;
        float value;
        memcpy(&value, &word, 4);
        return value;
    }
    static float fp16(uint16_t bits) {
        _Float16 value;
        memcpy(&value, &bits, 2);
        return static_cast<float>(value);
    }
    static uint16_t to_bf16(float value) {
        uint32_t word;
        memcpy(&word, &value, 4);
        if (value != value) return 0x7FFF;
        return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);  // to nearest, ties to even
    }
    static uint16_t to_fp16(float value) {
        const _Float16 rounded = static_cast<_Float16>(value);
        uint16_t bits;
        memcpy(&bits, &rounded, 2);
        return bits;
    }
};

// 128-byte swizzle: the 16-byte chunk within a row of 128 bytes is XORed with the row within 1024 bytes.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Execute the warpgroup's oldest product if all its threads have issued it.
bool execute_product(Cta& cta, Warpgroup& group);

void issue_product(int columns, bool transposed, bool half, bool add, const uint32_t* a, uint64_t descriptor, float* c);
void commit_products();
void wait_products(size_t pending);
void check_valid(const float* registers);

}  // namespace machine
