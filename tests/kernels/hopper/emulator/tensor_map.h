// A tensor map of the emulator: what cuTensorMapEncodeTiled was given, in the 128 bytes that it may fill.
#pragma once

#include <cstdint>
#include <cstring>

#include "products.h"

namespace machine {

struct alignas(64) TensorMap {
    unsigned char* base;
    uint64_t sizes[4];    // elements, innermost first
    uint64_t strides[3];  // bytes, of dimensions 1 to 3
    uint32_t box[4];
    uint32_t magic;
    uint32_t padding[11];

    static constexpr uint32_t kMagic = 0x7E5017A9;

    int box_bytes() const { return static_cast<int>(box[0] * box[1] * box[2] * box[3] * 2); }

    // Write the box whose first element is `at` to shared memory, swizzled; out of bounds is zero.
    void copy_box(unsigned char* shared, uint32_t address, const int* at) const {
        for (uint32_t row = 0; row < box[1]; ++row) {
            const int64_t token = at[1] + static_cast<int64_t>(row);
            const bool inside = token >= 0 && token < static_cast<int64_t>(sizes[1]) && at[2] >= 0 &&
                                at[2] < static_cast<int64_t>(sizes[2]) && at[3] >= 0 &&
                                at[3] < static_cast<int64_t>(sizes[3]);
            for (uint32_t chunk = 0; chunk < 8; ++chunk) {
                unsigned char* to = shared + swizzle_128(address + row * 128 + chunk * 16);
                if (inside) {
                    memcpy(to, base + token * strides[0] + at[2] * strides[1] + at[3] * strides[2] + chunk * 16, 16);
                } else {
                    memset(to, 0, 16);
                }
            }
        }
    }
};
static_assert(sizeof(TensorMap) == 128, "as large as CUtensorMap");

}  // namespace machine
