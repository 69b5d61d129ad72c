// A multiprocessor on the host: every GPU thread is a fiber, a scheduler picks at random what runs next, and copies and
// matrix products happen some time after they were issued.
//
// Everything that PTX leaves undefined until a wait is poisoned with NaN from issue on, so that reading too early, or
// handing back a stage too early, shows in the result. What PTX forbids ends the launch with a sentence.
//
// Not modelled: memory ordering (a write is seen by everybody at once, so a missing fence between the ordinary and the
// asynchronous accesses goes unnoticed), and anything about time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace machine {

constexpr int kLanes = 32;
constexpr uint32_t kSharedBase = 1024;  // first address of dynamic shared memory; the system has those before it

struct Cta;

// The places where the lanes of a warp meet: shuffles and whatever PTX calls .aligned.
struct Meeting {
    int arrived = 0;
    uint64_t generation = 0;
    const char* what = nullptr;
    uint32_t values[2][kLanes] = {};
};

// Accumulators of one thread between the first product's issue and the wait.
struct InFlight {
    float* registers;
    int count;
    size_t last;  // index of the last product that adds to them
    std::vector<float> values;
};

struct Thread {
    Cta* cta = nullptr;
    int index = 0;
    ucontext_t context;
    jmp_buf state;
    bool started = false, done = false;
    bool (*ready)(void*) = nullptr;  // null: can run
    void* ready_argument = nullptr;
    const char* waiting_for = "";
    // Matrix products.
    bool fenced = false;
    size_t issued = 0;
    std::vector<size_t> committed;  // products issued before each commit
    std::vector<InFlight> in_flight;
};

// A product of one warpgroup: executed once all 128 threads have issued it.
struct Product {
    int columns;
    bool transposed, half, add;
    uint64_t descriptor;
    int issued = 0;
    const uint32_t* a[128];
    float* c[128];
};

struct Copy {
    std::function<void()> run;
    bool late = false;  // completes only once nothing else can go on
};

struct Warpgroup {
    std::deque<Product> products;  // those from index `first` on
    size_t first = 0;              // executed so far
};

struct NamedBarrier {
    int arrived = 0, threads = 0;
    uint64_t generation = 0;
};

struct Cta {
    int index = 0, count = 0, threads = 0;
    bool barriers_published = false;
    std::vector<unsigned char> memory;
    unsigned char* shared = nullptr;  // address kSharedBase of this CTA
    size_t shared_bytes = 0;
    std::vector<std::unique_ptr<Thread>> lanes;
    std::vector<Meeting> meetings;
    std::vector<Warpgroup> groups;
    std::vector<Copy> copies;
    NamedBarrier named[16];
};

extern Thread* current;
extern std::string error;  // empty: none so far

// End the launch: says what went wrong and never returns to the caller.
[[noreturn]] void fail(const std::string& what);

// Let others run until the condition holds.
void block(bool (*ready)(void*), void* argument, const char* what);

template <class Condition>
void block_until(const char* what, Condition condition) {
    if (condition()) return;
    block([](void* argument) { return (*static_cast<Condition*>(argument))(); }, &condition, what);
}

// Let others run once; called wherever a schedule may cut in.
void pause();

// Have a copy of this CTA happen some time later.
void start_copy(std::function<void()> run);

// All lanes of the warp meet; returns what each lane brought.
const uint32_t* meet(const char* what, uint32_t value);

void sync_named(int id, int threads, bool wait);
unsigned char* at(uint32_t address, size_t bytes);

// Run `entry` on a grid; true if it ended without a violation.
bool launch(int ctas, int threads, size_t shared_bytes, uint64_t seed, const std::function<void()>& entry);

}  // namespace machine
