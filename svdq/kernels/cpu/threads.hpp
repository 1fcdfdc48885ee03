// Items shared out among threads: whoever is free takes the next, so a busy core costs little.
//
// Where torch's OpenMP runtime can be found (on Linux it is loaded for everybody) its threads do the work. Threads of another
// pool would run beside torch's, which wait for their next job by spinning. It is always asked for the team that torch has, of
// which some leave at once where there is little to do: asked for another number each time it would end and start threads.
// Elsewhere threads of our own are started each time.

#if defined(__linux__)
#include <dlfcn.h>
#endif

class Items {
public:
    Items(int64_t count, void (*work)(const void*, int64_t), const void* job) : count(count), work(work), job(job) {}

    // `cost`: steps of an item, of which a core does 2 to 10 in a nanosecond. A thread that gets less than a tenth of a
    // millisecond to do costs more than it brings.
    void run(int64_t threads, int64_t cost) {
        wanted = std::max<int64_t>(1, std::min({threads, count, count * cost / 500000}));
        if (wanted == 1) {
            take(this);
        } else if (auto parallel = openmp()) {
            parallel(take, this, unsigned(threads), 0);
        } else {
            std::vector<std::thread> others;
            try {
                while (int64_t(others.size()) < wanted - 1) others.emplace_back(take, this);
            } catch (...) {
                // The system gives no more threads: those that there are do it.
            }
            take(this);
            for (auto& other : others) other.join();
        }
        if (failed) throw std::bad_alloc();
    }

private:
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

    static Parallel openmp() {
#if defined(__linux__)
        static const auto found = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
        return found;
#else
        return nullptr;
#endif
    }

    static void take(void* self) {
        auto& items = *(Items*)self;
        if (items.joined++ >= items.wanted) return;
        try {
            for (int64_t i; (i = items.next++) < items.count;) items.work(items.job, i);
        } catch (...) {
            items.failed = true;            // an exception must not leave a thread
        }
    }

    const int64_t count;
    void (*const work)(const void*, int64_t);
    const void* const job;
    int64_t wanted = 1;
    std::atomic<int64_t> joined{0}, next{0};
    std::atomic<bool> failed{false};
};

// A thread's own memory, aligned to 64 bytes, kept for its next item.
template <class Number, int Use>
static Number* scratch(int64_t count) {
    static thread_local std::vector<Number> memory;
    const int64_t extra = 64 / sizeof(Number);
    if (int64_t(memory.size()) < count + extra) memory.resize(count + extra);
    return (Number*)(((uintptr_t)memory.data() + 63) & ~uintptr_t(63));
}
