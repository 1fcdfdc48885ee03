// emu: runs a kernel, one cluster of CTAs at a time, every thread a fiber, and watches each load and store
//
// The kernel is compiled with g++ -fsanitize=thread, whose calls before each access (__tsan_read4 ...) end here and not in
// libtsan. Every byte of shared memory and of writable buffers has a Cell: who wrote it last, who read it, and when. Time is
//   time       the epoch of a warp, renewed whenever it synchronises. A thread has `seen` an epoch of each other warp: all
//              accesses up to it came before. Barriers join what their threads have seen, an mbarrier hands it on from those
//              that arrive to those that wait; the copies an mbarrier counts are one more agent beside the warps.
//   step       counts a warp's collectives: within one warp, accesses with equal step have no order either
// and an access without order to an earlier one of another thread, one of them a write, is a race. This does not depend on
// how the fibers happened to run.
//
// What is asynchronous happens as late as it may. A bulk copy lands when nothing else can run (order "forward": the oldest
// first, "reverse": the newest, else any at any time); until then its bytes are poison. A wgmma multiplies at the wait that
// ends it; until then its accumulators are poison and no use to anybody, and its operand in shared memory counts as read
// both when it starts and when it ends.
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

enum Wait {
    READY, BARRIER, SWAP, MMA_I4, MMA_HALF, WARP_BARRIER, WGMMA, WGMMA_WAIT, TRANSPOSE, NAMED, MBARRIER, CLUSTER, MMA_NVFP4,
    MMA_I8, DONE
};
const char* const WAITS[] = {"are ready", "wait at the barrier in", "wait at the shuffle in", "wait at the 4-bit MMA in",
                             "wait at the 16-bit MMA in", "wait at the warp's barrier in", "wait at the wgmma in",
                             "wait for wgmmas in", "wait at the transposed store in", "wait at the barrier of some in",
                             "wait for the mbarrier in", "wait at the cluster's barrier in", "wait at the NVFP4 MMA in",
                             "wait at the 8-bit MMA in",
                             "have ended"};

struct Copy { u8* to; const u8* from; const void* place; };

enum Kind { E4M3, BF16, FP16 };         // of a wgmma's operands

struct Wgmma {
    Kind kind;
    bool add, committed;
    float* d;
    u32 a[4];
    u64 b;
    const void* place;
};

struct Held {                           // 64 accumulators that wgmmas work on
    float* at;
    float values[64];
};

struct Fiber {
    void* stack_pointer;
    u8* stack;
    Index index;
    Wait wait;
    const void* place;                  // where it waits
    int flag;                           // of the collective: signedness, type, lane mask
    u32 value;                          // shuffle: in and out
    u32 a[4], b[2], scales[2];          // MMA
    void* d;
    std::vector<Copy> open;             // cp.async not yet in a group
    std::deque<std::vector<Copy>> groups;
    int cta;                            // in the cluster
    Index block;
    u64 operand;                        // wgmma
    bool fenced;
    std::vector<Wgmma> wgmmas;          // not yet waited for
    std::vector<Held> held;
    const u8* waiting;                  // the mbarrier
};

constexpr int AGENTS = 64, WARPS = MAX_THREADS / WARP;          // warps, then mbarriers for the copies they count
constexpr int MAX_CLUSTER = 2;
constexpr size_t SHARED = 227 << 10;    // the most a CTA may have

Fiber fibers[MAX_THREADS];
Fiber* self;                            // null on the scheduler's own stack
uintptr_t stack_low;                    // of self
void* scheduler;
int threads, per_cta;                   // of the cluster, of one CTA
u32 now, cta_start, steps[WARPS];
u32 epochs[WARPS], seen[MAX_THREADS][AGENTS];
u32 touched[WARPS];                     // lanes that accessed memory since the warp's last collective
bool stale[WARPS];                      // its lanes may have seen different things
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
            snprintf(who, sizeof who, ", thread %d", int(self - fibers) % per_cta);
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
    if (!self->wgmmas.empty())
        fail("ends with a wgmma on its way, issued in @p%p@", self->wgmmas[0].place);
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
    fiber.wgmmas.clear();
    fiber.held.clear();
    fiber.fenced = false;
}

// ---- memory

struct Touch {
    u32 time, step, place;              // time 0: never
    u16 thread, more;
};
enum { EMPTY, LIVE, FLYING, BULK };                     // Cell.write.more. To land here: FLYING, a cp.async; BULK, a bulk copy
enum { LANES = 1, CTAS = 2 };                           // Cell.read.more: others have read it as well

struct Cell { Touch write, read; };

struct Space {
    u8 *low, *high;
    bool shared, writable, initialised;
    Cell* cells;                        // null where nobody may write
    u32* readers;                       // [4-byte word][warp]: the epoch of its last read
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
    return {epochs[thread / WARP], steps[thread / WARP], offset(place), (u16)thread, more};
}

// Is there no order between `then` and this thread's now?
bool unordered(const Touch& then) {
    if (!then.time)
        return false;
    if (then.time < cta_start)
        return true;                                    // another CTA, of an earlier cluster
    const int thread = int(self - fibers);
    if (then.thread / WARP == thread / WARP)
        return then.thread != thread && then.step == steps[thread / WARP];
    return then.time > seen[thread][then.thread / WARP];
}

void race(const u8* p, const char* what, const char* earlier, const Touch& then) {
    const bool other = then.time < cta_start || then.more & CTAS;
    char by[64];
    if (other || then.thread == self - fibers)
        snprintf(by, sizeof by, "%s", other ? "another block" : "another thread");
    else if (then.thread >= MAX_THREADS)
        snprintf(by, sizeof by, "a bulk copy");
    else
        snprintf(by, sizeof by, "thread %u", then.thread % per_cta);
    fail("race: %s @a%p@ in @p%p@, and %s %s it in @p%p@ with no %s between", what, (void*)p, self->place, by, earlier,
         place_at(then.place), other ? "order" : "barrier");
}

void flying(const u8* p, const char* what, const Cell& cell) {
    fail("%s @a%p@ in @p%p@, where the %s that thread %u issued in @p%p@ has not landed: %s", what, (void*)p, self->place,
         cell.write.more == BULK ? "bulk copy" : "cp.async", cell.write.thread % per_cta, place_at(cell.write.place),
         cell.write.more == BULK ? "its mbarrier still expects it" : "that thread has not waited for it");
}

void read_cells(Space& space, u8* p, size_t size) {
    const Touch me = touch_now(self->place, 0);
    touched[me.thread / WARP] |= 1u << me.thread % WARP;
    for (u8* end = p + size; p < end; p++) {
        Cell& cell = space.cells[p - space.low];
        if (cell.write.more >= FLYING)
            flying(p, "reads", cell);
        if (cell.write.more == EMPTY && !space.initialised)
            fail("reads @a%p@ in @p%p@, which nobody has written", (void*)p, self->place);
        if (unordered(cell.write))
            race(p, "reads", "wrote", cell.write);
        Touch& last = cell.read;
        u16 more = last.more & CTAS;
        if (last.time && last.time < cta_start)
            more |= CTAS;
        else if (last.time && last.thread / WARP == me.thread / WARP && last.step == me.step)
            more |= last.thread != me.thread ? LANES : last.more & LANES;
        last = me;
        last.more = more;
        space.readers[size_t(p - space.low) / 4 * WARPS + me.thread / WARP] = me.time;
    }
}

void write_cells(Space& space, u8* p, size_t size, u16 state) {
    const Touch me = touch_now(self->place, state);
    const int warp = me.thread / WARP;
    touched[warp] |= 1u << me.thread % WARP;
    for (u8* end = p + size; p < end; p++) {
        Cell& cell = space.cells[p - space.low];
        if (cell.write.more >= FLYING)
            flying(p, "writes", cell);
        if (unordered(cell.write))
            race(p, "writes", "wrote", cell.write);
        const Touch& last = cell.read;
        if (last.time) {
            const bool other_lane = last.more & LANES && last.thread / WARP == warp && last.step == me.step;
            if (last.more & CTAS || unordered(last) || other_lane)
                race(p, "writes", "read", last);
            const u32* readers = space.readers + size_t(p - space.low) / 4 * WARPS;
            for (int w = 0; w < WARPS; w++)
                if (w != warp && readers[w] > seen[me.thread][w] && readers[w] >= cta_start)
                    race(p, "writes", "read", Touch{readers[w], 0, last.place, u16(w * WARP), 0});
        }
        cell.write = me;
    }
}

void access(const void* pointer, size_t size, bool write, bool aligned, const void* place) {
    if ((uintptr_t)pointer - stack_low < STACK || !self) {
        if (self)
            for (const Held& held : self->held)
                if ((u8*)pointer + size > (u8*)held.at && (u8*)pointer < (u8*)(held.at + 64))
                    fail("%s an accumulator of a wgmma on its way in @p%p@, before a wgmma_wait", write ? "writes" : "reads",
                         place);
        return;
    }
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

float e4m3[256];

float e4m3_value(u32 bits) {
    const u32 exponent = bits >> 3 & 15, fraction = bits & 7;
    if (exponent == 15 && fraction == 7)
        return NAN;
    const float size = exponent ? ldexpf(float(8 + fraction), int(exponent) - 10) : ldexpf(float(fraction), -9);
    return bits & 0x80 ? -size : size;
}

void fill_tables() {
    for (int byte = 0; byte < 256; byte++) {
        const int low = byte & 15, high = byte >> 4;
        nibbles[1][byte][0] = u32(low) | u32(high) << 16;
        nibbles[0][byte][0] = u32((low ^ 8) - 8) % 65536 | u32((high ^ 8) - 8) << 16;
        e4m3[byte] = e4m3_value(byte);
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

void multiply_i8(Fiber* lanes) {
    int8_t a[16][32], b[8][32];
    for (int lane = 0; lane < WARP; lane++) {
        const Fiber& from = lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++)
            memcpy(a[g + i % 2 * 8] + i / 2 * 16 + 4 * t, &from.a[i], 4);
        for (int i = 0; i < 2; i++)
            memcpy(b[g] + i * 16 + 4 * t, &from.b[i], 4);
    }
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++) {
            const int8_t *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
            int sum = ((int*)lanes[lane].d)[i];
            for (int k = 0; k < 32; k++)
                sum += row[k] * column[k];
            ((int*)lanes[lane].d)[i] = sum;
        }
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

constexpr float E2M1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// Four scales of the block, which lane 4g + t gives.
void scales_of(const Fiber& lane, int which, double (&to)[4]) {
    for (int i = 0; i < 4; i++) {
        const u32 bits = lane.scales[which] >> 8 * i & 255;
        if (bits & 0x80)
            fail("a scale with a sign in @p%p@: ue4m3 has none", lane.place);
        to[i] = e4m3[bits];
    }
}

void multiply_nvfp4(Fiber* lanes) {
    double a[16][64], b[8][64], a_scales[16][4], b_scales[8][4];
    const int a_pair = lanes[0].flag & 1, b_lane = lanes[0].flag >> 1;
    for (int lane = 0; lane < WARP; lane++) {
        const Fiber& from = lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int n = 0; n < 8; n++) {
            for (int i = 0; i < 4; i++)
                a[g + i % 2 * 8][i / 2 * 32 + 8 * t + n] = E2M1[from.a[i] >> 4 * n & 15];
            for (int i = 0; i < 2; i++)
                b[g][i * 32 + 8 * t + n] = E2M1[from.b[i] >> 4 * n & 15];
        }
        if (t / 2 == a_pair)
            scales_of(from, 0, a_scales[g + t % 2 * 8]);
        if (t == b_lane)
            scales_of(from, 1, b_scales[g]);
    }
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = 0;
            for (int block = 0; block < 4; block++) {
                double dot = 0;
                for (int k = 16 * block; k < 16 * block + 16; k++)
                    dot += a[row][k] * b[column][k];
                sum += dot * a_scales[row][block] * b_scales[column][block];
            }
            float& c = ((float*)lanes[lane].d)[i];
            c = (float)(sum + c);
        }
}

}  // namespace

namespace emu { alignas(1024) unsigned char memory[MAX_CLUSTER * SHARED]; }

namespace {

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

// ---- order

// A new step and epoch: what the warp does from now on comes after what it did.
void renew(int warp) {
    steps[warp]++;
    epochs[warp] = ++now;
    touched[warp] = 0;
}

// These threads wait for each other: each has seen what any of them has seen and done.
void join(const std::vector<int>& who) {
    u32 all[AGENTS] = {};
    for (int i : who) {
        for (int agent = 0; agent < AGENTS; agent++)
            all[agent] = std::max(all[agent], seen[i][agent]);
        all[i / WARP] = std::max(all[i / WARP], epochs[i / WARP]);
    }
    for (int i : who)
        memcpy(seen[i], all, sizeof all);
}

void join(int first, int count) {
    std::vector<int> who(count);
    for (int i = 0; i < count; i++)
        who[i] = first + i;
    join(who);
    for (int i = first; i < first + count; i++)
        stale[i / WARP] = false;
}

// A barrier of these threads, all of which are there.
void release(const std::vector<int>& who) {
    join(who);
    for (size_t i = 0; i < who.size(); i++) {
        if (!i || who[i] / WARP != who[i - 1] / WARP)
            renew(who[i] / WARP);
        stale[who[i] / WARP] = true;                    // unless all its lanes were among them; then a join does no harm
        fibers[who[i]].wait = READY;
    }
}

int ended_in(int cta) {
    const Fiber* first = fibers + cta * per_cta;
    return (int)std::count_if(first, first + per_cta, [](const Fiber& fiber) { return fiber.wait == DONE; });
}

struct Mbarrier {
    int count, pending;
    u32 phase;
    int64_t bytes;                      // expected and not yet come
    int agent;
    bool fenced;
    Touch init;
    u32 given[AGENTS], ready[AGENTS];   // what those who arrive have seen; what those who wait will have
};
std::map<const u8*, Mbarrier> mbarriers;

struct Bulk { u8* to; const u8* from; u32 bytes; const u8* mbarrier; const void* place; };
std::deque<Bulk> bulks;

void try_complete(const u8* at) {
    Mbarrier& barrier = mbarriers[at];
    if (barrier.pending || barrier.bytes)
        return;
    barrier.phase++;
    barrier.pending = barrier.count;
    memcpy(barrier.ready, barrier.given, sizeof barrier.given);
    for (int i = 0; i < threads; i++)
        if (fibers[i].wait == MBARRIER && fibers[i].waiting == at && (barrier.phase & 1) != (u32)fibers[i].flag)
            fibers[i].wait = READY;
}

void land(const Bulk& bulk) {
    Mbarrier& barrier = mbarriers[bulk.mbarrier];
    const u32 time = ++now;
    Space& space = *space_of(bulk.to);
    for (u32 i = 0; i < bulk.bytes; i++)
        space.cells[bulk.to + i - space.low].write = {time, 0, offset(bulk.place), u16(barrier.agent * WARP), LIVE};
    memcpy(bulk.to, bulk.from, bulk.bytes);
    barrier.given[barrier.agent] = time;
    barrier.bytes -= bulk.bytes;
    try_complete(bulk.mbarrier);
}

void land_one(size_t which) {
    const Bulk bulk = bulks[which];
    bulks.erase(bulks.begin() + which);
    land(bulk);
}

// ---- wgmma

int fp8_bits;                           // below the largest product that a sum keeps, 0: all

constexpr uintptr_t SHARED_BASE = 1024; // so that 0 is no address
u8* shared_of(int cta) { return emu::memory + cta * SHARED; }

// Where row n of the operand has its 16-byte chunk c.
u8* chunk_of(u64 operand, int cta, int n, int c) {
    const auto field = [&](int at) { return u32(operand >> at & 0x3fff) << 4; };
    const u32 start = field(0), leading = field(16), stride = field(32), layout = u32(operand >> 62);
    if (layout > 1)
        fail("a wgmma operand of layout %u in @p%p@, which is not known here", layout, self ? self->place : nullptr);
    u32 address = start + n / 8 * stride;
    if (layout == 1) {
        address += n % 8 * 128 + c * 16;
        address ^= address >> 3 & 0x70;
    } else
        address += n % 8 * 16 + c * leading;
    if (address < SHARED_BASE || address + 16 > SHARED_BASE + SHARED)
        fail("a wgmma operand at %u of shared memory in @p%p@, outside of it", address, self ? self->place : nullptr);
    return shared_of(cta) + (address - SHARED_BASE);
}

// What the warps of a warpgroup multiply, in order: they must do the same.
std::vector<std::pair<const void*, u64>> multiplied[WARPS / 4];
size_t multiplications[WARPS];

void start_wgmma(int warp, Fiber* lanes) {
    for (int i = 1; i < WARP; i++)
        if (lanes[i].operand != lanes[0].operand)
            return fail("the lanes of a warp give one wgmma different operands in @p%p@", lanes[0].place);
    auto& group = multiplied[warp / 4];
    const size_t index = multiplications[warp]++;
    if (index == group.size())
        group.push_back({lanes[0].place, lanes[0].operand});
    else if (!same_place(group[index].first, lanes[0].place) || group[index].second != lanes[0].operand)
        fail("warps of one warpgroup multiply different things: @p%p@ and @p%p@", group[index].first, lanes[0].place);
}

Held& held_by(Fiber& fiber, float* d) {
    for (Held& held : fiber.held)
        if (held.at == d)
            return held;
    __builtin_unreachable();
}

int exponent_of(double value) { return value ? std::max(ilogb(value), -1000) : -1000; }

// The sum as Hopper's FP8 units are taken to make it: what lies fp8_bits below the largest exponent is cut off.
float cut_sum(const float* a, const float* b, size_t step, float c) {
    int top = exponent_of(c);
    for (int k = 0; k < 32; k++)
        if (a[k] != 0 && b[k * step] != 0)
            top = std::max(top, std::max(exponent_of(a[k]), -6) + std::max(exponent_of(b[k * step]), -6));
    const auto cut = [](double value, int exponent) {
        return ldexp(trunc(ldexp(value, fp8_bits - exponent)), exponent - fp8_bits);
    };
    double sum = cut(c, top);
    for (int k = 0; k < 32; k++)
        sum += cut(double(a[k]) * b[k * step], top);
    return (float)cut(sum, exponent_of(sum));
}

#if defined(__x86_64__) && defined(__gnu_linux__)
__attribute__((target_clones("avx2", "default")))       // the same sums, twice as fast
#endif
void add_outer(double (&sums)[128], double by, const float (&row)[128]) {
    for (int n = 0; n < 128; n++)
        sums[n] += by * row[n];
}

void multiply_wgmma(Fiber* lanes, size_t which) {
    const Wgmma& first = lanes[0].wgmmas[which];
    const int depth = first.kind == E4M3 ? 32 : 16, width = first.kind == E4M3 ? 1 : 2;
    static float a[16][32], b[32][128];
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4 / width; j++) {
                const u32 bits = lanes[lane].wgmmas[which].a[i] >> 8 * width * j;
                a[lane / 4 + i % 2 * 8][i / 2 * (16 / width) + 4 / width * (lane % 4) + j] =
                    width == 1 ? e4m3[bits & 255] : half_value(bits & 0xffff, first.kind == BF16);
            }
    for (int n = 0; n < 128; n++)
        for (int c = 0; c < 2; c++) {
            const u8* from = chunk_of(first.b, lanes[0].cta, n, c);
            for (int j = 0; j < 16 / width; j++)
                b[16 / width * c + j][n] = width == 1
                    ? e4m3[from[j]] : half_value(from[2 * j] | from[2 * j + 1] << 8, first.kind == BF16);
        }
    for (int row = 0; row < 16; row++) {
        double sums[128] = {};
        const bool cut = fp8_bits && first.kind == E4M3;
        if (!cut)
            for (int k = 0; k < depth; k++)
                add_outer(sums, a[row][k], b[k]);
        for (int n = 0; n < 128; n++) {
            Fiber& lane = lanes[row % 8 * 4 + n % 8 / 2];
            float& d = held_by(lane, lane.wgmmas[which].d).values[n / 8 * 4 + row / 8 * 2 + n % 2];
            const float c = first.add ? d : 0.0f;
            d = cut ? cut_sum(a[row], &b[0][n], 128, c) : (float)(c + sums[n]);
        }
    }
}

void finish_wgmmas(Fiber* lanes) {
    for (int i = 1; i < WARP; i++)
        if (lanes[i].wgmmas.size() != lanes[0].wgmmas.size())
            return fail("the lanes of a warp wait for different wgmmas in @p%p@", lanes[0].place);
    for (size_t i = 0; i < lanes[0].wgmmas.size() && !stopped; i++)
        multiply_wgmma(lanes, i);
}

// Word i of lane 4r + c: row r, columns 2c and 2c+1 of matrix i. Lane 8i + n receives column n of matrix i.
void transpose(Fiber* lanes) {
    u32 columns[WARP][4];
    for (int lane = 0; lane < WARP; lane++)
        for (int word = 0; word < 4; word++) {
            u32 pair = 0;
            for (int half = 0; half < 2; half++)
                pair |= (lanes[(2 * word + half) * 4 + lane % 8 / 2].a[lane / 8] >> 16 * (lane % 2) & 0xffff) << 16 * half;
            columns[lane][word] = pair;
        }
    for (int lane = 0; lane < WARP; lane++)
        memcpy(lanes[lane].a, columns[lane], 16);
}

void meet(int warp) {
    Fiber* lanes = fibers + warp * WARP;
    if (!all_together(warp * WARP, WARP))
        return;
    if (lanes[0].wait == MMA_I4)
        multiply_i4(lanes);
    else if (lanes[0].wait == MMA_HALF)
        multiply_half(lanes);
    else if (lanes[0].wait == MMA_NVFP4)
        multiply_nvfp4(lanes);
    else if (lanes[0].wait == MMA_I8)
        multiply_i8(lanes);
    else if (lanes[0].wait == WGMMA)
        start_wgmma(warp, lanes);
    else if (lanes[0].wait == WGMMA_WAIT)
        finish_wgmmas(lanes);
    else if (lanes[0].wait == TRANSPOSE)
        transpose(lanes);
    else if (lanes[0].wait == SWAP) {
        u32 values[WARP];
        for (int i = 0; i < WARP; i++)
            values[i] = lanes[i].value;
        for (int i = 0; i < WARP; i++)
            lanes[i].value = values[(i ^ lanes[i].flag) & (WARP - 1)];
    }
    if (stale[warp])
        join(warp * WARP, WARP);
    renew(warp);
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

// One cluster of CTAs, which begins with block `first`.
void run_cluster(unsigned first, int ctas, int mode) {
    cta_start = ++now;
    memset(steps, 0, sizeof steps);
    memset(touched, 0, sizeof touched);
    memset(stale, 0, sizeof stale);
    memset(multiplications, 0, sizeof multiplications);
    for (auto& group : multiplied)
        group.clear();
    mbarriers.clear();
    bulks.clear();
    for (u32& epoch : epochs)
        epoch = ++now;
    for (Space& space : spaces)
        if (space.shared) {
            memset(space.low, POISON, space.high - space.low);
            memset(space.cells, 0, (space.high - space.low) * sizeof(Cell));
        }
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        const unsigned cta = unsigned(i / per_cta), thread = unsigned(i % per_cta), block = first + cta;
        prepare(fiber);
        fiber.cta = int(cta);
        fiber.block = {block % grid_dim.x, block / grid_dim.x % grid_dim.y, block / grid_dim.x / grid_dim.y};
        fiber.index = {thread % block_dim.x, thread / block_dim.x % block_dim.y, thread / block_dim.x / block_dim.y};
        std::fill(seen[i], seen[i] + AGENTS, cta_start);
    }
    std::vector<int> order(threads), arrived((threads + WARP - 1) / WARP);
    std::vector<std::vector<int>> at_barrier(ctas);
    std::map<std::pair<int, int>, std::vector<int>> at_named;
    std::vector<int> at_cluster;
    reorder(order, mode);
    int ended = 0;
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
            block_index = fiber.block;
            emu_switch(&scheduler, fiber.stack_pointer);
            self = nullptr;
            if (!stopped && *(u64*)fiber.stack != CANARY)
                fail("thread %d: stack overflow", i);
            if (stopped)
                return;
            if (fiber.wait == DONE)
                ended++;
            else if (fiber.wait == BARRIER) {
                auto& there = at_barrier[fiber.cta];
                there.push_back(i);
                if ((int)there.size() == per_cta && all_together(fiber.cta * per_cta, per_cta)) {
                    std::sort(there.begin(), there.end());
                    release(there);
                    there.clear();
                }
            } else if (fiber.wait == NAMED) {
                auto& there = at_named[{fiber.cta, fiber.flag}];
                there.push_back(i);
                if ((int)there.size() == fiber.flag % 65536) {
                    std::sort(there.begin(), there.end());
                    for (int other : there)
                        if (!together(fibers[there[0]], fibers[other]))
                            fail("divergent: @p%p@ and @p%p@ at one barrier", fibers[there[0]].place, fibers[other].place);
                    release(there);
                    there.clear();
                }
            } else if (fiber.wait == CLUSTER) {
                at_cluster.push_back(i);
                if ((int)at_cluster.size() == threads && all_together(0, threads)) {
                    std::sort(at_cluster.begin(), at_cluster.end());
                    release(at_cluster);
                    at_cluster.clear();
                }
            } else if (fiber.wait == MBARRIER || fiber.wait == READY)
                ;                                       // what it waits for wakes it, or it has only made room for others
            else if (++arrived[i / WARP] == WARP) {
                arrived[i / WARP] = 0;
                meet(i / WARP);
            }
            if (stopped)
                return;
        }
        if (!bulks.empty() && (!ran || (mode == SHUFFLE && random_below(4) == 0)))
            land_one(mode == FORWARD ? 0 : mode == REVERSE ? bulks.size() - 1 : random_below(u32(bulks.size())));
        else if (!ran)
            return fail("stuck: %s", whereabouts(0, threads).c_str());
    }
    if (!bulks.empty())
        fail("ends with a bulk copy on its way, issued in @p%p@", bulks[0].place);
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

void barrier(int) { wait_for_others(BARRIER, 0, HERE); }

void* dynamic_shared() { return shared_of(self->cta); }

unsigned swap_lanes(unsigned x, int mask, int) {
    self->value = x;
    wait_for_others(SWAP, mask, HERE);
    return self->value;
}

static void mma(Wait kind, int flag, void* d, const words4& a, u32 b0, u32 b1, const void* place) {
    access(&a, 16, false, true, place);                 // operands may be references into memory
    if (kind != MMA_I4)
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

void mma_i8(int (&c)[4], const words4& a, unsigned b0, unsigned b1) { mma(MMA_I8, 0, c, a, b0, b1, HERE); }

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

// float64 holds the sum, or what it lacks is too small to decide; fp32 on the way is rounded to odd, so that only the last
// rounding counts.
static u32 fma_fp16_bits(u32 a, u32 b, u32 c) {
    const double sum = (double)halves[a] * halves[b] + halves[c];
    const float near = (float)sum;
    u32 bits = as_bits(near);
    if (near != sum && near == near && !(bits & 1))
        bits += (sum > near) == (near > 0) ? 1 : -1;
    return fp16_bits(as_float(bits));
}

unsigned fma_fp16(unsigned a, unsigned b, unsigned c) {
    return fma_fp16_bits(a & 0xffff, b & 0xffff, c & 0xffff) | fma_fp16_bits(a >> 16, b >> 16, c >> 16) << 16;
}

int round_even(float value) {
    if (value != value)
        return 0;
    const float rounded = nearbyintf(value);
    return rounded >= 2147483648.0f ? INT32_MAX : rounded < -2147483648.0f ? INT32_MIN : (int)rounded;
}

}  // namespace emu

// ---- Hopper

namespace emu {

void warp_barrier(int) { wait_for_others(WARP_BARRIER, 0, HERE); }
void barrier_of(int number, int count, int) {
    const void* place = HERE;
    if (number < 1 || number > 15 || count % WARP)
        fail("barrier %d of %d threads in @p%p@. Numbers are 1 to 15, threads come in warps", number, count, place);
    wait_for_others(NAMED, number << 16 | count, place);
}

static Mbarrier& mbarrier_at(const void* at, const void* place) {
    self->place = place;
    const auto found = mbarriers.find((const u8*)at);
    if (found == mbarriers.end())
        fail("@a%p@ in @p%p@ is no mbarrier: none was initialised there", (void*)at, place);
    if (unordered(found->second.init))
        race((const u8*)at, "uses", "initialised", found->second.init);
    return found->second;
}

void mbarrier_init(void* at, int count) {
    const void* place = HERE;
    access(at, 8, true, true, place);
    if (mbarriers.size() == AGENTS - WARPS || count < 1)
        fail("mbarrier of %d threads in @p%p@: none, or more mbarriers than the emulator has room for", count, place);
    Mbarrier barrier = {count, count, 0, 0, WARPS + int(mbarriers.size()), false, touch_now(place, LIVE), {}, {}};
    if (!mbarriers.insert({(const u8*)at, barrier}).second)
        fail("@a%p@ in @p%p@ is an mbarrier already", at, place);
}

void mbarrier_fence() {
    for (auto& entry : mbarriers)
        if (entry.second.init.thread == self - fibers)
            entry.second.fenced = true;
}

// Hands on what this thread has seen and done; of its warp's other lanes only what came before the last collective.
static void give(u32* to) {
    const int thread = int(self - fibers), warp = thread / WARP;
    for (int agent = 0; agent < AGENTS; agent++)
        to[agent] = std::max(to[agent], seen[thread][agent]);
    const bool alone = !(touched[warp] & ~(1u << thread % WARP));
    to[warp] = std::max(to[warp], alone ? epochs[warp] : epochs[warp] - 1);
    if (alone) {
        epochs[warp] = ++now;
        touched[warp] = 0;
    }
}

static void arrive(const u8* at, unsigned bytes, const void* place) {
    Mbarrier& barrier = mbarrier_at(at, place);
    if (!barrier.pending)
        fail("arrives at @a%p@ in @p%p@ once too often", (void*)at, place);
    give(barrier.given);
    barrier.pending--;
    barrier.bytes += bytes;
    try_complete(at);
}

void mbarrier_arrive(void* at, unsigned bytes) { arrive((const u8*)at, bytes, HERE); }

void mbarrier_wait(void* at, unsigned parity) {
    const void* place = HERE;
    Mbarrier& barrier = mbarrier_at(at, place);
    if ((barrier.phase & 1) == parity) {
        self->waiting = (const u8*)at;
        wait_for_others(MBARRIER, int(parity), place);
    }
    const int thread = int(self - fibers);
    for (int agent = 0; agent < AGENTS; agent++)
        seen[thread][agent] = std::max(seen[thread][agent], barrier.ready[agent]);
    stale[thread / WARP] = true;
}

// The same place in another CTA of the cluster.
static void* in_cta(const void* pointer, unsigned rank) {
    const u8 *p = (const u8*)pointer, *low = shared_of(self->cta);
    if (p < low || p >= low + SHARED || int(rank) >= threads / per_cta)
        fail("@a%p@ in @p%p@ has no counterpart in CTA %u of the cluster", (void*)pointer, self->place, rank);
    if (ended_in(int(rank)) == per_cta)
        fail("@a%p@ in @p%p@ is of a CTA that has ended, %u of the cluster", (void*)pointer, self->place, rank);
    return shared_of(int(rank)) + (p - low);
}

void mbarrier_arrive_at(void* at, unsigned rank) {
    const void* place = self->place = HERE;
    arrive((u8*)in_cta(at, rank), 0, place);
}

static void copy_bulk(void* to_shared, const void* from_global, unsigned bytes, void* mbarrier, const void* place) {
    Mbarrier& barrier = mbarrier_at(mbarrier, place);
    if (!barrier.fenced)
        fail("a bulk copy in @p%p@ on an mbarrier that no mbarrier_fence has shown to the copy engine", place);
    Space* to = space_of(to_shared);
    if (!to || !to->shared || (u8*)to_shared + bytes > to->high)
        fail("bulk copy to @a%p@ in @p%p@, not %u bytes of shared memory", to_shared, place, bytes);
    if (!bytes || ((uintptr_t)to_shared | (uintptr_t)from_global | bytes) % 16)
        fail("bulk copy of %u bytes from @a%p@ to @a%p@ in @p%p@: no multiple of 16", bytes, (void*)from_global, to_shared,
             place);
    Space* from = space_of(from_global);
    if (!from || from->shared)
        fail("bulk copy from @a%p@ in @p%p@, which is no global memory", (void*)from_global, place);
    access(from_global, bytes, false, false, place);
    write_cells(*to, (u8*)to_shared, bytes, BULK);
    memset(to_shared, POISON, bytes);
    bulks.push_back({(u8*)to_shared, (const u8*)from_global, bytes, (const u8*)mbarrier, place});
}

void bulk_copy(void* to_shared, const void* from_global, unsigned bytes, void* mbarrier) {
    copy_bulk(to_shared, from_global, bytes, mbarrier, self->place = HERE);
}

void bulk_copy_to(unsigned mask, void* to_shared, const void* from_global, unsigned bytes, void* mbarrier) {
    const void* place = self->place = HERE;
    for (unsigned rank = 0; mask >> rank; rank++)
        if (mask >> rank & 1)
            copy_bulk(in_cta(to_shared, rank), from_global, bytes, in_cta(mbarrier, rank), place);
}

unsigned cluster_rank() { return (unsigned)self->cta; }
void cluster_barrier(int) { wait_for_others(CLUSTER, 0, HERE); }

unsigned shared_address(const void* pointer) {
    const u8 *p = (const u8*)pointer, *low = shared_of(self->cta);
    if (p < low || p >= low + SHARED)
        fail("@a%p@ is no dynamic shared memory of this CTA", (void*)pointer);
    return unsigned(p - low + SHARED_BASE);
}

void wgmma_fence() { self->fenced = true; }

void wgmma_commit() {
    for (Wgmma& wgmma : self->wgmmas)
        wgmma.committed = true;
}

// This lane's part of the rows of an operand: each is read by the warp.
static void read_operand(u64 operand) {
    for (int n = int(self - fibers) % WARP; n < 128; n += WARP)
        for (int c = 0; c < 2; c++)
            access(chunk_of(operand, self->cta, n, c), 16, false, true, self->place);
}

static void wgmma(Kind kind, bool add, float* d, const words4& a, u64 b, const void* place) {
    access(&a, 16, false, true, place);
    if (!self->fenced)
        fail("a wgmma in @p%p@ without a wgmma_fence after the last wait", place);
    Wgmma entry = {kind, add, false, d, {}, b, place};
    memcpy(entry.a, a.w, 16);
    self->operand = b;
    wait_for_others(WGMMA, kind | add << 4, place);
    bool is_held = false;
    for (const Held& held : self->held)
        is_held |= held.at == d;
    if (!is_held) {
        access(d, 256, true, false, place);             // overlaps no other
        Held held = {d, {}};
        memcpy(held.values, d, 256);
        memset(d, 0xff, 256);                           // NaN
        self->held.push_back(held);
    }
    read_operand(b);
    self->wgmmas.push_back(entry);
}

void wgmma_e4m3(bool add, float* d, const words4& a, unsigned long long b) { wgmma(E4M3, add, d, a, b, HERE); }
void wgmma_half(bool bf16, float* d, const words4& a, unsigned long long b) {
    wgmma(bf16 ? BF16 : FP16, true, d, a, b, HERE);
}

void wgmma_wait(float*) {
    const void* place = HERE;
    if (self->wgmmas.empty())
        return;
    self->place = place;
    for (const Wgmma& entry : self->wgmmas) {
        if (!entry.committed)
            fail("waits in @p%p@ for wgmmas that were not committed, issued in @p%p@", place, entry.place);
        read_operand(entry.b);
    }
    wait_for_others(WGMMA_WAIT, 0, place);
    for (const Held& held : self->held)
        memcpy(held.at, held.values, 256);
    self->held.clear();
    self->wgmmas.clear();
    self->fenced = false;
}

void store_transposed(void* to_shared, const words4& matrices) {
    const void* place = HERE;
    access(&matrices, 16, false, true, place);
    memcpy(self->a, matrices.w, 16);
    wait_for_others(TRANSPOSE, 0, place);
    access(to_shared, 16, true, true, place);
    memcpy(to_shared, self->a, 16);
}

static u32 e4m3_bits(float value) {
    if (value != value)
        return 0x7f;
    const u32 sign = as_bits(value) >> 31 << 7;
    const float size = fminf(fabsf(value), 448.0f);
    const int exponent = size < 0x1p-6f ? -6 : ilogbf(size);
    const u32 steps = (u32)nearbyintf(ldexpf(size, 3 - exponent));      // 8..16, or below 8 for a subnormal
    return sign | (steps + (u32(exponent + 6) << 3));                   // as in fp16_bits
}

unsigned pack_e4m3(float low, float high) { return e4m3_bits(low) | e4m3_bits(high) << 8; }

}  // namespace emu

// ---- Blackwell

namespace emu {

void mma_nvfp4(float (&c)[4], const words4& a, unsigned b0, unsigned b1, unsigned a_scales, unsigned b_scales, int a_pair,
               int b_lane) {
    self->scales[0] = a_scales, self->scales[1] = b_scales;
    mma(MMA_NVFP4, a_pair | b_lane << 1, c, a, b0, b1, HERE);
}

static u32 e2m1_bits(float value) {
    const float size = fabsf(value);
    if (!(size < 6.0f))                                                 // NaN too, without its sign
        return 7 | (value < 0) << 3;
    const float step = size < 2 ? 0.5f : size < 4 ? 1 : 2;
    const int first = size < 2 ? 0 : size < 4 ? 2 : 4;                  // codes below the binade; even codes, even mantissas
    return (first + (u32)nearbyintf(size / step)) | as_bits(value) >> 31 << 3;
}

unsigned pack_e2m1(const float (&x)[8]) {
    access(x, 32, false, false, HERE);
    u32 codes = 0;
    for (int i = 0; i < 8; i++)
        codes |= e2m1_bits(x[i]) << 4 * i;
    return codes;
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
    for (Space& space : spaces) {
        free(space.cells);
        free(space.readers);
    }
    spaces.clear();
    recent = nullptr;
}

EXPORT void emu_space(void* low, size_t size, bool shared, bool writable, bool initialised) {
    spaces.push_back({(u8*)low, (u8*)low + size, shared, writable, initialised,
                      writable ? (Cell*)calloc(size ? size : 1, sizeof(Cell)) : nullptr,
                      writable ? (u32*)calloc(size / 4 + 1, WARPS * sizeof(u32)) : nullptr});   // touched where it is read
}

EXPORT void* emu_dynamic_shared(int cta) { return shared_of(cta); }
EXPORT size_t emu_dynamic_limit() { return SHARED; }

EXPORT uintptr_t emu_module() {
    if (!module_high) {
        fill_tables();
        dl_iterate_phdr(find_module, nullptr);
    }
    return module_low;
}

// The report, or null.
EXPORT const char* emu_launch(void (*function)(void**), void** values, const unsigned* grid, const unsigned* block, int ctas,
                              int bits, int mode, u64 seed, int (*site)(const void*)) {
    kernel = function;
    arguments = values;
    site_of = site;
    grid_dim = {grid[0], grid[1], grid[2]};
    block_dim = {block[0], block[1], block[2]};
    per_cta = int(block[0] * block[1] * block[2]);
    threads = per_cta * ctas;
    fp8_bits = bits;
    random_state = seed * 0x9e3779b97f4a7c15 + 1;
    stopped = false;
    now = 0;
    std::vector<int> order(grid[0] * grid[1] * grid[2] / ctas);
    reorder(order, mode);
    for (unsigned cluster : order) {
        run_cluster(cluster * ctas, ctas, mode);
        if (stopped)
            return report.c_str();
    }
    return nullptr;
}

}
