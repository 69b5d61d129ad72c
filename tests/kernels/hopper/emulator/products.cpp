#include "products.h"

#include <cmath>

namespace machine {

namespace {

constexpr uint32_t kPoison = 0x7FDEAD00;  // a NaN that no computation makes

void poison(float* registers, int count) {
    for (int n = 0; n < count; ++n) memcpy(registers + n, &kPoison, 4);
}

bool poisoned(const float* registers, int count) {
    for (int n = 0; n < count; ++n) {
        if (memcmp(registers + n, &kPoison, 4) != 0) return false;
    }
    return true;
}

float element(const Cta& cta, uint32_t address, bool half) {
    if (address < kSharedBase || address + 2 > kSharedBase + cta.shared_bytes) return NAN;
    uint16_t bits;
    memcpy(&bits, cta.shared + (address - kSharedBase), 2);
    return half ? Bits16::fp16(bits) : Bits16::bf16(bits);
}

// B [16][columns] through its descriptor. Byte offsets, for 16-bit elements and the 128-byte swizzle:
// K-major: column n, channel k at (n % 8) * 128 + (n / 8) * stride + k * 2;
// N-major: (k % 8) * 128 + (k / 8) * stride + (n % 64) * 2 + (n / 64) * leading.
void read_b(const Cta& cta, const Product& product, std::vector<float>& b) {
    const uint64_t descriptor = product.descriptor;
    const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
    b.resize(16 * product.columns);
    for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < product.columns; ++n) {
            const uint32_t offset = product.transposed ? k % 8 * 128 + k / 8 * stride + n % 64 * 2 + n / 64 * leading
                                                       : n % 8 * 128 + n / 8 * stride + k * 2;
            b[k * product.columns + n] = element(cta, swizzle_128(start + offset), product.half);
        }
    }
}

// Register r of A: rows lane / 4 + 8 * (r % 2), channels 2 * (lane % 4) + 8 * (r / 2) and the next one.
void read_a(const Product& product, float (&a)[64][16]) {
    for (int thread = 0; thread < 128; ++thread) {
        const int lane = thread % 32;
        for (int r = 0; r < 4; ++r) {
            for (int e = 0; e < 2; ++e) {
                const uint16_t bits = product.a[thread][r] >> 16 * e & 0xFFFF;
                a[thread / 32 * 16 + lane / 4 + 8 * (r % 2)][lane % 4 * 2 + 8 * (r / 2) + e] =
                    product.half ? Bits16::fp16(bits) : Bits16::bf16(bits);
            }
        }
    }
}

InFlight* find(Thread& thread, const float* registers) {
    for (InFlight& entry : thread.in_flight) {
        if (entry.registers == registers) return &entry;
    }
    return nullptr;
}

}  // namespace

bool execute_product(Cta& cta, Warpgroup& group) {
    if (group.products.empty() || group.products.front().issued < 128) return false;
    const Product& product = group.products.front();
    const int base = static_cast<int>(&group - cta.groups.data()) * 128;
    static thread_local std::vector<float> b, sums;
    float a[64][16];
    read_b(cta, product, b);
    read_a(product, a);
    sums.assign(64 * product.columns, 0.0f);
    for (int row = 0; row < 64; ++row) {
        float* sum = sums.data() + row * product.columns;
        for (int k = 0; k < 16; ++k) {
            const float factor = a[row][k];
            const float* from = b.data() + k * product.columns;
            for (int n = 0; n < product.columns; ++n) sum[n] += factor * from[n];
        }
    }
    for (int thread = 0; thread < 128; ++thread) {
        InFlight& entry = *find(*cta.lanes[base + thread], product.c[thread]);
        const int lane = thread % 32;
        for (int n = 0; n < entry.count; ++n) {
            // Accumulator 4 j + 2 i + e: row lane / 4 + 8 i, column 8 j + 2 (lane % 4) + e.
            const int row = thread / 32 * 16 + lane / 4 + 8 * (n / 2 % 2), column = n / 4 * 8 + lane % 4 * 2 + n % 2;
            const float sum = sums[row * product.columns + column];
            entry.values[n] = product.add ? entry.values[n] + sum : sum;
        }
    }
    group.products.pop_front();
    ++group.first;
    return true;
}

void issue_product(int columns, bool transposed, bool half, bool add, const uint32_t* a, uint64_t descriptor,
                   float* c) {
    meet("wgmma.mma_async", 0);
    Thread& thread = *current;
    if (!thread.fenced) fail("A product is issued without wgmma.fence.");
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
        fail("The emulator knows descriptors of the 128-byte swizzle at offset 0 alone.");
    Warpgroup& group = thread.cta->groups[thread.index / 128];
    const size_t index = thread.issued++ - group.first;
    if (index == group.products.size()) group.products.push_back({columns, transposed, half, add, descriptor});
    Product& product = group.products[index];
    if (product.columns != columns || product.transposed != transposed || product.half != half || product.add != add ||
        product.descriptor != descriptor)
        fail("The threads of a warpgroup issue different products.");
    product.a[thread.index % 128] = a;
    product.c[thread.index % 128] = c;
    ++product.issued;
    InFlight* entry = find(thread, c);
    const int count = columns / 2;
    if (entry == nullptr) {
        thread.in_flight.push_back({c, count, 0, std::vector<float>(c, c + count)});
        entry = &thread.in_flight.back();
        poison(c, count);
    }
    entry->last = thread.issued;
}

void commit_products() {
    meet("wgmma.commit_group", 0);
    current->fenced = false;
    current->committed.push_back(current->issued);
}

void wait_products(size_t pending) {
    meet("wgmma.wait_group", 0);
    Thread& thread = *current;
    if (thread.committed.size() <= pending) return;
    const size_t until = thread.committed[thread.committed.size() - 1 - pending];
    const Warpgroup& group = thread.cta->groups[thread.index / 128];
    block_until("matrix products", [&] { return group.first >= until; });
    thread.committed.erase(thread.committed.begin(), thread.committed.end() - pending);
    for (size_t n = 0; n < thread.in_flight.size();) {
        InFlight& entry = thread.in_flight[n];
        if (entry.last > until) {
            ++n;
            continue;
        }
        if (!poisoned(entry.registers, entry.count)) fail("Accumulators are written while products are under way.");
        memcpy(entry.registers, entry.values.data(), entry.count * sizeof(float));
        thread.in_flight.erase(thread.in_flight.begin() + n);
    }
}

void check_valid(const float* registers) {
    if (find(*current, registers) != nullptr) fail("Accumulators are used while products are under way.");
}

}  // namespace machine
