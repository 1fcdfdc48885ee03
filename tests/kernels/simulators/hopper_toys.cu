// toys: small kernels that teach the PTX interpreter sm_90 (test_ptx_hopper.py). i is the thread.
//
// A comment inside of inline assembly names the statement: the tests take it out, or put another in its place.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(16) words4 { u32 x, y, z, w; };

#define D __device__ __forceinline__
#define KERNEL(NAME, ...) extern "C" __global__ void NAME(__VA_ARGS__)

D u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// mbarriers and bulk copies

D void init(u64* bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at(bar)), "r"(count) : "memory");
}
D void show() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
D void proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }
D void expect(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(at(bar)), "r"(bytes) : "memory");
}
D void wait(u64* bar, u32 parity) {
    u32 done;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(at(bar)), "r"(parity) : "memory");
    while (!done);
}
D void wait_full(u64* bar, u32 parity) {                // the same, with a loop of its own
    asm volatile("{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; /*full*/ @p bra E; bra L; E: }"
                 :: "r"(at(bar)), "r"(parity) : "memory");
}
D void copy(void* to, const void* from, u32 bytes, u64* bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(at(to)), "l"(from), "r"(bytes), "r"(at(bar)) : "memory");
}

D void copy_once(void* to, const void* from, u32 bytes, u64* bar) {     // with what changes only where L2 keeps it
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 :: "r"(at(to)), "l"(from), "r"(bytes), "r"(at(bar)), "l"(policy) : "memory");
}

// clusters

D u32 rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
D u32 map(const void* p, u32 to_rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at(p)), "r"(to_rank));
    return r;
}
D void arrive_at(u64* bar, u32 at_rank) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(map(bar, at_rank)) : "memory");
}

// wgmma

D void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
D void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// ---- kernels

// Two warps fill a box, two empty it, three times.
KERNEL(handoff, u32* d, const u32* a, int count, int number) {
    __shared__ u32 box[64];
    const int i = threadIdx.x;
    u32 sum = 0;
#pragma unroll 1
    for (int round = 0; round < 3; round++)
        if (i < 64) {
            if (round)
                asm volatile("bar.sync 2, 128; /*emptied*/" ::: "memory");
            box[i] = a[round * 64 + i];
            asm volatile("bar.arrive %0, %1;" :: "r"(number), "r"(count) : "memory");
        } else {
            asm volatile("bar.sync 1, 128; /*filled*/" ::: "memory");
            sum += box[127 - i];
            if (round < 2)
                asm volatile("bar.arrive 2, 128;" ::: "memory");
        }
    d[i] = sum;
}

// An mbarrier waited for by its state and by parity, then given back to ordinary stores.
KERNEL(states, u32* d, u64* seen) {
    __shared__ u64 bar;
    const int i = threadIdx.x;
    if (i == 0)
        init(&bar, 64);
    __syncthreads();
    u64 state;
    u32 over, running;
    asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(at(&bar)) : "memory");
    d[64 + i] = 5;
    do
        asm volatile("{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(over) : "r"(at(&bar)), "l"(state) : "memory");
    while (!over);
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], 1; selp.u32 %0, 1, 0, p; }"
                 : "=r"(running) : "r"(at(&bar)) : "memory");
    d[i] = running;
    __syncthreads();
    if (i == 0) {
        asm volatile("mbarrier.inval.shared::cta.b64 [%0]; /*inval*/" :: "r"(at(&bar)) : "memory");
        bar = 7;
    }
    __syncthreads();
    seen[i] = bar;
}

KERNEL(fetch, words4* d, const words4* a, int expected) {
    __shared__ words4 box[64];
    __shared__ u64 bar;
    const int i = threadIdx.x;
    if (i == 0) {
        init(&bar, 1);
        show();
        expect(&bar, expected);
        copy(box, a, 1024, &bar);
    }
    __syncthreads();
    if (i == 0)
        wait(&bar, 0);
    asm volatile("bar.sync 0; /*one waits*/" ::: "memory");
    d[i] = box[63 - i];
}

// A copy over what threads have stored, and one over what they have read.
KERNEL(clear_and_fetch, words4* d, const words4* a) {
    __shared__ words4 box[64];
    __shared__ u64 bar;
    const int i = threadIdx.x;
    if (i == 0) {
        init(&bar, 1);
        show();
    }
    box[i] = words4{0, 0, 0, 0};
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (i == 0) {
        expect(&bar, 512);
        copy(box, a, 512, &bar);
    }
    wait_full(&bar, 0);
    d[i] = box[i];
    asm volatile("bar.sync 0; /*read*/" ::: "memory");
    if (i == 0) {
        expect(&bar, 512);
        copy_once(box, a + 32, 512, &bar);
        wait_full(&bar, 1);
    }
    __syncthreads();
    d[64 + i] = box[i];
}

KERNEL(__cluster_dims__(2, 2, 1) registers, u32* d) {
    const int i = threadIdx.x;
    u32 v[8];
    asm volatile("mov.u32 %0, %%cluster_ctaid.x; mov.u32 %1, %%cluster_ctaid.y; mov.u32 %2, %%cluster_nctaid.x;"
                 "mov.u32 %3, %%clusterid.x; mov.u32 %4, %%clusterid.y; mov.u32 %5, %%nclusterid.x;"
                 "mov.u32 %6, %%cluster_ctarank; mov.u32 %7, %%cluster_nctarank;"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]), "=r"(v[4]), "=r"(v[5]), "=r"(v[6]), "=r"(v[7]));
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (i == j)
            d[(blockIdx.y * gridDim.x + blockIdx.x) * 8 + i] = v[j];
    asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
}

// Each CTA of four reads from the next one's shared memory, and stores to it.
KERNEL(neighbours, u32* d, const u32* a) {
    __shared__ u32 mine[64], theirs[64];
    __shared__ u64 bar;
    const int i = threadIdx.x;
    const u32 me = rank(), next = (me + 1) % 4;
    mine[i] = a[me * 64 + i];
    if (i == 0) {
        init(&bar, 2);
        show();
    }
    asm volatile("barrier.cluster.arrive.release.aligned; /*first*/" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    u32 x, owner;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(map(mine + 63 - i, next)) : "memory");
    asm volatile("getctarank.shared::cluster.u32 %0, %1;" : "=r"(owner) : "r"(map(mine, next)));
    asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(map(theirs + i, next)), "r"(x + owner) : "memory");
    __syncwarp();
    if (i % 32 == 0)
        arrive_at(&bar, next);
    wait(&bar, 0);
    d[me * 64 + i] = theirs[i];
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

// A pair of CTAs learns of its mbarriers by a fence and a relaxed barrier, as kernels of CUTLASS start; then each arrives at
// the other's. `fencing` is the thread with the fence. `reads`: what the barrier does not show, a store, a mistake.
KERNEL(relaxed_start, u32* d, int fencing, int reads) {
    __shared__ u64 bar;
    __shared__ u32 stored;
    const int i = threadIdx.x;
    const u32 me = rank();
    if (i == 0) {
        stored = 7;
        init(&bar, 2);
    }
    if (i == fencing)
        show();
    asm volatile("barrier.cluster.arrive.relaxed.aligned; /*arrive*/" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    u32 x = i;
    if (reads)
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(map(&stored, me ^ 1)) : "memory");
    if (i % 32 == 0)
        arrive_at(&bar, me ^ 1);
    wait(&bar, 0);
    d[me * 64 + i] = x;
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

KERNEL(__launch_bounds__(384, 1) share, u32* d) {
    const int i = threadIdx.x;
    if (i < 128)
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    else
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    d[i] = i;
}

// All of it. d[64 rows per CTA, 16] = sum over steps, scales[step] * (a of this CTA, 128 wide) (x, 16 tokens, for all CTAs).
// A ring of two stages; a warpgroup multiplies, one thread copies, in a pair of CTAs 8 of the tokens for both. `flip_full`,
// `flip_empty`, `early` and wrong numbers are mistakes.
KERNEL(__launch_bounds__(256, 2) pipeline, float* d, const u32* a, const u8* x, const float* scales, int steps, int arrivals,
       int bytes, u64 from, int flip_full, int flip_empty, int early) {
    extern __shared__ __align__(1024) u8 ring[];                // two stages of 2048 bytes of x, and of 64 of scales
    __shared__ u64 full[2], empty[2];
    const int i = threadIdx.x;
    u32 ctas;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(ctas));
    const u32 me = rank();
    if (i == 0) {
        for (int s = 0; s < 2; s++) {
            init(full + s, 1);
            init(empty + s, arrivals);
        }
        show();
    }
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (i >= 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (i == 128)
#pragma unroll 1
            for (int step = 0; step < steps; step++) {
                const int s = step % 2, parity = step / 2 & 1;
                wait(empty + s, parity ^ 1 ^ flip_empty);
                expect(full + s, bytes);
                if (ctas == 1)
                    copy(ring + s * 2048, x + step * 2048, 2048, full + s);
                else
                    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                                 " [%0], [%1], 1024, [%2], %3;" :: "r"(at(ring + s * 2048 + me * 1024)),
                                 "l"(x + step * 2048 + me * 1024), "r"(at(full + s)), "h"((u16)3) : "memory");
                copy(ring + 4096 + s * 64, scales + step * 16, 64, full + s);
            }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int lane = i % 32, t = lane % 4;
        float sum[8], acc[8];
        for (int j = 0; j < 8; j++)
            acc[j] = 0;
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            const int s = step % 2, parity = step / 2 & 1;
            const u64 b = from + (at(ring + s * 2048) >> 4);
            const float* scale = (const float*)(ring + 4096 + s * 64);
            u32 f[16];
            for (int j = 0; j < 16; j++)
                f[j] = a[((me * steps + step) * 16 + j) * 128 + i];
            auto release = [&] {
                __syncwarp();
                if (lane == 0)
                    for (int r = 0; r < ctas; r++)
                        arrive_at(empty + s, r);
            };
            wait_full(full + s, parity ^ flip_full);
            asm volatile("wgmma.fence.sync.aligned; /*fence*/" ::: "memory");
#pragma unroll
            for (int k = 0; k < 4; k++)
                asm volatile("{ .reg .pred p; setp.ne.b32 p, %13, 0; wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
                             "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1; }"
                             : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]),
                               "+f"(sum[6]), "+f"(sum[7])
                             : "r"(f[4 * k]), "r"(f[4 * k + 1]), "r"(f[4 * k + 2]), "r"(f[4 * k + 3]), "l"(b + 2 * k), "r"(k)
                             : "memory");
            commit();
            float by[4];
            for (int j = 0; j < 4; j++)
                by[j] = scale[j / 2 * 8 + 2 * t + j % 2];
            if (early)
                release();
            asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]),
                         "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]), "+f"(sum[7]) :: "memory");
            for (int j = 0; j < 8; j++)
                acc[j] += sum[j] * by[j / 4 * 2 + j % 2];
            if (!early)
                release();
        }
        for (int j = 0; j < 8; j++)
            d[(me * 8 + j) * 128 + i] = acc[j];
    }
    asm volatile("barrier.cluster.arrive; barrier.cluster.wait; /*last*/" ::: "memory");
}
