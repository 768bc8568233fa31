/* Plain C, any processor: the reference the other levels are tested against. */
#include "packed.h"

static float value_at(const packed_operator *op, int64_t index) {
    if (op->kind == VALUES_BF16) return bf16_to_float(((const uint16_t *)op->values)[index]);
    return (float)((const int8_t *)op->values)[index];
}

static void multiply_int8(const packed_operator *op, int64_t row, const prepared *x, int tile, float *out) {
    for (int t = 0; t < tile; t++) {
        const int16_t *level = x->levels + t * x->stride;
        const int8_t *value = (const int8_t *)op->values + first_value(op, row);
        int64_t sum = 0;
        for (int64_t word = 0; word < op->words; word++)
            for (uint64_t mask = mask_word(op, row, word); mask; mask &= mask - 1)
                sum += (int64_t)*value++ * level[64 * word + lowest_bit(mask)];
        out[t] = (float)((double)op->scale[row] * (double)sum);
    }
}

void portable_multiply(const packed_operator *op, int64_t first, int64_t last, const prepared *x, int tile, float *out) {
    for (int64_t row = first; row < last; row++, out += MAX_TILE) {
        if (op->kind == VALUES_INT8) {
            multiply_int8(op, row, x, tile, out);
            continue;
        }
        /* Sixteen partial sums, as a vector unit keeps them: the rounding error grows with the row length over 16. */
        float sums[MAX_TILE][16] = {{0}};
        int64_t next = first_value(op, row);
        for (int64_t word = 0; word < op->words; word++)
            for (uint64_t mask = mask_word(op, row, word); mask; mask &= mask - 1) {
                int64_t column = 64 * word + lowest_bit(mask);
                float value = value_at(op, next++);
                for (int t = 0; t < tile; t++) sums[t][column & 15] += value * x->plain[t * x->stride + column];
            }
        for (int t = 0; t < tile; t++) {
            float total = 0.0f;
            for (int lane = 0; lane < 16; lane++) total += sums[t][lane];
            out[t] = total;
        }
    }
}

void portable_unpack(const packed_operator *op, int64_t first, int64_t last, int type, void *out) {
    size_t size = type == TYPE_BF16 ? 2 : 4;
    memset(out, 0, (size_t)(last - first) * (size_t)op->columns * size);
    for (int64_t row = first; row < last; row++) {
        int64_t next = first_value(op, row), base = (row - first) * op->columns;
        float scale = op->kind == VALUES_INT8 ? op->scale[row] : 1.0f;
        for (int64_t word = 0; word < op->words; word++) {
            for (uint64_t mask = mask_word(op, row, word); mask; mask &= mask - 1) {
                int64_t column = base + 64 * word + lowest_bit(mask);
                if (op->kind == VALUES_BF16 && type == TYPE_BF16) {
                    ((uint16_t *)out)[column] = ((const uint16_t *)op->values)[next++];
                    continue;
                }
                float value = scale * value_at(op, next++);
                if (type == TYPE_BF16)
                    ((uint16_t *)out)[column] = float_to_bf16(value);
                else
                    ((float *)out)[column] = value;
            }
        }
    }
}
