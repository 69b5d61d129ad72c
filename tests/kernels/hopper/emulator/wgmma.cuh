// The kernel's matrix instructions on the emulated machine.
#pragma once

#include <hardware.cuh>

namespace hw {

inline void begin_products() {
    machine::meet("wgmma.fence", 0);
    machine::current->fenced = true;
}
inline void commit_products() { machine::commit_products(); }

template <int Pending>
void wait_products() {
    machine::wait_products(Pending);
}

template <int Count>
void pin(float (&registers)[Count]) {
    machine::check_valid(registers);
}

template <class Type>
void multiply_qk(float (&c)[64], const u32 (&a)[4], u64 b, int add) {
    machine::issue_product(128, false, Type::half, add != 0, a, b, c);
}

template <class Type>
void multiply_pv(float (&c)[32], const u32 (&a)[4], u64 b) {
    machine::issue_product(64, true, Type::half, true, a, b, c);
}

}  // namespace hw
