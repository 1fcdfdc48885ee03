// Linears with exact activations: a weight as numbers, for the library's product, and few rows at once. Included once for every
// body.
//
//     dequantise   w[n, k] = code * scale          INT4, NVFP4: scale = wscale * wtscale * wcscale          AWQ: + zero
//     gemv         y[m, n] = sum_k x[m, k] w[n, k]        the same numbers, never written to memory
//
// Both go in items of one panel, 16 outputs, block by block as the file has them: 512 bytes, each 64 two outputs' codes.
//
// I8  A number is rounded as reference.py does: once for each product and sum, so both give the same numbers as the torch path.

struct Scales {
    float at[PANEL][4];         // of 16 inputs each
    float zero[PANEL];
};

#define OF_PRECISION(precision, work) ((precision) == INT4 ? work<INT4> : (precision) == NVFP4 ? work<NVFP4> : work<AWQ>)

static const float* e4m3_values() {
    static const struct Table {
        float values[256];
        Table() { for (int i = 0; i < 256; i++) values[i] = e4m3_to_float(uint8_t(i)); }
    } table;
    return table.values;
}

template <Precision P>
static inline void load_scales(const Dequantise& w, int64_t panel, int64_t group, Scales& scales) {
    const float tensor = float(w.wtscale);
    float plain[PANEL];
    if (P == INT4) {
        load_panel(w.half, w.wscales, scales_of(w.k, panel, group), plain);
        for (int o = 0; o < PANEL; o++) scales.at[o][0] = plain[o] * tensor;
    } else if (P == NVFP4) {
        const float* const values = e4m3_values();
        for (int o = 0; o < PANEL; o++) {
            const uint8_t* const codes = (const uint8_t*)w.wscales + scale_of_nvfp4(w.k, panel * PANEL + o, group * 4);
            for (int i = 0; i < 4; i++) scales.at[o][i] = values[codes[i]] * tensor;
        }
    } else {
        for (int o = 0; o < PANEL; o++) {
            const int64_t at = group * w.n + panel * PANEL + o;
            scales.at[o][0] = number(w.half, w.wscales, at);
            scales.zero[o] = number(w.half, w.wzeros, at);
        }
    }
    if (P != AWQ && w.wcscales) {
        load_panel(w.half, w.wcscales, panel * PANEL, plain);
        for (int o = 0; o < PANEL; o++)
            for (float& scale : scales.at[o]) scale *= plain[o];
    }
    const int64_t next = group + AHEAD;
    if (P != AWQ && next < w.k / GROUP) prefetch_block(block_of(w.qweight, w.k, panel, next));
}

// The 64 numbers of an output and a group.
template <Precision P>
static inline void weights_of(const Dequantise& w, int64_t panel, int64_t group, int o, const Scales& scales, F8 (&values)[8]) {
    if (P == AWQ) {
        const uint8_t* const codes = awq_codes(w.qweight, w.k, panel * PANEL + o, group);
        const F8 scale = all(scales.at[o][0]), zero = all(scales.zero[o]);
        for (int i = 0; i < 8; i++) values[i] = add(mul(awq_values(codes + i / 4 * 16, i % 4), scale), zero);
        return;
    }
    const uint8_t* const block = block_of(w.qweight, w.k, panel, group);
    for (int i = 0; i < 8; i++) {
        uint32_t word;
        std::memcpy(&word, block + 4 * word_of(o, i), 4);
        values[i] = mul(P == INT4 ? int4_values(word) : e2m1_values(word), all(scales.at[o][P == INT4 ? 0 : i / 2]));
    }
}

template <Precision P>
static void dequantise_panel(const void* context, int64_t item) {
    const auto& w = *(const Dequantise*)context;
    const int64_t panel = w.start / PANEL + item, first = item * PANEL;
    for (int64_t group = 0; group < w.k / GROUP; group++) {
        Scales scales;
        load_scales<P>(w, panel, group, scales);
        for (int o = 0; o < PANEL; o++) {
            F8 values[8];
            weights_of<P>(w, panel, group, o, scales, values);
            for (int i = 0; i < 8; i++) store_as(w.kind, w.out, (first + o) * w.k + group * GROUP + i * 8, values[i]);
        }
    }
}

static void dequantise(const Dequantise& job) {
    Items((job.stop - job.start) / PANEL, OF_PRECISION(job.precision, dequantise_panel), &job).run(job.threads, job.k * PANEL);
}

static const int ROWS = 8;          // of x, at most

template <Precision P>
static void gemv_panel(const void* context, int64_t item) {
    const auto& job = *(const Gemv*)context;
    const auto& w = job.weight;
    const int64_t panel = w.start / PANEL + item;
    F8 y[PANEL][ROWS];
    for (auto& row : y)
        for (int64_t m = 0; m < job.tokens; m++) row[m] = all(0);
    for (int64_t group = 0; group < w.k / GROUP; group++) {
        Scales scales;
        load_scales<P>(w, panel, group, scales);
        for (int o = 0; o < PANEL; o++) {
            F8 values[8];
            weights_of<P>(w, panel, group, o, scales, values);
            for (int64_t m = 0; m < job.tokens; m++) {
                const float* const x = job.x + m * w.k + group * GROUP;
                F8 even = mul(values[0], load(x)), odd = mul(values[1], load(x + 8));
                for (int i = 2; i < 8; i += 2) {
                    even = fma(values[i], load(x + i * 8), even);
                    odd = fma(values[i + 1], load(x + i * 8 + 8), odd);
                }
                y[o][m] = add(y[o][m], add(even, odd));
            }
        }
    }
    for (int o = 0; o < PANEL; o++)
        for (int64_t m = 0; m < job.tokens; m++) job.out[m * w.n + panel * PANEL + o] = sum(y[o][m]);
}

static void gemv(const Gemv& job) {
    const auto& w = job.weight;
    Items((w.stop - w.start) / PANEL, OF_PRECISION(w.precision, gemv_panel), &job).run(w.threads, w.k * PANEL);
}

static void unpack_factor_rows(const void* context, int64_t item) {
    const auto& job = *(const Factor*)context;
    for (int64_t block = 0; block < job.rank / 16; block++)
        unpack_factor(job.half, job.factor, factor_block(job.rank, item, block),
                      job.out + item * job.row_step + block * job.rank_step, job.stride);
}

static void factor(const Factor& job) {
    if (job.rank) Items(job.rows / 16, unpack_factor_rows, &job).run(job.threads, job.rank * 16);
}
