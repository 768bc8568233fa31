/* Plain C, any processor: the reference the other levels are tested against. */
#include "packed.h"

static float value_at(const packed_operator *op, int64_t index) {
    switch (op->kind) {
    case VALUES_BF16: return bf16_to_float(((const uint16_t *)op->values)[index]);
    case VALUES_FP16: return fp16_to_float(((const uint16_t *)op->values)[index]);
    case VALUES_FP32: return ((const float *)op->values)[index];
    default: return (float)((const int8_t *)op->values)[index];
    }
}

static void multiply_int8(const packed_operator *op, int64_t row, const prepared *x, int tile, float *out) {
    int64_t groups = group_count(op);
    for (int t = 0; t < tile; t++) {
        const int16_t *level = x->levels + t * x->stride;
        const int8_t *value = (const int8_t *)op->values + op->start[row];
        double total = 0.0;
        for (int64_t group = 0; group < groups; group++) {
            int64_t end = (group + 1) * op->group_words < op->words ? (group + 1) * op->group_words : op->words, sum = 0;
            for (int64_t word = group * op->group_words; word < end; word++)
                for (uint64_t mask = op->mask[row * op->words + word]; mask; mask &= mask - 1) {
                    int64_t column = 64 * word + lowest_bit(mask);
                    sum += (int64_t)*value++ * level[column];
                }
            total += scaled_group(op, row, group, groups, sum);
        }
        out[t] = (float)total;
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
        int64_t next = op->start[row];
        for (int64_t word = 0; word < op->words; word++)
            for (uint64_t mask = op->mask[row * op->words + word]; mask; mask &= mask - 1) {
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
    int64_t groups = op->kind == VALUES_INT8 ? group_count(op) : 1;
    size_t size = type == TYPE_BF16 ? 2 : 4;
    memset(out, 0, (size_t)(last - first) * (size_t)op->columns * size);
    for (int64_t row = first; row < last; row++) {
        int64_t next = op->start[row], base = (row - first) * op->columns;
        for (int64_t word = 0; word < op->words; word++) {
            float scale = op->kind == VALUES_INT8 ? op->scale[row * groups + word / op->group_words] : 1.0f;
            for (uint64_t mask = op->mask[row * op->words + word]; mask; mask &= mask - 1) {
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
