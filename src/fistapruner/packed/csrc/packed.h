/* A packed operator in memory, and the interface between the dispatcher and the instruction-set levels.
 *
 * A row is a bit mask (one bit a column, least significant bit first, padded with zeros to whole 64-bit words) and its
 * kept values, one after the other. A level provides one function that multiplies a range of rows with prepared
 * vectors, and one that writes rows densely. Everything else - preparing vectors, threads, scales - is shared.
 */
#ifndef FISTAPRUNER_PACKED_H
#define FISTAPRUNER_PACKED_H

#include <stdint.h>
#include <string.h>

enum { VALUES_BF16 = 0, VALUES_INT8 = 1 };
enum { TYPE_FP32 = 0, TYPE_BF16 = 1 };
enum { LEVEL_PORTABLE = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2, LEVEL_AVX512_BF16 = 3, LEVEL_AMX = 4 };
enum { LEVEL_NEON = 1 }; /* of 64-bit ARM, which has two levels */

/* Rows handed to a thread at a time. Fixed, so that the number of threads never changes a result. */
#define ROW_BLOCK 64
/* Vectors are multiplied in tiles of at most this many, so that sums stay in registers. */
#define MAX_TILE 4

typedef struct {
    int64_t rows;
    int64_t columns;
    int64_t words;           /* 64-bit mask words in a row: ceil(columns / 64) */
    const uint64_t *mask;    /* rows x words; NULL: every weight is stored, without start */
    const int64_t *start;    /* rows + 1 offsets into values, in elements */
    const void *values;      /* readable for 64 bytes past its end, but for dense bf16 values */
    const float *scale;      /* int8: rows */
    const int32_t *sums;     /* int8: rows, sum of the row's values */
    int32_t kind;            /* VALUES_* */
} packed_operator;

/* Bits of the stored ones of the 64 columns from 64 * word on. */
static inline uint64_t mask_word(const packed_operator *op, int64_t row, int64_t word) {
    if (op->mask) return op->mask[row * op->words + word];
    const int64_t left = op->columns - 64 * word;
    return left >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << left) - 1;
}

static inline int64_t first_value(const packed_operator *op, int64_t row) {
    return op->mask ? op->start[row] : row * op->columns;
}

/* Offset that makes 16-bit activations unsigned. */
#define INT8_OFFSET 32768

/* Added to every product, in a TYPE_*; values is NULL where there is none. */
typedef struct {
    const void *values;
    int32_t type;
} bias_vector;

/* Vectors as the levels want them; each vector is padded to 64 * words columns, where operators have no values. */
typedef struct {
    const float *plain;      /* fp32, column order */
    const float *split;      /* fp32, in every 32 columns the 16 even ones first, then the 16 odd ones */
    const uint16_t *bf16;    /* bf16, column order (TYPE_BF16 input only) */
    const int16_t *levels;   /* 16-bit activations, for int8 operators */
    const uint8_t *high;     /* those plus INT8_OFFSET: high bytes */
    const uint8_t *low;      /* and low bytes */
    int64_t stride;          /* columns of a padded vector */
} prepared;

/* out[row * MAX_TILE + vector]: for rows first..last and `tile` vectors. */
typedef void (*rows_times_vectors)(const packed_operator *op, int64_t first, int64_t last, const prepared *x, int tile, float *out);
/* Writes rows first..last densely, in a TYPE_*. */
typedef void (*rows_to_dense)(const packed_operator *op, int64_t first, int64_t last, int type, void *out);

void portable_multiply(const packed_operator *, int64_t, int64_t, const prepared *, int, float *);
void portable_unpack(const packed_operator *, int64_t, int64_t, int, void *);
#if (defined(__x86_64__) && ((defined(__GNUC__) && __GNUC__ >= 10) || (defined(__clang__) && __clang_major__ >= 10)))
#define FISTAPRUNER_X86 1
void avx2_multiply(const packed_operator *, int64_t, int64_t, const prepared *, int, float *);
void avx512_multiply(const packed_operator *, int64_t, int64_t, const prepared *, int, float *);
void avx512_bf16_multiply(const packed_operator *, int64_t, int64_t, const prepared *, int, float *);
void avx512_bf16_dense(const packed_operator *, int64_t, int64_t, const prepared *, int, float *);
void avx2_unpack(const packed_operator *, int64_t, int64_t, int, void *);
void avx512_unpack(const packed_operator *, int64_t, int64_t, int, void *);
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define FISTAPRUNER_NEON 1
void neon_multiply(const packed_operator *, int64_t, int64_t, const prepared *, int, float *);
void neon_unpack(const packed_operator *, int64_t, int64_t, int, void *);
#endif

/* Sides of a matrix tile, and the bf16 values of one with 32 columns. */
#define AMX_SIDE 16
#define AMX_VALUES (AMX_SIDE * 32)
#if defined(FISTAPRUNER_X86) && defined(__linux__) && ((defined(__GNUC__) && __GNUC__ >= 11) || (defined(__clang__) && __clang_major__ >= 12))
#define FISTAPRUNER_AMX 1
int amx_permitted(void);
void amx_prepare(const uint16_t *, int, int64_t, int64_t, int64_t, uint16_t *);
void amx_multiply(const packed_operator *, bias_vector, int64_t, int64_t, const uint16_t *, int, uint16_t *, uint16_t *);
#endif

static inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline int count_bits(uint64_t word) {
#if defined(__GNUC__) || defined(__clang__)
    return __builtin_popcountll(word);
#else
    int count = 0;
    for (; word; word &= word - 1) count++;
    return count;
#endif
}

static inline int lowest_bit(uint64_t word) {
#if defined(__GNUC__) || defined(__clang__)
    return __builtin_ctzll(word);
#else
    int bit = 0;
    while (!(word >> bit & 1)) bit++;
    return bit;
#endif
}

#endif
