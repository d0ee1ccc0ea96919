#include "processes.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace csim {
namespace {

// What a process keeps on chip lies on its stack here. Pages are taken when they are touched.
constexpr size_t STACK_BYTES = 16 << 20;

struct Abandoned {};  // unwinds the processes of a deadlock

struct Process {
    std::string name;
    std::function<void()> body;
    ucontext_t context;
    char *stack = nullptr;
    const Fifo *fifo = nullptr;  // what it waits for; null while it runs
    bool is_full = false;        // ... because that is full, not empty
    bool is_done = false;
    void *fake_stack = nullptr;

    bool can_go_on() const { return !is_done && (is_full ? fifo->count < fifo->depth : fifo->count > 0); }
};

std::vector<std::unique_ptr<Process>> processes;
std::vector<char *> free_stacks;
Process *running = nullptr;
bool is_abandoned = false;
ucontext_t host;
const void *host_stack = nullptr;
size_t host_stack_bytes = 0;
std::string problem, reported;
std::map<std::string, int> depths;  // of set_depth

void note(const std::string &text) {
    if (problem.empty()) problem = text;
}

// AddressSanitizer has to be told of every change of stack (sanitizer/common_interface_defs.h).
void leaving(void **fake_stack, const void *stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
    (void)fake_stack, (void)stack, (void)bytes;
#endif
}

void arrived(void *fake_stack, const void **from, size_t *bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, from, bytes);
#else
    (void)fake_stack, (void)from, (void)bytes;
#endif
}

char *take_stack() {
    if (free_stacks.empty()) {
        void *memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        mprotect(memory, 4096, PROT_NONE);
        return static_cast<char *>(memory);
    }
    char *stack = free_stacks.back();
    free_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, STACK_BYTES);
#endif
    return stack;
}

void to_host(Process &self) {
    leaving(self.is_done ? nullptr : &self.fake_stack, host_stack, host_stack_bytes);
    swapcontext(&self.context, &host);
    arrived(self.fake_stack, &host_stack, &host_stack_bytes);
}

void enter() {
    arrived(nullptr, &host_stack, &host_stack_bytes);
    Process &self = *running;
    try {
        self.body();
    } catch (const Abandoned &) {
    }
    self.is_done = true;
    to_host(self);
}

void resume(Process &process) {
    void *fake_stack = nullptr;
    running = &process;
    process.fifo = nullptr;
    leaving(&fake_stack, process.stack, STACK_BYTES);
    swapcontext(&host, &process.context);
    arrived(fake_stack, nullptr, nullptr);
    running = nullptr;
    if (process.is_done) {
        free_stacks.push_back(process.stack);
        process.stack = nullptr;
    }
}

void wait_for(const Fifo &fifo, bool is_full) {
    Process *self = running;
    if (!self) {
        note("FIFO " + fifo.name + " is used outside a process");
        throw Abandoned();
    }
    self->fifo = &fifo;
    self->is_full = is_full;
    to_host(*self);
    if (is_abandoned) throw Abandoned();
}

std::string deadlock() {
    std::string text = "deadlock:";
    for (const auto &process : processes) {
        if (process->is_done) continue;
        if (text.back() != ':') text += ",";
        text += " process " + process->name + " waits on " + (process->is_full ? "full" : "empty") + " FIFO " +
                process->fifo->name + " depth " + std::to_string(process->fifo->depth);
    }
    return text;
}

}  // namespace

Fifo::~Fifo() {
    if (count && !is_abandoned) note("FIFO " + name + ": " + std::to_string(count) + " words were never read");
}

void Fifo::set_name(const std::string &text) {
    name = text;
    for (const std::string &key : {name, name.substr(0, name.find('['))}) {
        const auto found = depths.find(key);
        if (found != depths.end()) return set_depth(found->second);
    }
}

void Fifo::wait_while_empty() {
    while (!count) wait_for(*this, false);
}

void Fifo::wait_while_full() {
    while (count == depth) wait_for(*this, true);
}

Region::Region() {
    processes.clear();
    is_abandoned = false;
}

void Region::start(const char *call, const std::function<void()> &body) {
    auto process = std::make_unique<Process>();
    std::string name(call);
    name = name.substr(0, name.find_first_of("<("));
    int same = 0;
    for (const auto &other : processes) same += other->name.substr(0, other->name.find('#')) == name;
    process->name = same ? name + "#" + std::to_string(same) : name;
    process->body = body;
    process->stack = take_stack();
    getcontext(&process->context);
    process->context.uc_stack.ss_sp = process->stack;
    process->context.uc_stack.ss_size = STACK_BYTES;
    process->context.uc_link = nullptr;
    makecontext(&process->context, enter, 0);
    processes.push_back(std::move(process));
    resume(*processes.back());  // at once: the arguments of the call are taken now
}

Region::~Region() {
    for (bool is_moving = true; is_moving;) {
        is_moving = false;
        for (const auto &process : processes) {
            if (!process->can_go_on()) continue;
            resume(*process);
            is_moving = true;
        }
    }
    bool is_stuck = false;
    for (const auto &process : processes) is_stuck |= !process->is_done;
    if (!is_stuck) return;
    note(deadlock());
    is_abandoned = true;
    for (const auto &process : processes) {
        if (!process->is_done) resume(*process);
    }
}

void set_depth(const std::string &name, int depth) {
    depths.erase(name);
    if (depth) depths[name] = depth;
}

const char *take_error() {
    reported.swap(problem);
    problem.clear();
    return reported.empty() ? nullptr : reported.c_str();
}

}  // namespace csim
