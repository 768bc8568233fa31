/* AMX with BF16 (Sapphire Rapids and later): several bf16 vectors at once, from a handful to a whole prompt.
 *
 * Thirty-two rows of the operator are spread to their columns into memory that stays in a core's own cache, and multiplied
 * as matrix tiles with sixteen vectors at a time. Every weight is expanded once for all vectors, so a prompt costs no
 * dense copy of the operator. Of the 8 tile registers, 2 hold rows, 2 vectors and 4 sums.
 */
#include "packed.h"

#ifdef FISTAPRUNER_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LEVEL \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt,bmi")))
#define INLINE static inline __attribute__((always_inline))
#define IN_REGISTER(X) __asm__("" : "+v"(X)) /* keeps the register form of the expand, see avx512.c */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Linux must be asked before the first use of tile registers; it refuses where the processor has none. */
int amx_permitted(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* 16 x 16 transpose of 32-bit lanes. */
INLINE LEVEL void transpose(__m512i row[16]) {
    __m512i pair[16];
    for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* row[i + j], lane l: column 4l + j of rows i to i + 3 */
        row[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x44), b = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x44);
        __m512i c = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xee), d = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xee);
        pair[j] = _mm512_shuffle_i32x4(a, b, 0x88);
        pair[4 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        pair[8 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
        pair[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) row[i] = pair[i];
}

/* Vectors 16 * group.. as tiles: one for every 32 columns, pairs of columns side by side, as the product wants its second
 * operand. Missing vectors and columns are zero. */
LEVEL void amx_prepare(const uint16_t *x, int batch, int64_t columns, int64_t words, int64_t group, uint16_t *out) {
    const int64_t depth = 2 * words;
    out += group * depth * AMX_VALUES;
    for (int64_t d = 0; d < depth; d++, out += AMX_VALUES) {
        int64_t left = columns - 32 * d;
        __mmask32 inside = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1u : 0;
        __m512i row[16];
        for (int i = 0; i < 16; i++) {
            int64_t vector = AMX_SIDE * group + i;
            row[i] = vector < batch ? _mm512_maskz_loadu_epi16(inside, x + vector * columns + 32 * d) : _mm512_setzero_si512();
        }
        transpose(row);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + 32 * i, row[i]);
    }
}

/* Rows first..last (at most 32) as tiles of 16 x 32; missing rows are zero. int8 values become bf16 exactly, unscaled. */
INLINE LEVEL void spread_rows(const packed_operator *op, int64_t first, int64_t last, uint16_t *panel) {
    const int64_t depth = 2 * op->words;
    const int int8 = op->kind == VALUES_INT8;
    for (int64_t row = first; row < first + 2 * AMX_SIDE; row++) {
        uint16_t *tile = panel + (row - first) / AMX_SIDE * depth * AMX_VALUES + (row - first) % AMX_SIDE * 32;
        if (row >= last) {
            for (int64_t d = 0; d < depth; d++) _mm512_storeu_si512(tile + d * AMX_VALUES, _mm512_setzero_si512());
            continue;
        }
        const char *value = (const char *)op->values + first_value(op, row) * (int8 ? 1 : 2);
        for (int64_t d = 0; d < depth; d++) {
            const uint32_t bits = (uint32_t)(mask_word(op, row, d / 2) >> d % 2 * 32);
            __m512i spread;
            if (int8) {
                __m256i loaded = _mm256_loadu_si256((const __m256i *)value);
                IN_REGISTER(loaded);
                loaded = _mm256_maskz_expand_epi8((__mmask32)bits, loaded);
                __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(loaded)));
                __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(loaded, 1)));
                spread = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            } else {
                __m512i loaded = _mm512_loadu_si512(value);
                IN_REGISTER(loaded);
                spread = _mm512_maskz_expand_epi16((__mmask32)bits, loaded);
            }
            _mm512_storeu_si512(tile + d * AMX_VALUES, spread);
            value += count_bits(bits) * (int8 ? 1 : 2);
            _mm_prefetch(value + 1024, _MM_HINT_T0);
        }
    }
}

/* A tile of sums (16 rows x 16 vectors), scaled and shifted row by row, to bf16 results. */
INLINE LEVEL void store_tile(const packed_operator *op, bias_vector added, int64_t row, int64_t vector, int batch, const float *sums, uint16_t *out) {
    if (row >= op->rows) return;
    __mmask16 inside = op->rows - row >= 16 ? 0xffff : (__mmask16)((1 << (op->rows - row)) - 1);
    __m512 scale = op->kind == VALUES_INT8 ? _mm512_maskz_loadu_ps(inside, op->scale + row) : _mm512_set1_ps(1.0f);
    __m512 bias = _mm512_setzero_ps();
    if (added.values && added.type == TYPE_BF16)
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, (const uint16_t *)added.values + row)), 16));
    else if (added.values)
        bias = _mm512_maskz_loadu_ps(inside, (const float *)added.values + row);
    __m512i lines[16];
    for (int i = 0; i < 16; i++) lines[i] = _mm512_loadu_si512(sums + 16 * i);
    transpose(lines);
    for (int i = 0; i < 16 && vector + i < batch; i++) {
        __m512 total = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(lines[i]), scale), bias);
        _mm256_mask_storeu_epi16(out + (vector + i) * op->rows + row, inside, (__m256i)_mm512_cvtneps_pbh(total));
    }
}

/* Rows first..last (at most 32) times all vectors. panel has room for 2 * 2 * words tiles. */
LEVEL void amx_multiply(const packed_operator *op, bias_vector bias, int64_t first, int64_t last, const uint16_t *vectors, int batch, uint16_t *panel, uint16_t *out) {
    static const tile_shapes shapes = {
        .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    const int64_t depth = 2 * op->words, groups = (batch + AMX_SIDE - 1) / AMX_SIDE;
    const uint16_t *top = panel, *bottom = panel + depth * AMX_VALUES;
    float sums[4][AMX_SIDE * AMX_SIDE] __attribute__((aligned(64)));
    spread_rows(op, first, last, panel);
    _tile_loadconfig(&shapes);
    for (int64_t group = 0; group < groups; group += 2) {
        const uint16_t *one = vectors + group * depth * AMX_VALUES, *two = one + depth * AMX_VALUES;
        const int64_t vector = group * AMX_SIDE;
        _tile_zero(0);
        _tile_zero(1);
        if (group + 1 < groups) {
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t d = 0; d < depth; d++) {
                _tile_loadd(4, top + d * AMX_VALUES, 64);
                _tile_loadd(6, one + d * AMX_VALUES, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, bottom + d * AMX_VALUES, 64);
                _tile_dpbf16ps(1, 5, 6);
                _tile_loadd(7, two + d * AMX_VALUES, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
            store_tile(op, bias, first, vector + AMX_SIDE, batch, sums[2], out);
            store_tile(op, bias, first + AMX_SIDE, vector + AMX_SIDE, batch, sums[3], out);
        } else {
            for (int64_t d = 0; d < depth; d++) {
                _tile_loadd(4, top + d * AMX_VALUES, 64);
                _tile_loadd(6, one + d * AMX_VALUES, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, bottom + d * AMX_VALUES, 64);
                _tile_dpbf16ps(1, 5, 6);
            }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        store_tile(op, bias, first, vector, batch, sums[0], out);
        store_tile(op, bias, first + AMX_SIDE, vector, batch, sums[1], out);
    }
    _tile_release();
}
#endif
