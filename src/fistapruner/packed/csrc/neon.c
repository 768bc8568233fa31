/* NEON (every 64-bit ARM): eight columns at a time are spread with a byte shuffle read from a table, as in avx2.c. */
#include "packed.h"

#ifdef FISTAPRUNER_NEON
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

/* spread_to[m][i]: which of the loaded values belongs to column i of mask byte m, or 0xff (look-ups write zero). */
static uint8_t spread_to[256][8];
/* The same by bytes, for 16-bit values. */
static uint8_t spread_pairs_to[256][16] __attribute__((aligned(16)));

__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int column = 0, next = 0; column < 8; column++) {
            const int kept = mask >> column & 1;
            spread_to[mask][column] = kept ? (uint8_t)next : 0xff;
            spread_pairs_to[mask][2 * column] = kept ? (uint8_t)(2 * next) : 0xff;
            spread_pairs_to[mask][2 * column + 1] = kept ? (uint8_t)(2 * next + 1) : 0xff;
            next += kept;
        }
}

/* Bits of the stored ones of the 8 columns from 8 * part on. */
INLINE uint8_t mask_byte(const packed_operator *op, int64_t row, int64_t part) {
    return (uint8_t)(mask_word(op, row, part / 8) >> part % 8 * 8);
}

/* Eight 16-bit values to their columns. */
INLINE uint16x8_t spread16(const uint16_t *value, uint8_t mask) {
    return vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8((const uint8_t *)value), vld1q_u8(spread_pairs_to[mask])));
}

/* Eight bytes to their columns. */
INLINE int8x8_t spread8(const int8_t *value, uint8_t mask) {
    return vqtbl1_s8(vld1q_s8(value), vld1_u8(spread_to[mask]));
}

/* The lower and the upper four of eight bf16 values, as fp32. */
INLINE float32x4_t lower(uint16x8_t values) {
    return vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(values), 16));
}

INLINE float32x4_t upper(uint16x8_t values) {
    return vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(values), 16));
}

INLINE void float_row(const packed_operator *op, int64_t row, const prepared *x, const int tile, float *out) {
    const uint16_t *value = (const uint16_t *)op->values + first_value(op, row);
    float32x4_t sum[MAX_TILE][4];
    for (int t = 0; t < tile; t++)
        for (int i = 0; i < 4; i++) sum[t][i] = vdupq_n_f32(0.0f);
    for (int64_t part = 0; part < 8 * op->words; part += 2) {
        const uint8_t left = mask_byte(op, row, part), right = mask_byte(op, row, part + 1);
        const uint16x8_t first = spread16(value, left);
        value += count_bits(left);
        const uint16x8_t second = spread16(value, right);
        value += count_bits(right);
        for (int t = 0; t < tile; t++) {
            const float *vector = x->plain + t * x->stride + 8 * part;
            sum[t][0] = vfmaq_f32(sum[t][0], lower(first), vld1q_f32(vector));
            sum[t][1] = vfmaq_f32(sum[t][1], upper(first), vld1q_f32(vector + 4));
            sum[t][2] = vfmaq_f32(sum[t][2], lower(second), vld1q_f32(vector + 8));
            sum[t][3] = vfmaq_f32(sum[t][3], upper(second), vld1q_f32(vector + 12));
        }
    }
    for (int t = 0; t < tile; t++)
        out[t] = vaddvq_f32(vaddq_f32(vaddq_f32(sum[t][0], sum[t][1]), vaddq_f32(sum[t][2], sum[t][3])));
}

/* Products of a byte and a 16-bit activation are widened to 64 bits at least every this many mask words: a lane's 32
 * bits hold 511 of the largest, and get 256. */
#define INT8_CHUNK 32

INLINE void int8_row(const packed_operator *op, int64_t row, const prepared *x, const int tile, float *out) {
    const int8_t *value = (const int8_t *)op->values + first_value(op, row);
    int64_t exact[MAX_TILE] = {0};
    for (int64_t begin = 0; begin < op->words; begin += INT8_CHUNK) {
        const int64_t stop = begin + INT8_CHUNK < op->words ? begin + INT8_CHUNK : op->words;
        int32x4_t sum[MAX_TILE][2];
        for (int t = 0; t < tile; t++) sum[t][0] = sum[t][1] = vdupq_n_s32(0);
        for (int64_t part = 8 * begin; part < 8 * stop; part++) {
            const uint8_t mask = mask_byte(op, row, part);
            const int16x8_t spread = vmovl_s8(spread8(value, mask));
            value += count_bits(mask);
            for (int t = 0; t < tile; t++) {
                const int16x8_t levels = vld1q_s16(x->levels + t * x->stride + 8 * part);
                sum[t][0] = vmlal_s16(sum[t][0], vget_low_s16(spread), vget_low_s16(levels));
                sum[t][1] = vmlal_high_s16(sum[t][1], spread, levels);
            }
        }
        for (int t = 0; t < tile; t++) exact[t] += vaddlvq_s32(sum[t][0]) + vaddlvq_s32(sum[t][1]);
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

void neon_multiply(const packed_operator *op, int64_t first, int64_t last, const prepared *x, int tile, float *out) {
    if (op->kind == VALUES_INT8) OVER_TILES(int8_row);
    else OVER_TILES(float_row);
}

/* Eight columns of a row to fp32 or bf16, in `dense`. */
INLINE void unpack_part(const packed_operator *op, int64_t next, uint8_t mask, float scale, int type, char *dense) {
    float values[8];
    if (op->kind == VALUES_INT8) {
        const int16x8_t levels = vmovl_s8(spread8((const int8_t *)op->values + next, mask));
        vst1q_f32(values, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(levels))), scale));
        vst1q_f32(values + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(levels)), scale));
    } else {
        const uint16x8_t spread = spread16((const uint16_t *)op->values + next, mask);
        if (type == TYPE_BF16) {
            memcpy(dense, &spread, 16);
            return;
        }
        vst1q_f32(values, lower(spread));
        vst1q_f32(values + 4, upper(spread));
    }
    if (type == TYPE_FP32) memcpy(dense, values, 32);
    else
        for (int column = 0; column < 8; column++) ((uint16_t *)dense)[column] = float_to_bf16(values[column]);
}

void neon_unpack(const packed_operator *op, int64_t first, int64_t last, int type, void *out) {
    const int64_t size = type == TYPE_BF16 ? 2 : 4, whole = op->columns / 8, rest = op->columns % 8;
    char *dense = out;
    for (int64_t row = first; row < last; row++, dense += op->columns * size) {
        int64_t next = first_value(op, row);
        const float scale = op->kind == VALUES_INT8 ? op->scale[row] : 1.0f;
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
