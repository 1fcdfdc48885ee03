// An INT4 linear with activations in 8 bits: quantise, then product. Included once for every body.
//
//     z = (x + shift) / smooth                     s[m, g] = max |z| / 127 over 64 inputs          q = z / s, half to even
//     y[m, n] = sum_g s[m, g] ws[n, g] sum_k q[m, k] c[n, k]  +  bias[n]  +  sum_r low[m, r] up[n, r]         low = x @ down
//
// Codes c are kept as c + 8 (0..15), for instructions that want one unsigned operand; 8 sum_k q is taken off again where a sum
// of products starts (`sums`).
//
// The product goes in items of one panel, 16 outputs, and a block of tokens whose codes stay in the L2 cache. Inputs come in
// runs of 16 groups: the panel's part of them is unpacked to bytes, 16 KB, half of the L1 cache,
//
//     16 inputs: [4 quads][16 outputs][4 inputs]      a register of 32 bytes is 8 outputs, a quad of activations goes to all
//
// and every tile of 4 tokens x 16 outputs (TOKENS of the body) runs over it, group by group: integer sums, then one fma into
// `acc`. Up to 8 tokens take the time of reading the weight: an item is then the 8 panels that lie side by side, by groups.
//
// I6  A tile's sums are exact, and `acc` takes the groups in order: a row's result does not depend on its tile.
// I7  `tile` reads whole groups of whole panels: K % 64 == 0, N % 16 == 0. Tokens of a last tile are a template's T.
//
// Tried and dropped: tiles of 3, 5 and 6 tokens (no faster), runs of 8 groups (slower), of 32 (the same), blocks of 128 and
// 256 KB (up to a fifth slower at K = 12288), single panels for few tokens (twice as slow: a core waits for memory).

static const int RUN = 16;                          // groups
static const int64_t L2 = 384 << 10;                // bytes of activations in a block of tokens

struct Quantising {
    const Quantise& job;
    const float* smooth;                            // [k]
    const float* down;                              // [rank / 16, k, 16]
};

// Four tokens: their codes and scales, and their low rank.
static void quantise_tokens(const void* context, int64_t item) {
    const auto& c = *(const Quantising*)context;
    const auto& job = c.job;
    const int64_t k = job.k, groups = k / GROUP, first = item * 4, count = std::min<int64_t>(4, job.tokens - first);
    float* const x = scratch<float, 0>(4 * k);
    const F8 shift = all(job.shifted ? SHIFT : 0.0f);
    for (int64_t t = 0; t < count; t++) {
        float* const row = x + t * k;
        for (int64_t i = 0; i < k; i += 8) store(row + i, load_as(job.x_kind, job.x, (first + t) * job.x_stride + i));
        for (int64_t g = 0; g < groups; g++) {
            F8 z[GROUP / 8];
            I8 most = zeros(), total = zeros();
            for (int i = 0; i < GROUP / 8; i++) {
                z[i] = div(add(load(row + g * GROUP + i * 8), shift), load(c.smooth + g * GROUP + i * 8));
                most = largest(most, z[i]);
            }
            const float scale = largest_of(most) / 127.0f;
            int8_t* const codes = job.codes + (first + t) * k + g * GROUP;
            if (scale > 0 && scale < INFINITY)
                for (int i = 0; i < GROUP / 8; i++) round_to_codes(div(z[i], all(scale)), codes + i * 8, total);
            else
                std::memset(codes, 0, GROUP);       // zeros; or NaN or Inf in it, which the scale keeps
            job.scales[(first + t) * groups + g] = scale;
            job.sums[(first + t) * groups + g] = -8 * sum(total);
        }
    }
    for (int64_t block = 0; block < job.rank / 16; block++) {
        F8 low[4][2];
        for (auto& two : low) two[0] = two[1] = all(0);
        const float* down = c.down + block * k * 16;
        for (int64_t i = 0; i < k; i++, down += 16) {
            const F8 d0 = load(down), d1 = load(down + 8);
            for (int t = 0; t < 4; t++) {           // rows past `count` are of an earlier item, and stored nowhere
                const F8 one = all(x[t * k + i]);
                low[t][0] = fma(one, d0, low[t][0]);
                low[t][1] = fma(one, d1, low[t][1]);
            }
        }
        for (int64_t t = 0; t < count; t++) {
            float* const out = job.low + (first + t) * job.rank + block * 16;
            store(out, low[t][0]);
            store(out + 8, low[t][1]);
        }
    }
}

static void factor(const Factor& job);

static void quantise(const Quantise& job) {
    float* const smooth = scratch<float, 5>(job.k);
    float* const down = scratch<float, 6>(job.k * job.rank);
    for (int64_t i = 0; i < job.k; i += PANEL) load_panel(job.half, job.smooth, i, smooth + i);
    factor({job.threads, job.k, job.rank, job.half, job.down, down, 256, 16 * job.k, 16});
    const Quantising context{job, smooth, down};
    Items((job.tokens + 3) / 4, quantise_tokens, &context).run(job.threads, 4 * job.k * (8 + job.rank));
}

struct Multiplying {
    const Product& job;
    int64_t block, panels, run;                     // tokens, panels and groups at a time
};

template <int T>
static void tile_of(int tokens, const uint8_t* panel, const float* wscales, const int8_t* codes, int64_t k, const float* scales,
                    const int32_t* sums, int64_t groups, int64_t count, float* acc) {
    if constexpr (T > 1) {
        if (tokens < T) {
            tile_of<T - 1>(tokens, panel, wscales, codes, k, scales, sums, groups, count, acc);
            return;
        }
    }
    tile<T>(panel, wscales, codes, k, scales, sums, groups, count, acc);
}

// What the accumulators of a panel start with.
static void start_panel(const Product& job, int64_t panel, int64_t first, int64_t tokens, float* acc) {
    const int64_t rank = job.rank;
    float* const up = scratch<float, 2>(rank * PANEL);
    for (int64_t block = 0; block < rank / 16; block++)
        unpack_factor(job.half, job.up, factor_block(rank, panel, block), up + block * 256, PANEL);
    F8 bias0 = all(0), bias1 = all(0);
    if (job.bias) {
        bias0 = load_as(job.kind, job.bias, panel * PANEL);
        bias1 = load_as(job.kind, job.bias, panel * PANEL + 8);
    }
    for (int64_t t = 0; t < tokens; t++) {
        F8 y0 = bias0, y1 = bias1;
        const float* const low = job.low + (first + t) * rank;
        for (int64_t r = 0; r < rank; r++) {
            const F8 one = all(low[r]);
            y0 = fma(one, load(up + r * PANEL), y0);
            y1 = fma(one, load(up + r * PANEL + 8), y1);
        }
        store(acc + t * PANEL, y0);
        store(acc + t * PANEL + 8, y1);
    }
}

// A run of groups of a panel, for all tokens of the block.
static void multiply_run(const Product& job, int64_t panel, int64_t run, int64_t count, int64_t first, int64_t tokens,
                         float* acc) {
    const int64_t k = job.k, groups = k / GROUP;
    float* const wscales = scratch<float, 3>(RUN * PANEL);
    uint8_t* const bytes = scratch<uint8_t, 4>(RUN * GROUP * PANEL);
    for (int64_t g = 0; g < count; g++) {
        if (run + g + AHEAD < groups) prefetch_block(block_of(job.qweight, k, panel, run + g + AHEAD));
        unpack_block(block_of(job.qweight, k, panel, run + g), bytes + g * GROUP * PANEL);
        load_panel(job.half, job.wscales, scales_of(k, panel, run + g), wscales + g * PANEL);
    }
    for (int64_t t = 0; t < tokens; t += TOKENS) {
        const int64_t at = (first + t) * groups + run;          // codes of a group are 64 to one scale
        tile_of<TOKENS>(int(std::min<int64_t>(TOKENS, tokens - t)), bytes, wscales, job.codes + at * GROUP, k, job.scales + at,
                        job.sums + at, groups, count, acc + t * PANEL);
    }
}

static void multiply_panels(const void* context, int64_t item) {
    const auto& c = *(const Multiplying*)context;
    const auto& job = c.job;
    const int64_t groups = job.k / GROUP, across = job.n / PANEL / c.panels;
    const int64_t panel = item % across * c.panels, first = item / across * c.block;
    const int64_t tokens = std::min(c.block, job.tokens - first);
    float* const acc = scratch<float, 1>(c.panels * tokens * PANEL);

    for (int64_t p = 0; p < c.panels; p++) start_panel(job, panel + p, first, tokens, acc + p * tokens * PANEL);
    for (int64_t run = 0; run < groups; run += c.run)
        for (int64_t p = 0; p < c.panels; p++)
            multiply_run(job, panel + p, run, std::min(c.run, groups - run), first, tokens, acc + p * tokens * PANEL);
    for (int64_t p = 0; p < c.panels; p++) {
        for (int64_t t = 0; t < tokens; t++) {
            for (int half = 0; half < 2; half++) {
                const int64_t at = (first + t) * job.out_stride + (panel + p) * PANEL + half * 8;
                const F8 y = load(acc + (p * tokens + t) * PANEL + half * 8);
                store_as(job.kind, job.out, at, job.accumulate ? add(load_as(job.kind, job.out, at), y) : y);
            }
        }
    }
}

static void product(const Product& job) {
    if (!job.tokens) return;
    const int64_t fit = std::max<int64_t>(L2 / job.k / TOKENS * TOKENS, 4 * TOKENS);
    const int64_t block = std::min<int64_t>({fit, 128, job.tokens});
    const bool few = block <= 8;
    const Multiplying context{job, block, few ? 8 : 1, few ? 1 : RUN};
    const int64_t items = (job.tokens + block - 1) / block * (job.n / PANEL / context.panels);
    Items(items, multiply_panels, &context).run(job.threads, job.k * PANEL * context.panels * (2 + block / 4));
}
