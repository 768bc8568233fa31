/* Compare the kernel's best level with plain C on random operators; print how many were compared.
 *
 * tests/packed/test_neon.py compiles it with the kernel for another processor and runs it in an emulator.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "packed.h"

int fistapruner_level(void);
int fistapruner_multiply(const packed_operator *, const void *, int, const void *, void *, int, int, int, int);
void fistapruner_unpack(const packed_operator *, int64_t, int64_t, void *, int, int, int);

static uint64_t state = 88172645463325252u;

static uint32_t draw(void) { /* xorshift */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 16);
}

static float uniform(void) { return (float)(draw() % 65536) / 32768.0f - 1.0f; }

static void fail(const char *what, int64_t at, double found, double wanted) {
    printf("%s %lld: %g instead of %g\n", what, (long long)at, found, wanted);
    exit(1);
}

static void compare(int kind, int type, int level) {
    const int64_t rows = 1 + draw() % 70, columns = 1 + draw() % (draw() % 8 ? 300 : 9000), words = (columns + 63) / 64;
    const int batch = 1 + (int)(draw() % 6), extreme = draw() % 8 == 0;
    const int percent = extreme ? 100 : (int)(draw() % 101);
    uint64_t *mask = calloc((size_t)(rows * words), 8);
    int64_t *start = calloc((size_t)rows + 1, 8), kept = 0;
    char *values = calloc((size_t)(rows * columns) * 2 + 64, 1);
    double *dense = calloc((size_t)(rows * columns), 8);
    int32_t *sums = calloc((size_t)rows, 4);
    float *scale = calloc((size_t)rows, 4), *bias = calloc((size_t)rows, 4);
    for (int64_t row = 0; row < rows; row++) {
        start[row] = kept;
        scale[row] = 0.01f + fabsf(uniform());
        bias[row] = uniform();
        for (int64_t column = 0; column < columns; column++) {
            if ((int)(draw() % 100) >= percent) continue;
            mask[row * words + column / 64] |= (uint64_t)1 << column % 64;
            if (kind == VALUES_INT8) {
                const int8_t level_of = extreme ? -128 : (int8_t)(draw() % 256 - 128);
                ((int8_t *)values)[kept] = level_of;
                sums[row] += level_of;
                dense[row * columns + column] = (double)scale[row] * level_of;
            } else {
                const uint16_t bits = float_to_bf16(uniform());
                ((uint16_t *)values)[kept] = bits;
                dense[row * columns + column] = bf16_to_float(bits);
            }
            kept++;
        }
    }
    start[rows] = kept;
    const packed_operator op = {rows, columns, words, mask, start, values, scale, sums, kind};
    float *x = malloc((size_t)(batch * columns) * 4), *out[2];
    uint16_t *narrow = malloc((size_t)(batch * columns) * 2);
    for (int64_t i = 0; i < batch * columns; i++) {
        narrow[i] = float_to_bf16(extreme ? -1.0f : uniform());
        x[i] = bf16_to_float(narrow[i]);
    }
    for (int i = 0; i < 2; i++) {
        out[i] = malloc((size_t)(batch * rows) * 4);
        const void *vectors = type == TYPE_BF16 ? (const void *)narrow : x;
        if (fistapruner_multiply(&op, bias, TYPE_FP32, vectors, out[i], type, batch, 1, i ? level : 0)) exit(2);
    }
    for (int64_t i = 0; i < batch * rows; i++) {
        double sum = bias[i % rows], size = fabs(bias[i % rows]), weights = 0.0;
        for (int64_t column = 0; column < columns; column++) {
            const double product = dense[i % rows * columns + column] * (double)x[i / rows * columns + column];
            sum += product, size += fabs(product), weights += fabs(dense[i % rows * columns + column]);
        }
        const float found = type == TYPE_BF16 ? bf16_to_float(((uint16_t *)out[1])[i]) : out[1][i];
        const float plain = type == TYPE_BF16 ? bf16_to_float(((uint16_t *)out[0])[i]) : out[0][i];
        /* int8 operators take activations in 16 bits: half a step of 1 / 32767. */
        const double steps = kind == VALUES_INT8 ? weights / 65000 : 0.0;
        const double allowed = steps + size * (type == TYPE_BF16 ? 0.005 : 1e-5);
        if (!(fabs(found - sum) <= allowed)) fail("product", i, found, sum);
        if (kind == VALUES_INT8 && found != plain) fail("int8 product", i, found, plain);
    }
    const size_t bytes = (size_t)columns * (size_t)rows * (type == TYPE_BF16 ? 2 : 4);
    char *wide[2];
    for (int i = 0; i < 2; i++) {
        wide[i] = malloc(bytes + 64);
        memset(wide[i], 0x55, bytes + 64);
        fistapruner_unpack(&op, 0, rows, wide[i], type, 1, i ? level : 0);
    }
    for (size_t i = 0; i < bytes + 64; i++)
        if (wide[0][i] != wide[1][i]) fail("unpacked byte", (int64_t)i, wide[1][i], wide[0][i]);
    free(mask), free(start), free(values), free(dense), free(sums), free(scale), free(bias), free(x), free(narrow);
    for (int i = 0; i < 2; i++) free(out[i]), free(wide[i]);
}

int main(void) {
    const int level = fistapruner_level();
    int count = 0;
    for (; count < 400; count++) compare(count % 2, count / 2 % 2, level);
    printf("level %d: %d operators\n", level, count);
    return 0;
}
