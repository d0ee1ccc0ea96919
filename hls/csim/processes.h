// Dataflow processes for C simulation: each one a fiber that runs until it waits for a FIFO.
//
// Fibers rather than threads: when none can go on, that is a deadlock at once and for certain, with no clock involved, and a run is
// the same every time.
#pragma once
#include <functional>
#include <string>

namespace csim {

struct Fifo {
    explicit Fifo(int words) : depth(words) {}
    virtual ~Fifo();  // data that nobody read is an error
    void set_name(const std::string &text);
    virtual void set_depth(int words) = 0;
    std::string name = "unnamed";
    int depth, count = 0;

  protected:
    void wait_while_empty();
    void wait_while_full();
};

// The processes that a dataflow region starts; ends when all have. Declared behind the FIFOs, so that it goes first.
struct Region {
    Region();
    ~Region();
    void start(const char *call, const std::function<void()> &body);
};

template <typename Stream, int COUNT>
void name_all(Stream (&fifos)[COUNT], const char *name) {
    for (int i = 0; i < COUNT; i++) fifos[i].set_name(std::string(name) + "[" + std::to_string(i) + "]");
}

// Gives FIFOs of this name ("weights[2]" or all "weights") another depth from the next call of a kernel on; 0: their own.
void set_depth(const std::string &name, int depth);

// What went wrong since the last call, on one line; null if nothing did.
const char *take_error();

}  // namespace csim
