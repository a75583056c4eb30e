// Working memory of a thread, kept between calls.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace prismserve {

class Scratch {
  public:
    ~Scratch() { std::free(memory); }

    // At least `count` floats, not initialised, valid until the thread's next call; null if there is no memory.
    float* floats(size_t count) {
        if (count > capacity) {
            std::free(memory);
            capacity = count + count / 4;
            const size_t nbytes = (capacity * sizeof(float) + 63) / 64 * 64;
            memory = static_cast<float*>(std::aligned_alloc(64, nbytes));
            if (memory == nullptr) capacity = 0;
        }
        return memory;
    }

  private:
    float* memory = nullptr;
    size_t capacity = 0;
};

inline Scratch& scratch() {
    static thread_local Scratch memory;
    return memory;
}

}  // namespace prismserve
