// hls::stream for C simulation: a FIFO as deep as the hardware's, whose reads and writes wait.
//
// Vitis' own model is unbounded and its processes run one after the other, so a FIFO that is too shallow passes there and
// hangs on the board. Interface: UG1399, "HLS stream library".
#pragma once
#include <memory>

#include "processes.h"

namespace hls {

template <typename T, int DEPTH = 0>
class stream;

// What processes take as an argument, whatever the depth.
template <typename T>
class stream<T, 0> : public csim::Fifo {
  public:
    stream(const stream &) = delete;

    T read() {
        wait_while_empty();
        T value = buffer[first];
        first = first + 1 == depth ? 0 : first + 1;
        count--;
        return value;
    }

    void write(const T &value) {
        wait_while_full();
        const int last = first + count < depth ? first + count : first + count - depth;
        buffer[last] = value;
        count++;
    }

    void set_depth(int words) override {
        depth = words;
        buffer.reset(new T[words]);
    }

  protected:
    explicit stream(int words) : csim::Fifo(words), buffer(new T[words]) {}

  private:
    std::unique_ptr<T[]> buffer;
    int first = 0;
};

template <typename T, int DEPTH>
class stream : public stream<T, 0> {
    static_assert(DEPTH > 0, "a FIFO has a depth");

  public:
    stream() : stream<T, 0>(DEPTH) {}
    explicit stream(const char *name) : stream<T, 0>(DEPTH) { this->set_name(name); }
};

}  // namespace hls
