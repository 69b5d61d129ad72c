#include "machine.h"

#include "products.h"

namespace machine {

Thread* current = nullptr;
std::string error;

namespace {

constexpr size_t kStack = 64 * 1024;
jmp_buf scheduler;
std::vector<std::unique_ptr<char[]>> stacks;
const std::function<void()>* entry_point = nullptr;
std::mt19937 lateness;

__attribute__((noinline)) void to_scheduler() {
    if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
    (*entry_point)();
    current->done = true;
    to_scheduler();
}

__attribute__((noinline)) void resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler) == 0) {
        if (thread.started) _longjmp(thread.state, 1);
        thread.started = true;
        setcontext(&thread.context);
    }
    current = nullptr;
}

bool can_run(Thread& thread) {
    return !thread.done && (thread.ready == nullptr || thread.ready(thread.ready_argument));
}

// Something that can make progress when the scheduler picks it; returns whether it did.
struct Agent {
    double weight;
    std::function<bool()> step;
    bool asleep = false;
};

bool step_warp(Cta& cta, int warp, std::mt19937_64& random) {
    bool any = false;
    const uint64_t draw = random();
    const uint32_t lanes = static_cast<uint32_t>(draw | draw >> 32);  // three in four go on
    for (int lane = 0; lane < kLanes && error.empty(); ++lane) {
        Thread& thread = *cta.lanes[warp * kLanes + lane];
        if ((lanes >> lane & 1) != 0 && can_run(thread)) {
            resume(thread);
            any = true;
        }
    }
    return any;
}

// Copies complete in any order, a third of them as late as possible.
bool step_copies(Cta& cta, std::mt19937_64& random) {
    const size_t size = cta.copies.size(), first = size == 0 ? 0 : random() % size;
    for (size_t n = 0; n < size; ++n) {
        const size_t which = (first + n) % size;
        if (cta.copies[which].late) continue;
        Copy copy = std::move(cta.copies[which]);
        cta.copies.erase(cta.copies.begin() + which);
        copy.run();
        return true;
    }
    return false;
}

// Let one sleeping agent or one late copy go on; false if there is none.
bool wake_one(std::vector<Agent>& agents, std::vector<std::unique_ptr<Cta>>& grid, std::mt19937_64& random) {
    std::vector<bool*> found;
    for (Agent& agent : agents) {
        if (agent.asleep) found.push_back(&agent.asleep);
    }
    for (auto& cta : grid) {
        for (Copy& copy : cta->copies) {
            if (copy.late) found.push_back(&copy.late);
        }
    }
    if (found.empty()) return false;
    *found[random() % found.size()] = false;
    return true;
}

std::unique_ptr<Cta> make_cta(int index, int count, int threads, size_t shared_bytes, size_t& stack) {
    auto cta = std::make_unique<Cta>();
    cta->index = index;
    cta->count = count;
    cta->threads = threads;
    cta->shared_bytes = shared_bytes;
    cta->memory.assign(shared_bytes + 4096, 0xFF);
    const auto base = reinterpret_cast<uintptr_t>(cta->memory.data());
    cta->shared = cta->memory.data() + (2048 - (base - kSharedBase) % 1024) % 1024;
    cta->meetings.resize(threads / kLanes);
    cta->groups.resize(threads / 128);
    for (int thread = 0; thread < threads; ++thread, ++stack) {
        if (stack == stacks.size()) stacks.emplace_back(new char[kStack]);
        auto lane = std::make_unique<Thread>();
        lane->cta = cta.get();
        lane->index = thread;
        getcontext(&lane->context);
        lane->context.uc_stack.ss_sp = stacks[stack].get();
        lane->context.uc_stack.ss_size = kStack;
        lane->context.uc_link = nullptr;
        makecontext(&lane->context, fiber_main, 0);
        cta->lanes.push_back(std::move(lane));
    }
    return cta;
}

std::string who_waits(const std::vector<std::unique_ptr<Cta>>& ctas) {
    std::string told = "Deadlock:";
    for (const auto& cta : ctas) {
        for (const auto& thread : cta->lanes) {
            if (thread->done || thread->index % kLanes != 0) continue;
            told += " CTA " + std::to_string(cta->index) + " warp " + std::to_string(thread->index / kLanes) +
                    " waits for " + thread->waiting_for + ";";
        }
    }
    return told;
}

std::string left_behind(const Cta& cta) {
    if (!cta.copies.empty()) return "A CTA ended with copies under way.";
    for (const Warpgroup& group : cta.groups) {
        if (!group.products.empty()) return "A CTA ended with products under way.";
    }
    for (const NamedBarrier& barrier : cta.named) {
        if (barrier.arrived != 0) return "A CTA ended with a named barrier half full.";
    }
    return "";
}

}  // namespace

void fail(const std::string& what) {
    if (error.empty()) {
        error = what;
        if (current != nullptr)
            error +=
                " (CTA " + std::to_string(current->cta->index) + ", thread " + std::to_string(current->index) + ")";
    }
    if (current != nullptr) {
        current->done = true;
        to_scheduler();
    }
    abort();  // the scheduler itself breaks no rules
}

void block(bool (*ready)(void*), void* argument, const char* what) {
    current->ready = ready;
    current->ready_argument = argument;
    current->waiting_for = what;
    to_scheduler();
    current->ready = nullptr;
}

void pause() { to_scheduler(); }

void start_copy(std::function<void()> run) { current->cta->copies.push_back({std::move(run), lateness() % 3 == 0}); }

const uint32_t* meet(const char* what, uint32_t value) {
    const int warp = current->index / kLanes;
    Meeting& meeting = current->cta->meetings[warp];
    if (meeting.arrived == 0) meeting.what = what;
    if (strcmp(meeting.what, what) != 0)
        fail(std::string("Lanes of a warp meet at ") + meeting.what + " and at " + what + ".");
    const uint64_t generation = meeting.generation;
    uint32_t* values = meeting.values[generation % 2];
    values[current->index % kLanes] = value;
    if (++meeting.arrived == kLanes) {
        meeting.arrived = 0;
        ++meeting.generation;
    } else {
        block_until(what, [&] { return meeting.generation != generation; });
    }
    return values;
}

void sync_named(int id, int threads, bool wait) {
    NamedBarrier& barrier = current->cta->named[id];
    if (barrier.arrived > 0 && barrier.threads != threads) fail("A named barrier is used with two thread counts.");
    barrier.threads = threads;
    const uint64_t generation = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    if (wait) block_until("a named barrier", [&] { return barrier.generation != generation; });
}

unsigned char* at(uint32_t address, size_t bytes) {
    if (address < kSharedBase || address + bytes > kSharedBase + current->cta->shared_bytes)
        fail("Shared memory is accessed out of bounds.");
    return current->cta->shared + (address - kSharedBase);
}

bool launch(int ctas, int threads, size_t shared_bytes, uint64_t seed, const std::function<void()>& entry) {
    error.clear();
    entry_point = &entry;
    std::mt19937_64 random(seed);
    lateness.seed(seed);
    std::vector<std::unique_ptr<Cta>> grid;
    std::vector<Agent> agents;
    size_t stack = 0;
    // Speeds differ by up to 256 for a whole launch: one warp or the copy engine may lag far behind.
    const auto speed = [&random] { return 1.0 / (1 << 4 * (random() % 3)); };
    for (int index = 0; index < ctas; ++index) {
        grid.push_back(make_cta(index, ctas, threads, shared_bytes, stack));
        Cta& cta = *grid.back();
        for (int warp = 0; warp < threads / kLanes; ++warp)
            agents.push_back({speed(), [&cta, warp, &random] { return step_warp(cta, warp, random); }});
        agents.push_back({speed(), [&cta, &random] { return step_copies(cta, random); }});
        for (Warpgroup& group : cta.groups)
            agents.push_back({speed(), [&cta, &group] { return execute_product(cta, group); }});
    }
    std::vector<double> weights;
    for (const Agent& agent : agents) weights.push_back(agent.weight);
    std::discrete_distribution<size_t> pick(weights.begin(), weights.end());
    const auto step = [&](Agent& agent) {
        if (agent.asleep || !agent.step()) return false;
        agent.asleep = random() % 32 == 0;  // until nothing else can go on
        return true;
    };
    for (int idle = 0; error.empty();) {
        if (step(agents[pick(random)])) {
            idle = 0;
        } else if (++idle > 64) {
            bool any = false;
            const size_t first = random() % agents.size();
            // Many times: a warp's step leaves out some of its lanes.
            for (size_t n = 0; n < 16 * agents.size() && !any && error.empty(); ++n)
                any = step(agents[(first + n) % agents.size()]);
            if (any || wake_one(agents, grid, random)) continue;
            bool all_done = true;
            for (const auto& cta : grid) {
                for (const auto& thread : cta->lanes) all_done = all_done && thread->done;
            }
            if (error.empty() && !all_done) error = who_waits(grid);
            break;
        }
    }
    for (const auto& cta : grid) {
        if (error.empty()) error = left_behind(*cta);
    }
    return error.empty();
}

}  // namespace machine
