// Where numbers lie in a file (layout.py), and in the memory between `quantise` and `product`.
//
// A weight in the order of the file, in blocks of 16 outputs and 64 inputs: 512 bytes in a row, 128 words of 8 inputs
//
//     word  nr*16 + kq*4 + nb*2 + kb      is output nb*8 + nr and inputs (kb*4 + kq)*8 .. +7, the first in the lowest nibble
//
// so the 16 words of one nr are one cache line: outputs nr and nr + 8.

static const int GROUP = 64, PANEL = 16, BLOCK = 512;       // inputs of a scale, outputs of a panel, bytes of both

// The block of a panel (16 outputs) and a group (64 inputs)
static inline const uint8_t* block_of(const uint8_t* qweight, int64_t k, int64_t panel, int64_t group) {
    return qweight + ((panel / 8 * (k / GROUP) + group) * 8 + panel % 8) * BLOCK;
}

// Blocks of a panel are 4 KB apart, too far for the hardware to see where the next is. It is asked for so many groups ahead;
// without, one token took half as long again.
static const int AHEAD = 3;

static inline void prefetch_block(const uint8_t* block) {
#if defined(__GNUC__)
    for (int line = 0; line < BLOCK; line += 64) __builtin_prefetch(block + line);
#endif
}

static inline int word_of(int output, int step) { return output % 8 * 16 + step % 4 * 4 + output / 8 * 2 + step / 4; }

// Place of a panel's output among its 16 scales, of an input among 16 smoothing numbers
static inline int scale_of(int output) { return output % 8 / 2 * 4 + output / 8 * 2 + output % 2; }

// The 16 scales of an INT4 panel and a group
static inline int64_t scales_of(int64_t k, int64_t panel, int64_t group) {
    return (panel / 8 * (k / GROUP) + group) * 128 + panel % 8 * 16;
}

// Scale of an NVFP4 weight: a group is 16 inputs
static inline int64_t scale_of_nvfp4(int64_t k, int64_t output, int64_t group) {
    const int64_t tile = output / 128, place = output % 128;
    return (tile * (k / GROUP) + group / 4) * 512 + place % 8 * 64 + place / 8 % 4 * 16 + place / 32 * 4 + group % 4;
}

// A factor, in blocks of 16 x 16 of which one is 256 numbers one after the other: pair nr*16 + kq*4 + nb*2 + kb holds numbers
// kb*8 + kq*2 and the next one of row nb*8 + nr. In proj_down a row is a rank and blocks run over ranks first; in proj_up a row
// is an output and so do they.
static inline int64_t factor_block(int64_t rank, int64_t outer, int64_t rank_block) {
    return (outer * (rank / 16) + rank_block) * 256;
}

// The 32 bytes of an AWQ output's 64 codes: nibble v of the 16-bit word h*8 + e is input h*32 + v*8 + e
static inline const uint8_t* awq_codes(const uint8_t* qweight, int64_t k, int64_t output, int64_t group) {
    return qweight + ((output / 4 * (k / GROUP) + group) * 4 + output % 4) * 32;
}

// Codes of activations: of every 8 inputs 0 2 4 6 1 3 5 7, so that the low nibbles of a word meet the first four and the high
// ones the others.
static const int CODE_ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};
