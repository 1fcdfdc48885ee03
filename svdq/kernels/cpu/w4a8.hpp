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
// `acc`. Up to 8 tokens take the time of reading the weight: it is then multiplied as it lies (`multiply_lines` of a body that
// has it), an item being the 8 panels of which a group lies side by side, group by group. The sums and the fma are the same.
//
// I6  Sums are exact, and `acc` takes the groups in order: a token's result depends on neither its tile nor its neighbours.
// I7  `tile` reads whole groups of whole panels: K % 64 == 0, N % 16 == 0. Tokens of a last tile are a template's T.
//
// Tried and dropped: tiles of 3, 5 and 6 tokens (no faster), runs of 8 groups (slower), of 32 (the same), blocks of 128 and
// 256 KB (up to a fifth slower at K = 12288); for few tokens tiles of one panel (five times as slow: unpacking, waiting for
// memory) and of eight side by side (three times: unpacking).

static const int RUN = 16;                          // groups
static const int64_t L2 = 384 << 10;                // bytes of activations in a block of tokens

struct Quantising {
    const Quantise& job;
    const float* smooth;                            // [k]
    const float* down;                              // [rank / 16, k, 16]; null: block by block as it is needed
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
        for (int64_t i = 0; i < k; i += 16) {
            float unpacked[256];
            const float* down = c.down ? c.down + (block * k + i) * 16 : unpacked;
            if (!c.down) unpack_factor(job.half, job.down, factor_block(job.rank, i / 16, block), unpacked, 16);
            for (int j = 0; j < 16; j++, down += 16) {
                const F8 d0 = load(down), d1 = load(down + 8);
                for (int t = 0; t < 4; t++) {       // rows past `count` are of an earlier item, and stored nowhere
                    const F8 one = all(x[t * k + i + j]);
                    low[t][0] = fma(one, d0, low[t][0]);
                    low[t][1] = fma(one, d1, low[t][1]);
                }
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
    float* const down = job.tokens <= 8 ? nullptr : scratch<float, 6>(job.k * job.rank);
    for (int64_t i = 0; i < job.k; i += PANEL) load_panel(job.half, job.smooth, i, smooth + i);
    if (down) factor({job.threads, job.k, job.rank, job.half, job.down, down, 256, 16 * job.k, 16});
    const Quantising context{job, smooth, down};
    Items((job.tokens + 3) / 4, quantise_tokens, &context).run(job.threads, 4 * job.k * (8 + job.rank));
}

struct Multiplying {
    const Product& job;
    int64_t block;                                  // tokens
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

// Rows of a panel from their accumulators.
static void store_panel(const Product& job, int64_t panel, int64_t first, int64_t tokens, const float* acc) {
    for (int64_t t = 0; t < tokens; t++) {
        for (int half = 0; half < 2; half++) {
            const int64_t at = (first + t) * job.out_stride + panel * PANEL + half * 8;
            const F8 y = load(acc + t * PANEL + half * 8);
            store_as(job.kind, job.out, at, job.accumulate ? add(load_as(job.kind, job.out, at), y) : y);
        }
    }
}

static void multiply_panel(const void* context, int64_t item) {
    const auto& c = *(const Multiplying*)context;
    const auto& job = c.job;
    const int64_t groups = job.k / GROUP, panels = job.n / PANEL, panel = item % panels, first = item / panels * c.block;
    const int64_t tokens = std::min(c.block, job.tokens - first);
    float* const acc = scratch<float, 1>(tokens * PANEL);
    start_panel(job, panel, first, tokens, acc);
    for (int64_t run = 0; run < groups; run += RUN)
        multiply_run(job, panel, run, std::min<int64_t>(RUN, groups - run), first, tokens, acc);
    store_panel(job, panel, first, tokens, acc);
}

#ifdef LINES
static const int FEW = 8, ABREAST = 8;              // tokens; panels side by side: 4 KB of a group

template <int T>
static void lines_of(int64_t tokens, const uint8_t* block, Kind half, const void* wscales, int64_t at,
                     const __m256i (*spread)[4], const float* scales, const int32_t* sums, int64_t groups, float* acc) {
    if constexpr (T > 1) {
        if (tokens < T) {
            lines_of<T - 1>(tokens, block, half, wscales, at, spread, scales, sums, groups, acc);
            return;
        }
    }
    multiply_lines<T>(block, half, wscales, at, spread, scales, sums, groups, acc, PANEL);
}

// All tokens of panels that lie abreast, group by group: reading the weight is what takes the time.
static void multiply_few(const void* context, int64_t item) {
    const auto& job = ((const Multiplying*)context)->job;
    const int64_t k = job.k, groups = k / GROUP, tokens = job.tokens, first = item * ABREAST;
    float* const acc = scratch<float, 1>(ABREAST * FEW * PANEL);            // of lines
    float* const plain = scratch<float, 7>(FEW * PANEL);
    for (int64_t p = 0; p < ABREAST; p++) {
        start_panel(job, first + p, 0, tokens, plain);
        for (int64_t i = 0; i < tokens * PANEL; i++)
            acc[(p * FEW + i / PANEL) * PANEL + line_of(int(i % PANEL))] = plain[i];
    }
    for (int64_t g = 0; g < groups; g++) {
        __m256i spread[FEW][4];
        for (int64_t t = 0; t < tokens; t++) spread_codes(job.codes + t * k + g * GROUP, spread[t]);
        for (int64_t p = 0; p < ABREAST; p++) {
            if (g + AHEAD < groups) prefetch_block(block_of(job.qweight, k, first + p, g + AHEAD));
            for (int64_t t = 0; t < tokens; t += LINES)
                lines_of<LINES>(tokens - t, block_of(job.qweight, k, first + p, g), job.half, job.wscales,
                                scales_of(k, first + p, g), spread + t, job.scales + t * groups + g, job.sums + t * groups + g,
                                groups, acc + (p * FEW + t) * PANEL);
        }
    }
    for (int64_t p = 0; p < ABREAST; p++) {
        for (int64_t i = 0; i < tokens * PANEL; i++)
            plain[i] = acc[(p * FEW + i / PANEL) * PANEL + line_of(int(i % PANEL))];
        store_panel(job, first + p, 0, tokens, plain);
    }
}
#endif

static void product(const Product& job) {
    if (!job.tokens) return;
#ifdef LINES
    if (job.tokens <= FEW) {
        const Multiplying context{job, job.tokens};
        Items(job.n / PANEL / ABREAST, multiply_few, &context).run(job.threads, job.k * PANEL * ABREAST * (1 + job.tokens / 2));
        return;
    }
#endif
    const int64_t fit = std::max<int64_t>(L2 / job.k / TOKENS * TOKENS, 4 * TOKENS);
    const Multiplying context{job, std::min<int64_t>({fit, 128, job.tokens})};
    const int64_t blocks = (job.tokens + context.block - 1) / context.block;
    Items(blocks * (job.n / PANEL), multiply_panel, &context).run(job.threads, job.k * PANEL * (2 + context.block / 4));
}
