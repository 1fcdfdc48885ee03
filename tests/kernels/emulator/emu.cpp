// emu: runs a kernel, one CTA at a time, every thread a fiber, and watches each load and store
//
// The kernel is compiled with g++ -fsanitize=thread, whose calls before each access (__tsan_read4 ...) end here and not in
// libtsan. Every byte of shared memory and of writable buffers has a Cell: who wrote it last, who read it, and when. Time is
//   time       counts barriers and CTAs: accesses with equal time in different warps have no order
//   step       counts a warp's collectives: within one warp, accesses with equal step have no order either
// and an access without order to an earlier one of another thread, one of them a write, is a race. This does not depend on
// how the fibers happened to run.
//
// A fiber that fails never continues: it leaves a report, the launch returns it, and build.py turns the marks in it into
// words:  @p<address>@ a place in the kernel    @a<address>@ an address of data
#include <algorithm>
#include <deque>
#include <link.h>
#include <map>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/mman.h>
#include <vector>

#include "emu.hpp"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

struct words4 { u32 w[4]; };

// emu.hpp calls them const
Index thread_index asm("threadIdx"), block_index asm("blockIdx"), block_dim asm("blockDim"), grid_dim asm("gridDim");

namespace {

constexpr int WARP = 32, MAX_THREADS = 1024;
constexpr size_t STACK = 128 << 10;
constexpr u64 CANARY = 0x5afe5afe5afe5afe;
constexpr u8 POISON = 0xa5;

// ---- fibers

enum Wait { READY, BARRIER, SWAP, MMA_I4, MMA_HALF, DONE };
const char* const WAITS[] = {"are ready", "wait at the barrier in", "wait at the shuffle in", "wait at the 4-bit MMA in",
                             "wait at the 16-bit MMA in", "have ended"};

struct Copy { u8* to; const u8* from; const void* place; };

struct Fiber {
    void* stack_pointer;
    u8* stack;
    Index index;
    Wait wait;
    const void* place;                  // where it waits
    int flag;                           // of the collective: signedness, type, lane mask
    u32 value;                          // shuffle: in and out
    u32 a[4], b[2];                     // MMA
    void* d;
    std::vector<Copy> open;             // cp.async not yet in a group
    std::deque<std::vector<Copy>> groups;
};

Fiber fibers[MAX_THREADS];
Fiber* self;                            // null on the scheduler's own stack
uintptr_t stack_low;                    // of self
void* scheduler;
int threads;
u32 now, cta_start, steps[MAX_THREADS / WARP];
bool stopped;
std::string report;

void (*kernel)(void**);
void** arguments;
int (*site_of)(const void*);            // the same number for places on the same line
uintptr_t module_low, module_high;

extern "C" void emu_switch(void** save, void* load);
#if defined(__x86_64__)
constexpr int SAVED = 6;                // words below the return address
asm(R"(
.text
.type emu_switch,@function
emu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size emu_switch, .-emu_switch
)");
#elif defined(__aarch64__)
constexpr int SAVED = 0;                // x30, the return address, is stored first
asm(R"(
.text
.type emu_switch,%function
emu_switch:
    sub sp, sp, #160
    stp x30, x29, [sp]
    stp x19, x20, [sp, #16]
    stp x21, x22, [sp, #32]
    stp x23, x24, [sp, #48]
    stp x25, x26, [sp, #64]
    stp x27, x28, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x30, x29, [sp]
    ldp x19, x20, [sp, #16]
    ldp x21, x22, [sp, #32]
    ldp x23, x24, [sp, #48]
    ldp x25, x26, [sp, #64]
    ldp x27, x28, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emu_switch, .-emu_switch
)");
#endif

void leave() { emu_switch(&self->stack_pointer, scheduler); }

// Keeps the first report. On a fiber it does not return.
__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    if (!stopped) {
        char text[1024];
        va_list values;
        va_start(values, format);
        vsnprintf(text, sizeof text, format, values);
        va_end(values);
        char who[96];
        snprintf(who, sizeof who, "block (%u, %u, %u)", block_index.x, block_index.y, block_index.z);
        report = who;
        if (self) {
            snprintf(who, sizeof who, ", thread %d", int(self - fibers));
            report += who;
        }
        report += std::string(": ") + text;
        stopped = true;
    }
    if (self)
        leave();
}

void leave_kernel(const void* place) {
    for (const auto& group : self->groups)
        if (!group.empty())
            fail("ends with a copy on its way, issued in @p%p@", group[0].place);
    if (!self->open.empty())
        fail("ends with a copy in no group, issued in @p%p@", self->open[0].place);
    self->wait = DONE;
    self->place = place;
    leave();
}

void run_kernel() {
    kernel(arguments);
    leave_kernel(nullptr);
}

void prepare(Fiber& fiber) {
    if (!fiber.stack)
        fiber.stack = (u8*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *(u64*)fiber.stack = CANARY;
#if defined(__x86_64__)
    void** top = (void**)(fiber.stack + STACK) - 2;             // a return leaves the stack as after a call
    top[0] = (void*)run_kernel;
    top[1] = nullptr;
#else
    void** top = (void**)(fiber.stack + STACK - 160);
    top[0] = (void*)run_kernel;
#endif
    fiber.stack_pointer = top - SAVED;
    fiber.wait = READY;
    fiber.open.clear();
    fiber.groups.clear();
}

// ---- memory

struct Touch {
    u32 time, step, place;              // time 0: never
    u16 thread, more;
};
enum { EMPTY, LIVE, FLYING };                           // Cell.write.more; FLYING: a cp.async will land here
enum { LANES = 1, WARPS = 2, CTAS = 4 };                // Cell.read.more: others have read it as well

struct Cell { Touch write, read; };

struct Space {
    u8 *low, *high;
    bool shared, writable, initialised;
    Cell* cells;                        // null where nobody may write
};
std::vector<Space> spaces;
Space* recent;

Space* space_of(const void* pointer) {
    u8* p = (u8*)pointer;
    if (recent && p >= recent->low && p < recent->high)
        return recent;
    for (Space& space : spaces)
        if (p >= space.low && p < space.high)
            return recent = &space;
    return nullptr;
}

u32 offset(const void* place) { return (u32)((uintptr_t)place - module_low); }
const void* place_at(u32 offset) { return (const void*)(module_low + offset); }

Touch touch_now(const void* place, u16 more) {
    const int thread = int(self - fibers);
    return {now, steps[thread / WARP], offset(place), (u16)thread, more};
}

// Is there no order between `then` and this thread's now?
bool unordered(const Touch& then) {
    if (!then.time)
        return false;
    if (then.time < cta_start)
        return true;                                    // another CTA
    const int thread = int(self - fibers);
    return then.time == now && then.thread != thread
        && (then.thread / WARP != thread / WARP || then.step == steps[thread / WARP]);
}

bool unordered_read(const Touch& then) {
    if (then.more & CTAS || unordered(then))
        return true;
    const int warp = int(self - fibers) / WARP;
    return then.time == now && (then.more & WARPS || (then.more & LANES && then.step == steps[warp]));
}

void race(const u8* p, const char* what, const char* earlier, const Touch& then) {
    const bool other = then.time < cta_start || then.more & CTAS;
    char by[64];
    if (other || then.thread == self - fibers)
        snprintf(by, sizeof by, "%s", other ? "another block" : "another thread");
    else
        snprintf(by, sizeof by, "thread %u", then.thread);
    fail("race: %s @a%p@ in @p%p@, and %s %s it in @p%p@ with no %s between", what, (void*)p, self->place, by, earlier,
         place_at(then.place), other ? "order" : "barrier");
}

void flying(const u8* p, const char* what, const Cell& cell) {
    const void* issued = place_at(cell.write.place);
    fail("%s @a%p@ in @p%p@, where the cp.async that thread %u issued in @p%p@ has not landed: that thread has not waited "
         "for it", what, (void*)p, self->place, cell.write.thread, issued);
}

void read_cells(Space& space, u8* p, size_t size) {
    const Touch me = touch_now(self->place, 0);
    for (u8* end = p + size; p < end; p++) {
        Cell& cell = space.cells[p - space.low];
        if (cell.write.more == FLYING)
            flying(p, "reads", cell);
        if (cell.write.more == EMPTY && !space.initialised)
            fail("reads @a%p@ in @p%p@, which nobody has written", (void*)p, self->place);
        if (unordered(cell.write))
            race(p, "reads", "wrote", cell.write);
        Touch& last = cell.read;
        u16 more = last.more & CTAS;
        if (last.time && last.time < cta_start)
            more |= CTAS;
        if (last.time == now) {
            more |= last.more & WARPS;
            if (last.thread / WARP != me.thread / WARP)
                more |= WARPS;
            else if (last.step == me.step)
                more |= last.thread != me.thread ? LANES : last.more & LANES;
        }
        last = me;
        last.more = more;
    }
}

void write_cells(Space& space, u8* p, size_t size, u16 state) {
    const Touch me = touch_now(self->place, state);
    for (u8* end = p + size; p < end; p++) {
        Cell& cell = space.cells[p - space.low];
        if (cell.write.more == FLYING)
            flying(p, "writes", cell);
        if (unordered(cell.write))
            race(p, "writes", "wrote", cell.write);
        if (unordered_read(cell.read))
            race(p, "writes", "read", cell.read);
        cell.write = me;
    }
}

void access(const void* pointer, size_t size, bool write, bool aligned, const void* place) {
    if ((uintptr_t)pointer - stack_low < STACK || !self)
        return;
    u8* p = (u8*)pointer;
    const char* what = write ? "writes" : "reads";
    self->place = place;
    Space* space = space_of(p);
    if (!space) {
        if (!write && (uintptr_t)p - module_low < module_high - module_low)
            return;                                     // a table of the kernel's
        fail("%s %zu bytes at @a%p@ in @p%p@, outside every buffer", what, size, pointer, place);
    }
    if (aligned && (uintptr_t)p & (size - 1))
        fail("%s %zu bytes at @a%p@ in @p%p@, which are not aligned", what, size, pointer, place);
    if (p + size > space->high)
        fail("%s %zu bytes at @a%p@ in @p%p@, across the end of the buffer", what, size, pointer, place);
    if (write && !space->writable)
        fail("writes @a%p@ in @p%p@, which is read-only", pointer, place);
    if (!space->cells)
        return;
    if (write)
        write_cells(*space, p, size, LIVE);
    else
        read_cells(*space, p, size);
}

void land(std::vector<Copy>& group, const void* place) {
    for (Copy& copy : group) {
        Space& space = *space_of(copy.to);
        for (int i = 0; i < 16; i++)
            space.cells[copy.to + i - space.low].write = touch_now(place, LIVE);
        memcpy(copy.to, copy.from, 16);
    }
}

// ---- collectives

u32 nibbles[2][256][2];                 // [unsigned][byte] -> four bytes of two int16
float halves[1 << 16];

float fp16_value(u32 bits) {
    const u32 exponent = bits >> 10 & 31, fraction = bits & 1023, sign = bits >> 15 << 31;
    if (exponent == 31)
        return emu::as_float(sign | 0x7f800000u | fraction << 13);
    const float value = exponent ? ldexpf(float(1024 + fraction), int(exponent) - 25) : ldexpf(float(fraction), -24);
    return emu::as_float(sign | emu::as_bits(value));
}

void fill_tables() {
    for (int byte = 0; byte < 256; byte++) {
        const int low = byte & 15, high = byte >> 4;
        nibbles[1][byte][0] = u32(low) | u32(high) << 16;
        nibbles[0][byte][0] = u32((low ^ 8) - 8) % 65536 | u32((high ^ 8) - 8) << 16;
    }
    for (u32 bits = 0; bits < 1 << 16; bits++)
        halves[bits] = fp16_value(bits);
}

void spread(int16_t* to, u32 word, bool is_unsigned) {          // low nibble first, as a little-endian host stores them
    for (int i = 0; i < 4; i++)
        memcpy(to + 2 * i, nibbles[is_unsigned][word >> 8 * i & 255], 4);
}

void multiply_i4(Fiber* lanes) {
    alignas(16) int16_t a[16][64], b[8][64];
    for (int lane = 0; lane < WARP; lane++) {
        const Fiber& from = lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++)
            spread(a[g + i % 2 * 8] + i / 2 * 32 + 8 * t, from.a[i], from.flag);
        for (int i = 0; i < 2; i++)
            spread(b[g] + i * 32 + 8 * t, from.b[i], false);
    }
    int sums[16][8];
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            int sum = 0;
            for (int k = 0; k < 64; k++)
                sum += a[row][k] * b[column][k];
            sums[row][column] = sum;
        }
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++)
            ((int*)lanes[lane].d)[i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

float half_value(u32 bits, bool bf16) { return bf16 ? emu::as_float(bits << 16) : halves[bits]; }

void multiply_half(Fiber* lanes) {
    double a[16][16], b[8][16];
    for (int lane = 0; lane < WARP; lane++) {
        const Fiber& from = lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++)
                a[g + i % 2 * 8][i / 2 * 8 + 2 * t + half] = half_value(from.a[i] >> 16 * half & 0xffff, from.flag);
            for (int i = 0; i < 2; i++)
                b[g][i * 8 + 2 * t + half] = half_value(from.b[i] >> 16 * half & 0xffff, from.flag);
        }
    }
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++) {
            float& c = ((float*)lanes[lane].d)[i];
            const double *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
            double sum = 0;
            for (int k = 0; k < 16; k++)
                sum += row[k] * column[k];
            c += (float)sum;
        }
}

bool same_place(const void* a, const void* b) {
    static std::map<const void*, int> sites;
    if (a == b)
        return true;
    for (const void* place : {a, b})
        if (!sites.count(place))
            sites[place] = site_of(place);
    return sites[a] == sites[b];
}

bool together(const Fiber& a, const Fiber& b) {
    return a.wait == b.wait && (a.wait == SWAP || a.wait == BARRIER || a.flag == b.flag) && same_place(a.place, b.place);
}

// "threads 0-31 wait at ...; threads 32-63 have ended"
std::string whereabouts(int first, int count) {
    std::vector<bool> told(count);
    std::string text;
    for (int i = 0; i < count; i++) {
        if (told[i])
            continue;
        const Fiber& like = fibers[first + i];
        text += text.empty() ? "threads" : "; threads";
        for (int j = i; j < count; j++) {
            if (!together(like, fibers[first + j]))
                continue;
            const int start = j;
            for (; j < count && together(like, fibers[first + j]); j++)
                told[j] = true;
            text += " " + std::to_string(first + start) + (j - 1 > start ? "-" + std::to_string(first + j - 1) : "");
        }
        text += std::string(" ") + WAITS[like.wait];
        char place[32];
        snprintf(place, sizeof place, " @p%p@", like.place);
        text += like.wait == DONE ? "" : place;
    }
    return text;
}

bool all_together(int first, int count) {
    for (int i = 1; i < count; i++)
        if (!together(fibers[first], fibers[first + i])) {
            fail("divergent: %s", whereabouts(first, count).c_str());
            return false;
        }
    return true;
}

void meet(int warp) {
    Fiber* lanes = fibers + warp * WARP;
    if (!all_together(warp * WARP, WARP))
        return;
    if (lanes[0].wait == MMA_I4)
        multiply_i4(lanes);
    else if (lanes[0].wait == MMA_HALF)
        multiply_half(lanes);
    else {
        u32 values[WARP];
        for (int i = 0; i < WARP; i++)
            values[i] = lanes[i].value;
        for (int i = 0; i < WARP; i++)
            lanes[i].value = values[(i ^ lanes[i].flag) & (WARP - 1)];
    }
    steps[warp]++;
    for (int i = 0; i < WARP; i++)
        lanes[i].wait = READY;
}

void wait_for_others(Wait wait, int flag, const void* place) {
    self->wait = wait;
    self->flag = flag;
    self->place = place;
    leave();
}

// ---- the scheduler

u64 random_state;

u32 random_below(u32 limit) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return u32((random_state >> 32) * limit >> 32);
}

enum { FORWARD, REVERSE, SHUFFLE };

void reorder(std::vector<int>& order, int mode) {
    for (size_t i = 0; i < order.size(); i++)
        order[i] = mode == REVERSE ? int(order.size() - 1 - i) : int(i);
    if (mode == SHUFFLE)
        for (size_t i = order.size(); i-- > 1;)
            std::swap(order[i], order[random_below(u32(i + 1))]);
}

void run_cta(int mode) {
    cta_start = ++now;
    memset(steps, 0, sizeof steps);
    for (Space& space : spaces)
        if (space.shared) {
            memset(space.low, POISON, space.high - space.low);
            memset(space.cells, 0, (space.high - space.low) * sizeof(Cell));
        }
    for (int i = 0; i < threads; i++) {
        prepare(fibers[i]);
        fibers[i].index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
    }
    std::vector<int> order(threads), arrived((threads + WARP - 1) / WARP);
    reorder(order, mode);
    int at_barrier = 0, ended = 0;
    while (ended < threads) {
        if (mode == SHUFFLE)
            reorder(order, mode);
        bool ran = false;
        for (int i : order) {
            Fiber& fiber = fibers[i];
            if (fiber.wait != READY)
                continue;
            ran = true;
            self = &fiber;
            stack_low = (uintptr_t)fiber.stack;
            thread_index = fiber.index;
            emu_switch(&scheduler, fiber.stack_pointer);
            self = nullptr;
            if (!stopped && *(u64*)fiber.stack != CANARY)
                fail("thread %d: stack overflow", i);
            if (stopped)
                return;
            if (fiber.wait == DONE)
                ended++;
            else if (fiber.wait == BARRIER)
                at_barrier++;
            else if (++arrived[i / WARP] == WARP) {
                arrived[i / WARP] = 0;
                meet(i / WARP);
            }
            if (at_barrier == threads && all_together(0, threads)) {
                at_barrier = 0;
                now++;
                for (int t = 0; t < threads; t++)
                    fibers[t].wait = READY;
            }
            if (stopped)
                return;
        }
        if (!ran)
            return fail("stuck: %s", whereabouts(0, threads).c_str());
    }
}

int find_module(dl_phdr_info* info, size_t, void*) {
    uintptr_t low = UINTPTR_MAX, high = 0;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD) {
            low = std::min(low, (uintptr_t)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr));
            high = std::max(high, (uintptr_t)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz));
        }
    if ((uintptr_t)find_module < low || (uintptr_t)find_module >= high)
        return 0;
    module_low = low;
    module_high = high;
    return 1;
}

}  // namespace

#define HERE __builtin_return_address(0)

namespace emu {

alignas(1024) unsigned char dynamic_shared[227 << 10];  // the most a CTA may have

void barrier(int) { wait_for_others(BARRIER, 0, HERE); }

unsigned swap_lanes(unsigned x, int mask, int) {
    self->value = x;
    wait_for_others(SWAP, mask, HERE);
    return self->value;
}

static void mma(Wait kind, int flag, void* d, const words4& a, u32 b0, u32 b1, const void* place) {
    access(&a, 16, false, true, place);                 // operands may be references into memory
    if (kind == MMA_HALF)
        access(d, 16, false, false, place);
    access(d, 16, true, false, place);
    memcpy(self->a, a.w, 16);
    self->b[0] = b0, self->b[1] = b1;
    self->d = d;
    wait_for_others(kind, flag, place);
}

void mma_i4(bool a_unsigned, int (&d)[4], const words4& a, unsigned b0, unsigned b1) {
    mma(MMA_I4, a_unsigned, d, a, b0, b1, HERE);
}

void mma_half(bool bf16, float (&c)[4], const words4& a, unsigned b0, unsigned b1) {
    mma(MMA_HALF, bf16, c, a, b0, b1, HERE);
}

void copy16(void* to_shared, const void* from_global) {
    const void* place = self->place = HERE;
    Space* to = space_of(to_shared);
    if (!to || !to->shared || (u8*)to_shared + 16 > to->high)
        fail("cp.async to @a%p@ in @p%p@, not 16 bytes of shared memory", to_shared, place);
    if ((uintptr_t)to_shared % 16)
        fail("cp.async to @a%p@ in @p%p@, which is not 16-byte aligned", to_shared, place);
    Space* from = space_of(from_global);
    if (from && from->shared)
        fail("cp.async from @a%p@ in @p%p@, which is shared memory", (void*)from_global, place);
    access(from_global, 16, false, true, place);
    write_cells(*to, (u8*)to_shared, 16, FLYING);
    memset(to_shared, POISON, 16);
    self->open.push_back({(u8*)to_shared, (const u8*)from_global, place});
}

void copy_commit() {
    self->groups.push_back(std::move(self->open));
    self->open.clear();
}

void copy_wait(int pending) {
    for (; (int)self->groups.size() > pending; self->groups.pop_front())
        land(self->groups.front(), HERE);
}

static u32 bf16_bits(float value) {
    const u32 bits = as_bits(value);
    if (value != value)
        return 0x7fff;                                  // the one NaN that cvt.rn makes
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static u32 fp16_bits(float value) {
    if (value != value)
        return 0x7fff;
    const u32 sign = as_bits(value) >> 31 << 15;
    const float size = fminf(fabsf(value), 65536.0f);   // which becomes Inf below, as everything from 65520 on
    int exponent;
    frexpf(size, &exponent);                            // size < 2^exponent
    if (size < 0x1p-14f)
        exponent = -13;                                 // subnormals: steps of 2^-24
    const u32 steps = (u32)nearbyintf(ldexpf(size, 11 - exponent));
    return sign | (steps + (u32(exponent + 13) << 10)); // the hidden bit, or a carry to it, counts the exponent up
}

unsigned pack_half(bool bf16, float low, float high) {
    return bf16 ? bf16_bits(low) | bf16_bits(high) << 16 : fp16_bits(low) | fp16_bits(high) << 16;
}

float from_fp16(unsigned short bits) { return halves[bits]; }

int round_even(float value) {
    if (value != value)
        return 0;
    const float rounded = nearbyintf(value);
    return rounded >= 2147483648.0f ? INT32_MAX : rounded < -2147483648.0f ? INT32_MIN : (int)rounded;
}

}  // namespace emu

// ---- what g++ calls in an instrumented kernel

#define ACCESSES(SIZE)                                                                                                    \
    void __tsan_read##SIZE(void* p) { access(p, SIZE, false, true, HERE); }                                               \
    void __tsan_write##SIZE(void* p) { access(p, SIZE, true, true, HERE); }                                               \
    void __tsan_unaligned_read##SIZE(void* p) { access(p, SIZE, false, false, HERE); }                                    \
    void __tsan_unaligned_write##SIZE(void* p) { access(p, SIZE, true, false, HERE); }

extern "C" {

ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
void __tsan_read_range(void* p, size_t size) { access(p, size, false, false, HERE); }
void __tsan_write_range(void* p, size_t size) { access(p, size, true, false, HERE); }
void __tsan_init() {}

// UBSan: what C++ leaves undefined, a GPU does in its own way.
void __ubsan_handle_type_mismatch_v1(void*, const void* p) {
    fail("a pointer to @a%p@ in @p%p@, which is not aligned for its type", (void*)p, HERE);
}
void __ubsan_handle_out_of_bounds(void*, intptr_t index) {
    fail("index %ld in @p%p@, outside its array", (long)index, HERE);
}
void __ubsan_handle_shift_out_of_bounds(void*, intptr_t, intptr_t by) {
    fail("shift by %ld in @p%p@", (long)by, HERE);
}
void __ubsan_handle_divrem_overflow(void*, intptr_t, intptr_t) { fail("division by zero in @p%p@", HERE); }
void __ubsan_handle_float_cast_overflow(void*, intptr_t) { fail("float beyond the integer's range in @p%p@", HERE); }

// ---- what build.py calls

#define EXPORT __attribute__((visibility("default")))

EXPORT void emu_clear() {
    for (Space& space : spaces)
        free(space.cells);
    spaces.clear();
    recent = nullptr;
}

EXPORT void emu_space(void* low, size_t size, bool shared, bool writable, bool initialised) {
    spaces.push_back({(u8*)low, (u8*)low + size, shared, writable, initialised,
                      writable ? (Cell*)calloc(size ? size : 1, sizeof(Cell)) : nullptr});
}

EXPORT void* emu_dynamic_shared() { return emu::dynamic_shared; }
EXPORT size_t emu_dynamic_limit() { return sizeof emu::dynamic_shared; }

EXPORT uintptr_t emu_module() {
    if (!module_high) {
        fill_tables();
        dl_iterate_phdr(find_module, nullptr);
    }
    return module_low;
}

// The report, or null.
EXPORT const char* emu_launch(void (*function)(void**), void** values, const unsigned* grid, const unsigned* block, int mode,
                              u64 seed, int (*site)(const void*)) {
    kernel = function;
    arguments = values;
    site_of = site;
    grid_dim = {grid[0], grid[1], grid[2]};
    block_dim = {block[0], block[1], block[2]};
    threads = int(block[0] * block[1] * block[2]);
    random_state = seed * 0x9e3779b97f4a7c15 + 1;
    stopped = false;
    now = 0;
    std::vector<int> order(grid[0] * grid[1] * grid[2]);
    reorder(order, mode);
    for (unsigned cta : order) {
        block_index = {cta % grid[0], cta / grid[0] % grid[1], cta / grid[0] / grid[1]};
        run_cta(mode);
        if (stopped)
            return report.c_str();
    }
    return nullptr;
}

}
