/* AVX2 with FMA: no expand instruction, so eight columns at a time are spread with a byte shuffle read from a table. */
#include "packed.h"

#ifdef FISTAPRUNER_X86
#include <immintrin.h>

#define LEVEL __attribute__((target("avx2,fma,popcnt,bmi")))
#define INLINE static inline __attribute__((always_inline))

/* spread_to[m][i]: which of the loaded values belongs to column i of mask byte m, or 0x80 (shuffles write zero). */
static uint8_t spread_to[256][8];
/* The same by bytes, for bf16 values that become fp32: they are the upper two of a column's four bytes. */
static uint8_t widen_to[256][32] __attribute__((aligned(32)));

__attribute__((constructor)) static void fill_tables(void) {
    memset(widen_to, 0x80, sizeof widen_to);
    for (int mask = 0; mask < 256; mask++)
        for (int column = 0, next = 0; column < 8; column++) {
            int kept = mask >> column & 1;
            spread_to[mask][column] = kept ? (uint8_t)next : 0x80;
            if (kept) {
                widen_to[mask][4 * column + 2] = (uint8_t)(2 * next);
                widen_to[mask][4 * column + 3] = (uint8_t)(2 * next + 1);
            }
            next += kept;
        }
}

/* Bits of the stored ones of the 8 columns from 8 * part on. */
INLINE LEVEL uint8_t mask_byte(const packed_operator *op, int64_t row, int64_t part) {
    return op->mask ? ((const uint8_t *)(op->mask + row * op->words))[part] : (uint8_t)(mask_word(op, row, part / 8) >> part % 8 * 8);
}

/* Eight 16-bit values to their columns. */
INLINE LEVEL __m128i spread16(const uint16_t *value, uint8_t mask) {
    __m128i index = _mm_loadl_epi64((const __m128i *)spread_to[mask]);
    index = _mm_unpacklo_epi8(index, index);                                   /* i, i */
    index = _mm_or_si128(_mm_slli_epi16(_mm_and_si128(index, _mm_set1_epi16(0x0f0f)), 1), /* 2i, 2i (i < 8) */
                         _mm_and_si128(index, _mm_set1_epi16((short)0x8080)));
    index = _mm_or_si128(index, _mm_set1_epi16(0x0100));                       /* 2i, 2i + 1 */
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)value), index);
}

/* Eight bytes to their columns, in the lower half. */
INLINE LEVEL __m128i spread8(const int8_t *value, uint8_t mask) {
    return _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)value), _mm_loadl_epi64((const __m128i *)spread_to[mask]));
}

/* Eight bf16 values to their columns, as fp32. */
INLINE LEVEL __m256 spread_float(const packed_operator *op, int64_t next, uint8_t mask) {
    const uint16_t *value = (const uint16_t *)op->values + next;
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)value));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i *)widen_to[mask])));
}

INLINE LEVEL float add_lanes(__m256 sum) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE LEVEL int64_t add_integers(__m256i sum) {
    __m256i lower = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(sum));
    __m256i half = _mm256_add_epi64(lower, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sum, 1)));
    __m128i pair = _mm_add_epi64(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(pair, _mm_unpackhi_epi64(pair, pair)));
}

INLINE LEVEL void float_row(const packed_operator *op, int64_t row, const prepared *x, const int tile, float *out) {
    int64_t next = first_value(op, row);
    __m256 sum[MAX_TILE][2];
    for (int t = 0; t < tile; t++) sum[t][0] = sum[t][1] = _mm256_setzero_ps();
    for (int64_t part = 0; part < 8 * op->words; part += 2) {
        const uint8_t left = mask_byte(op, row, part), right = mask_byte(op, row, part + 1);
        __m256 first = spread_float(op, next, left);
        next += count_bits(left);
        __m256 second = spread_float(op, next, right);
        next += count_bits(right);
        for (int t = 0; t < tile; t++) {
            const float *vector = x->plain + t * x->stride + 8 * part;
            sum[t][0] = _mm256_fmadd_ps(first, _mm256_loadu_ps(vector), sum[t][0]);
            sum[t][1] = _mm256_fmadd_ps(second, _mm256_loadu_ps(vector + 8), sum[t][1]);
        }
    }
    for (int t = 0; t < tile; t++) out[t] = add_lanes(_mm256_add_ps(sum[t][0], sum[t][1]));
}

/* Products of a byte and a 16-bit activation are widened to 64 bits at least every this many mask words: a lane's 32
 * bits hold 255 pairs of the largest. */
#define INT8_CHUNK 32

INLINE LEVEL void int8_row(const packed_operator *op, int64_t row, const prepared *x, const int tile, float *out) {
    const int8_t *value = (const int8_t *)op->values + first_value(op, row);
    int64_t exact[MAX_TILE] = {0};
    for (int64_t begin = 0; begin < op->words; begin += INT8_CHUNK) {
        int64_t stop = begin + INT8_CHUNK < op->words ? begin + INT8_CHUNK : op->words;
        __m256i sum[MAX_TILE];
        for (int t = 0; t < tile; t++) sum[t] = _mm256_setzero_si256();
        for (int64_t part = 8 * begin; part < 8 * stop; part += 2) {
            const uint8_t left = mask_byte(op, row, part), right = mask_byte(op, row, part + 1);
            __m128i first = spread8(value, left);
            value += count_bits(left);
            __m128i second = spread8(value, right);
            value += count_bits(right);
            __m256i spread = _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(first, second));
            for (int t = 0; t < tile; t++) {
                __m256i levels = _mm256_loadu_si256((const __m256i *)(x->levels + t * x->stride + 8 * part));
                sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(spread, levels));
            }
        }
        for (int t = 0; t < tile; t++) exact[t] += add_integers(sum[t]);
    }
    for (int t = 0; t < tile; t++) out[t] = (float)((double)op->scale[row] * (double)exact[t]);
}

#define OVER_TILES(KERNEL) \
    do { \
        for (int64_t row = first; row < last; row++, out += MAX_TILE) { \
            if (tile == 1) KERNEL(op, row, x, 1, out); \
            else if (tile == 2) KERNEL(op, row, x, 2, out); \
            else if (tile == 3) KERNEL(op, row, x, 3, out); \
            else KERNEL(op, row, x, 4, out); \
        } \
    } while (0)

LEVEL void avx2_multiply(const packed_operator *op, int64_t first, int64_t last, const prepared *x, int tile, float *out) {
    if (op->kind == VALUES_INT8) OVER_TILES(int8_row);
    else OVER_TILES(float_row);
}

/* Eight columns of a row to fp32 or bf16, in `dense`. */
INLINE LEVEL void unpack_part(const packed_operator *op, int64_t next, uint8_t mask, float scale, int type,
                              char *dense) {
    if (op->kind == VALUES_BF16 && type == TYPE_BF16) {
        _mm_storeu_si128((__m128i *)dense, spread16((const uint16_t *)op->values + next, mask));
        return;
    }
    __m256 wide;
    if (op->kind == VALUES_INT8) {
        __m256i levels = _mm256_cvtepi8_epi32(spread8((const int8_t *)op->values + next, mask));
        wide = _mm256_mul_ps(_mm256_cvtepi32_ps(levels), _mm256_set1_ps(scale));
    } else {
        wide = spread_float(op, next, mask);
    }
    if (type == TYPE_FP32) {
        _mm256_storeu_ps((float *)dense, wide);
        return;
    }
    float values[8];
    _mm256_storeu_ps(values, wide);
    for (int column = 0; column < 8; column++) ((uint16_t *)dense)[column] = float_to_bf16(values[column]);
}

LEVEL void avx2_unpack(const packed_operator *op, int64_t first, int64_t last, int type, void *out) {
    const int64_t size = type == TYPE_BF16 ? 2 : 4;
    const int64_t whole = op->columns / 8, rest = op->columns % 8;
    char *dense = out;
    for (int64_t row = first; row < last; row++, dense += op->columns * size) {
            int64_t next = first_value(op, row);
        float scale = op->kind == VALUES_INT8 ? op->scale[row] : 1.0f;
        for (int64_t part = 0; part < whole + (rest > 0); part++) {
            const uint8_t mask = mask_byte(op, row, part);
            if (part < whole) {
                unpack_part(op, next, mask, scale, type, dense + part * 8 * size);
            } else { /* what lies behind the row may be another thread's */
                char end[32];
                unpack_part(op, next, mask, scale, type, end);
                memcpy(dense + part * 8 * size, end, (size_t)(rest * size));
            }
            next += count_bits(mask);
        }
    }
}
#endif
