/* AVX-512 with VBMI2 (Ice Lake, Zen 4 and later), with and without BF16.
 *
 * Values are loaded as whole registers and spread to their columns with the register form of vpexpand*; the memory form
 * is microcoded and two to three times slower. Four rows run side by side, because the address of a row's next values
 * waits for the bit count of its last mask word.
 */
#include "packed.h"

#ifdef FISTAPRUNER_X86
#include <immintrin.h>

#define LEVEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,popcnt,bmi")))
#define LEVEL_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,avx512bf16,popcnt,bmi")))
#define INLINE static inline __attribute__((always_inline))
/* Keeps the compiler from folding the load into the expand, which would choose the memory form. */
#define IN_REGISTER(X) __asm__("" : "+v"(X))
/* Bytes ahead of a row's values that are asked for early. */
#define AHEAD 512

INLINE LEVEL __m512i spread16(uint32_t mask, const uint16_t *value) {
    __m512i loaded = _mm512_loadu_si512(value);
    IN_REGISTER(loaded);
    return _mm512_maskz_expand_epi16((__mmask32)mask, loaded);
}

INLINE LEVEL __m512i spread8(uint64_t mask, const int8_t *value) {
    __m512i loaded = _mm512_loadu_si512(value);
    IN_REGISTER(loaded);
    return _mm512_maskz_expand_epi8((__mmask64)mask, loaded);
}

/* bf16 values, bf16 vectors: products of pairs, fp32 sums. */
INLINE LEVEL_BF16 void bf16_rows(const packed_operator *op, int64_t row, int64_t step, const prepared *x, const int rows, const int tile, float *out) {
    const uint16_t *value[4];
    const uint64_t *mask[4];
    __m512 sum[4][MAX_TILE];
    for (int r = 0; r < rows; r++) {
        value[r] = (const uint16_t *)op->values + op->start[row + r * step];
        mask[r] = op->mask + (row + r * step) * op->words;
        for (int t = 0; t < tile; t++) sum[r][t] = _mm512_setzero_ps();
    }
    for (int64_t word = 0; word < op->words; word++) {
        for (int r = 0; r < rows; r++) {
            uint64_t bits = mask[r][word];
            __m512i first = spread16((uint32_t)bits, value[r]);
            const uint16_t *middle = value[r] + count_bits((uint32_t)bits);
            __m512i second = spread16((uint32_t)(bits >> 32), middle);
            value[r] += count_bits(bits);
            _mm_prefetch((const char *)value[r] + AHEAD, _MM_HINT_T0);
            for (int t = 0; t < tile; t++) {
                const uint16_t *vector = x->bf16 + t * x->stride + 64 * word;
                sum[r][t] = _mm512_dpbf16_ps(sum[r][t], (__m512bh)first, (__m512bh)_mm512_loadu_si512(vector));
                sum[r][t] = _mm512_dpbf16_ps(sum[r][t], (__m512bh)second, (__m512bh)_mm512_loadu_si512(vector + 32));
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) out[r * step * MAX_TILE + t] = _mm512_reduce_add_ps(sum[r][t]);
}

/* bf16 values, fp32 vectors: even and odd columns are the halves of a 32-bit lane, so widening is a shift and an and. */
INLINE LEVEL void split_rows(const packed_operator *op, int64_t row, int64_t step, const prepared *x, const int rows, const int tile, float *out) {
    const uint16_t *value[4];
    const uint32_t *mask[4];
    __m512 sum[4][MAX_TILE];
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    for (int r = 0; r < rows; r++) {
        value[r] = (const uint16_t *)op->values + op->start[row + r * step];
        mask[r] = (const uint32_t *)(op->mask + (row + r * step) * op->words);
        for (int t = 0; t < tile; t++) sum[r][t] = _mm512_setzero_ps();
    }
    for (int64_t half = 0; half < 2 * op->words; half++) {
        for (int r = 0; r < rows; r++) {
            uint32_t bits = mask[r][half];
            __m512i spread = spread16((uint32_t)bits, value[r]);
            value[r] += count_bits(bits);
            _mm_prefetch((const char *)value[r] + AHEAD, _MM_HINT_T0);
            __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(spread, 16));
            __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(spread, upper));
            for (int t = 0; t < tile; t++) {
                const float *vector = x->split + t * x->stride + 32 * half;
                sum[r][t] = _mm512_fmadd_ps(even, _mm512_loadu_ps(vector), sum[r][t]);
                sum[r][t] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(vector + 16), sum[r][t]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) out[r * step * MAX_TILE + t] = _mm512_reduce_add_ps(sum[r][t]);
}

/* Sums of bytes are widened to 64 bits at least every this many mask words, long before 32 bits could overflow. */
#define INT8_CHUNK 256

/* int8 values, 16-bit activations as two unsigned bytes: two byte dot products, exact in integers. Dense rows, such as
 * those of an output head, are loaded as they are. */
INLINE LEVEL void int8_rows(const packed_operator *op, int64_t row, int64_t step, const prepared *x, const int rows, const int tile, float *out) {
    const int8_t *value[4];
    const int dense = !op->mask;
    int64_t exact[4][MAX_TILE] = {{0}};
    for (int r = 0; r < rows; r++) {
        value[r] = (const int8_t *)op->values + first_value(op, row + r * step);
    }
    for (int64_t begin = 0; begin < op->words; begin += INT8_CHUNK) {
        int64_t stop = begin + INT8_CHUNK < op->words ? begin + INT8_CHUNK : op->words;
        __m512i high[4][MAX_TILE], low[4][MAX_TILE];
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tile; t++) high[r][t] = low[r][t] = _mm512_setzero_si512();
        for (int64_t word = begin; word < stop; word++) {
            for (int r = 0; r < rows; r++) {
                uint64_t bits = mask_word(op, row + r * step, word);
                __m512i spread = dense ? _mm512_maskz_loadu_epi8(bits, value[r]) : spread8(bits, value[r]);
                value[r] += dense ? 64 : count_bits(bits);
                _mm_prefetch((const char *)value[r] + AHEAD, _MM_HINT_T0);
                for (int t = 0; t < tile; t++) {
                    int64_t at = t * x->stride + 64 * word;
                    high[r][t] = _mm512_dpbusd_epi32(high[r][t], _mm512_loadu_si512(x->high + at), spread);
                    low[r][t] = _mm512_dpbusd_epi32(low[r][t], _mm512_loadu_si512(x->low + at), spread);
                }
            }
        }
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tile; t++)
                exact[r][t] += 256 * (int64_t)_mm512_reduce_add_epi32(high[r][t]) + _mm512_reduce_add_epi32(low[r][t]);
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) {
            int64_t at = row + r * step, offset = (int64_t)INT8_OFFSET * op->sums[at];
            out[r * step * MAX_TILE + t] = (float)((double)op->scale[at] * (double)(exact[r][t] - offset));
        }
}

/* Four rows a quarter of the block apart: each of the four streams of values then runs on through the next row, and what
 * is asked for early is what comes next. A row's sums do not depend on the rows or vectors beside it. */
#define OVER_ROWS(KERNEL, TILE) \
    do { \
        const int64_t step = (last - first) / 4; \
        for (int64_t row = 0; row < step; row++) KERNEL(op, first + row, step, x, 4, TILE, out + row * MAX_TILE); \
        for (int64_t row = 4 * step; row < last - first; row++) KERNEL(op, first + row, 0, x, 1, TILE, out + row * MAX_TILE); \
    } while (0)
#define OVER_TILES(KERNEL) \
    do { \
        if (tile == 1) OVER_ROWS(KERNEL, 1); \
        else if (tile == 2) OVER_ROWS(KERNEL, 2); \
        else if (tile == 3) OVER_ROWS(KERNEL, 3); \
        else OVER_ROWS(KERNEL, 4); \
    } while (0)

LEVEL void avx512_multiply(const packed_operator *op, int64_t first, int64_t last, const prepared *x, int tile, float *out) {
    if (op->kind == VALUES_INT8) OVER_TILES(int8_rows);
    else OVER_TILES(split_rows);
}

LEVEL_BF16 void avx512_bf16_multiply(const packed_operator *op, int64_t first, int64_t last, const prepared *x, int tile, float *out) {
    OVER_TILES(bf16_rows);
}

/* Dense bf16 rows, for the operators of a model that are not pruned: the same sums without an expand. */
INLINE LEVEL_BF16 void dense_rows(const packed_operator *op, int64_t row, int64_t step, const prepared *x, const int rows, const int tile, float *out) {
    const uint16_t *value[4];
    __m512 sum[4][MAX_TILE];
    for (int r = 0; r < rows; r++) {
        value[r] = (const uint16_t *)op->values + (row + r * step) * op->columns;
        for (int t = 0; t < tile; t++) sum[r][t] = _mm512_setzero_ps();
    }
    for (int64_t column = 0; column < op->columns; column += 32) {
        int64_t left = op->columns - column;
        __mmask32 inside = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
        for (int r = 0; r < rows; r++) {
            __m512i loaded = _mm512_maskz_loadu_epi16(inside, value[r] + column);
            _mm_prefetch((const char *)(value[r] + column) + 2 * AHEAD, _MM_HINT_T0);
            for (int t = 0; t < tile; t++)
                sum[r][t] = _mm512_dpbf16_ps(sum[r][t], (__m512bh)loaded, (__m512bh)_mm512_loadu_si512(x->bf16 + t * x->stride + column));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) out[r * step * MAX_TILE + t] = _mm512_reduce_add_ps(sum[r][t]);
}

LEVEL_BF16 void avx512_bf16_dense(const packed_operator *op, int64_t first, int64_t last, const prepared *x, int tile, float *out) {
    OVER_TILES(dense_rows);
}

/* bf16 values to bf16 rows: no arithmetic, 32 columns at a time. */
INLINE LEVEL void unpack_bf16(const packed_operator *op, int64_t row, uint16_t *dense) {
    const uint16_t *value = (const uint16_t *)op->values + op->start[row];
    const uint32_t *mask = (const uint32_t *)(op->mask + row * op->words);
    int64_t whole = op->columns / 32;
    for (int64_t half = 0; half < whole; half++) {
        _mm512_storeu_si512(dense + 32 * half, spread16(mask[half], value));
        value += count_bits(mask[half]);
        _mm_prefetch((const char *)value + AHEAD, _MM_HINT_T0);
    }
    if (op->columns % 32)
        _mm512_mask_storeu_epi16(dense + 32 * whole, (__mmask32)((1u << op->columns % 32) - 1u), spread16(mask[whole], value));
}

/* Sixteen fp32 to bf16, rounded to nearest even; NaN stays NaN. */
INLINE LEVEL __m256i narrow(__m512 wide) {
    __m512i bits = _mm512_castps_si512(wide);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q), quiet));
}

/* Any values to fp32 or bf16 rows, 16 columns at a time. */
INLINE LEVEL void unpack_any(const packed_operator *op, int64_t row, int type, char *dense) {
    const int int8 = op->kind == VALUES_INT8, size = int8 ? 1 : 2;
    const char *value = (const char *)op->values + first_value(op, row) * size;
    const int64_t parts = (op->columns + 15) / 16;
    for (int64_t part = 0; part < parts; part++) {
        __mmask16 bits = (__mmask16)(mask_word(op, row, part / 4) >> part % 4 * 16);
        __m512 wide;
        if (int8) {
            __m128i loaded = _mm_loadu_si128((const __m128i *)value);
            IN_REGISTER(loaded);
            __m512 levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_expand_epi8(bits, loaded)));
            wide = _mm512_mul_ps(levels, _mm512_set1_ps(op->scale[row]));
        } else {
            __m256i loaded = _mm256_loadu_si256((const __m256i *)value);
            IN_REGISTER(loaded);
            loaded = _mm256_maskz_expand_epi16(bits, loaded);
            wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(loaded), 16));
        }
        value += size * count_bits(bits);
        int64_t left = op->columns - 16 * part;
        __mmask16 inside = (__mmask16)(left >= 16 ? 0xffff : (1 << left) - 1);
        if (type == TYPE_BF16)
            _mm256_mask_storeu_epi16(dense + 32 * part, inside, narrow(wide));
        else
            _mm512_mask_storeu_ps(dense + 64 * part, inside, wide);
    }
}

LEVEL void avx512_unpack(const packed_operator *op, int64_t first, int64_t last, int type, void *out) {
    const int64_t pitch = op->columns * (type == TYPE_BF16 ? 2 : 4);
    for (int64_t row = first; row < last; row++) {
        char *dense = (char *)out + (row - first) * pitch;
        if (op->kind == VALUES_BF16 && type == TYPE_BF16 && op->mask) unpack_bf16(op, row, (uint16_t *)dense);
        else unpack_any(op, row, type, dense);
    }
}
#endif
