/* What Python calls: choose a level, prepare the vectors, share the rows among threads.
 *
 * Threads are borrowed from the OpenMP runtime that torch has already started: its entry points are handed over at load
 * time. A second pool would fight the first one for the cores, since idle OpenMP threads spin.
 */
#include "packed.h"

#include <math.h>
#include <stdlib.h>
#ifdef FISTAPRUNER_AMX
#include <cpuid.h>
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* More shares than threads: a core that another program interrupts holds up less. */
#define SHARES_A_THREAD 4

typedef void (*run_parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

static run_parallel parallel = NULL;

/* Increased whenever packed_operator or an exported function changes, so that a stale library is never called. */
EXPORT int fistapruner_abi(void) { return 6; }

EXPORT void fistapruner_threads(run_parallel run) { parallel = run; }

#ifdef FISTAPRUNER_X86
static int has_amx(void) {
#ifdef FISTAPRUNER_AMX
    unsigned a, b, c, d;
    const unsigned bf16 = 1u << 22, tile = 1u << 24; /* CPUID leaf 7, EDX */
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile) && amx_permitted();
#else
    return 0;
#endif
}
#endif

/* The best level this processor runs. */
EXPORT int fistapruner_level(void) {
#ifdef FISTAPRUNER_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni"))
        return !__builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512 : has_amx() ? LEVEL_AMX : LEVEL_AVX512_BF16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return LEVEL_AVX2;
#elif defined(FISTAPRUNER_NEON)
    return LEVEL_NEON; /* every 64-bit ARM processor has it */
#endif
    return LEVEL_PORTABLE;
}

typedef struct {
    const packed_operator *op;
    rows_times_vectors multiply;
    rows_to_dense unpack;
    const prepared *x;
    const float *vector_scale; /* int8: scale of each vector's activations */
    bias_vector bias;
    char *out;                 /* batch x rows, or what is unpacked */
    int64_t first, last;       /* rows */
    int type, batch, shares;
    int next;                  /* share that the next idle thread takes */
} job;

static float input_at(const void *x, int type, int64_t index) {
    return type == TYPE_BF16 ? bf16_to_float(((const uint16_t *)x)[index]) : ((const float *)x)[index];
}

static void store(const job *work, int64_t row, int vector, float value) {
    const packed_operator *op = work->op;
    if (op->kind == VALUES_INT8) value *= work->vector_scale[vector];
    if (work->bias.values) value += input_at(work->bias.values, work->bias.type, row);
    if (work->type == TYPE_BF16)
        ((uint16_t *)work->out)[vector * op->rows + row] = float_to_bf16(value);
    else
        ((float *)work->out)[vector * op->rows + row] = value;
}

static void multiply_blocks(const job *work, int64_t first, int64_t last) {
    float sums[ROW_BLOCK * MAX_TILE];
    for (int64_t row = first; row < last; row += ROW_BLOCK) {
        int64_t end = row + ROW_BLOCK < last ? row + ROW_BLOCK : last;
        for (int vector = 0; vector < work->batch; vector += MAX_TILE) {
            int tile = work->batch - vector < MAX_TILE ? work->batch - vector : MAX_TILE;
            int64_t at = vector * work->x->stride;
            prepared x = *work->x;
            if (x.plain) x.plain += at;
            if (x.split) x.split += at;
            if (x.bf16) x.bf16 += at;
            if (x.levels) x.levels += at;
            if (x.high) x.high += at, x.low += at;
            work->multiply(work->op, row, end, &x, tile, sums);
            for (int64_t r = row; r < end; r++)
                for (int t = 0; t < tile; t++) store(work, r, vector + t, sums[(r - row) * MAX_TILE + t]);
        }
    }
}

/* Share `index` of the rows: whole row blocks, counted from the first row. */
static void run_share(const job *work, int index) {
    const size_t size = work->type == TYPE_BF16 ? 2 : 4;
    const int64_t blocks = (work->last - work->first + ROW_BLOCK - 1) / ROW_BLOCK;
    int64_t first = work->first + blocks * index / work->shares * ROW_BLOCK;
    int64_t last = work->first + blocks * (index + 1) / work->shares * ROW_BLOCK;
    if (last > work->last) last = work->last;
    if (first >= last) return;
    if (work->multiply) multiply_blocks(work, first, last);
    else work->unpack(work->op, first, last, work->type, work->out + (size_t)(first - work->first) * (size_t)work->op->columns * size);
}

/* Next of some shares for whichever thread asks, so it does not matter how many threads the runtime grants. */
static int take(int *next) {
#if defined(__GNUC__) || defined(__clang__)
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
#else
    return (*next)++;
#endif
}

static void run_thread(void *data) {
    job *work = data;
    for (int index = take(&work->next); index < work->shares; index = take(&work->next)) run_share(work, index);
}

/* Whether more than one thread can be had. */
static int in_parallel(int threads) {
#if defined(__GNUC__) || defined(__clang__)
    return threads > 1 && parallel;
#else
    (void)threads;
    return 0;
#endif
}

static void on_threads(void (*work)(void *), void *data, int threads) {
    if (in_parallel(threads)) parallel(work, data, (unsigned)threads, 0);
    else work(data);
}

static void run_job(job *work, int threads) {
    work->shares = in_parallel(threads) ? SHARES_A_THREAD * threads : 1;
    on_threads(run_thread, work, threads);
}

/* Vectors on their way to what a level wants; of the forms, those that are not wanted are NULL. */
typedef struct {
    const void *x;
    int64_t columns, stride;
    float *plain, *split, *scale;
    uint16_t *bf16;
    int16_t *levels;
    uint8_t *high, *low;
    int type, batch, next;
} preparation;

/* 16-bit activations. A vector that is not finite gets a NaN scale, and so a NaN result. */
static float quantise(const preparation *to, int64_t from, int64_t at) {
    float largest = 0.0f;
    int finite = 1;
    for (int64_t column = 0; column < to->columns; column++) {
        float magnitude = fabsf(input_at(to->x, to->type, from + column));
        finite &= magnitude <= 3.4028235e38f;
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = largest / 32767.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (!finite || inverse > 3.4028235e38f) inverse = 0.0f;
    int16_t *levels = to->levels + at;
    memset(levels + to->columns, 0, (size_t)(to->stride - to->columns) * 2);
    for (int64_t column = 0; column < to->columns; column++) {
        float scaled = finite ? input_at(to->x, to->type, from + column) * inverse : 0.0f;
        int level = (int)(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
        levels[column] = (int16_t)(level < -32768 ? -32768 : level > 32767 ? 32767 : level);
    }
    for (int64_t column = 0; to->high && column < to->stride; column++) {
        int unsigned_level = levels[column] + INT8_OFFSET;
        to->high[at + column] = (uint8_t)(unsigned_level >> 8);
        to->low[at + column] = (uint8_t)(unsigned_level & 255);
    }
    return finite ? scale : NAN;
}

static void prepare_vector(const preparation *to, int vector) {
    const int64_t from = vector * to->columns, at = vector * to->stride;
    if (to->scale) {
        to->scale[vector] = quantise(to, from, at);
    } else if (to->bf16) {
        memcpy(to->bf16 + at, (const uint16_t *)to->x + from, (size_t)to->columns * 2);
        memset(to->bf16 + at + to->columns, 0, (size_t)(to->stride - to->columns) * 2);
    } else {
        float *out = (to->split ? to->split : to->plain) + at;
        memset(out, 0, (size_t)to->stride * sizeof(float));
        for (int64_t column = 0; column < to->columns; column++)
            out[to->split ? (column & ~(int64_t)31) + (column & 31) / 2 + 16 * (column & 1) : column] =
                input_at(to->x, to->type, from + column);
    }
}

static void prepare_vectors(void *data) {
    preparation *to = data;
    for (int vector = take(&to->next); vector < to->batch; vector = take(&to->next)) prepare_vector(to, vector);
}

/* Product of an operator with x (batch x columns): x times the transposed operator, plus a bias, to out (batch x rows).
 * Returns 0, or 1 when there is no memory for the prepared vectors. */
EXPORT int fistapruner_multiply(const packed_operator *op, const void *bias, int bias_type, const void *x, void *out, int type,
                                int batch, int threads, int level) {
    const int64_t stride = 64 * op->words, count = stride * batch;
    job work = {.op = op, .multiply = portable_multiply, .out = out, .last = op->rows, .type = type, .batch = batch};
    work.bias = (bias_vector){bias, bias_type};
    preparation to = {.x = x, .columns = op->columns, .stride = stride, .type = type, .batch = batch};
    float *buffer = malloc((size_t)(count + batch) * sizeof(float) + 64);
    if (!buffer) return 1;
    float *memory = (float *)(((uintptr_t)buffer + 63) & ~(uintptr_t)63);
#ifdef FISTAPRUNER_X86
    const int pairs = level >= LEVEL_AVX512_BF16 && op->kind == VALUES_BF16 && type == TYPE_BF16;
    if (level >= LEVEL_AVX2) work.multiply = avx2_multiply;
    if (level >= LEVEL_AVX512) work.multiply = avx512_multiply;
    if (pairs) work.multiply = op->mask ? avx512_bf16_multiply : avx512_bf16_dense;
    const int wide = work.multiply == avx512_multiply;
#else
    const int pairs = 0, wide = 0;
#ifdef FISTAPRUNER_NEON
    if (level >= LEVEL_NEON) work.multiply = neon_multiply;
#else
    (void)level;
#endif
#endif
    if (op->kind == VALUES_INT8) {
        to.scale = memory + count;
        to.levels = (int16_t *)memory;
        if (wide) to.high = (uint8_t *)(to.levels + count), to.low = to.high + count;
    } else if (pairs) to.bf16 = (uint16_t *)memory;
    else if (wide) to.split = memory;
    else to.plain = memory;
    on_threads(prepare_vectors, &to, threads < batch ? threads : batch);
    const prepared ready = {to.plain, to.split, to.bf16, to.levels, to.high, to.low, stride};
    work.x = &ready;
    work.vector_scale = to.scale;
    run_job(&work, threads);
    free(buffer);
    return 0;
}

/* Rows first..last densely, (last - first) x columns of fp32 or bf16. */
EXPORT void fistapruner_unpack(const packed_operator *op, int64_t first, int64_t last, void *out, int type, int threads, int level) {
    job work = {.op = op, .unpack = portable_unpack, .out = out, .first = first, .last = last, .type = type};
#ifdef FISTAPRUNER_X86
    if (level >= LEVEL_AVX2) work.unpack = avx2_unpack;
    if (level >= LEVEL_AVX512) work.unpack = avx512_unpack;
#elif defined(FISTAPRUNER_NEON)
    if (level >= LEVEL_NEON) work.unpack = neon_unpack;
#else
    (void)level;
#endif
    run_job(&work, threads);
}

/* bf16 values that a thread keeps spread: see amx_multiply. */
static int64_t panel_values(const packed_operator *op) { return 4 * op->words * AMX_VALUES; }

/* Bytes of scratch memory that fistapruner_multiply_many needs; 0 where it cannot run this operator. */
EXPORT int64_t fistapruner_many_bytes(const packed_operator *op, int batch, int threads, int level) {
    if (level < LEVEL_AMX || (op->kind == VALUES_BF16 && !op->mask)) return 0;
    int64_t groups = (batch + AMX_SIDE - 1) / AMX_SIDE, vectors = groups * 2 * op->words * AMX_VALUES;
    return 2 * (vectors + threads * panel_values(op)) + 64;
}

#ifdef FISTAPRUNER_AMX
typedef struct {
    const packed_operator *op;
    const uint16_t *x;
    uint16_t *vectors, *panels;
    void *out;
    bias_vector bias;
    int batch, groups;
    int next_group, next_panel, next_thread;
} many;

static void prepare_thread(void *data) {
    many *work = data;
    for (int group = take(&work->next_group); group < work->groups; group = take(&work->next_group))
        amx_prepare(work->x, work->batch, work->op->columns, work->op->words, group, work->vectors);
}

static void many_thread(void *data) {
    many *work = data;
    const packed_operator *op = work->op;
    const int64_t height = 2 * AMX_SIDE, panels = (op->rows + height - 1) / height;
    uint16_t *panel = work->panels + (int64_t)take(&work->next_thread) * panel_values(op);
    for (int64_t next = take(&work->next_panel); next < panels; next = take(&work->next_panel)) {
        int64_t first = height * next, last = first + height < op->rows ? first + height : op->rows;
        amx_multiply(op, work->bias, first, last, work->vectors, work->batch, panel, work->out);
    }
}
#endif

/* As fistapruner_multiply for many bf16 vectors; scratch has fistapruner_many_bytes(...) > 0 bytes. */
EXPORT void fistapruner_multiply_many(const packed_operator *op, const void *bias, int bias_type, const void *x, void *out,
                                      int batch, int threads, void *scratch) {
#ifdef FISTAPRUNER_AMX
    int groups = (batch + AMX_SIDE - 1) / AMX_SIDE;
    uint16_t *vectors = (uint16_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    many work = {.op = op, .x = x, .vectors = vectors, .out = out};
    work.bias = (bias_vector){bias, bias_type}, work.batch = batch, work.groups = groups;
    work.panels = vectors + (int64_t)groups * 2 * op->words * AMX_VALUES;
    on_threads(prepare_thread, &work, threads);
    on_threads(many_thread, &work, threads);
#else
    (void)op, (void)bias, (void)bias_type, (void)x, (void)out, (void)batch, (void)threads, (void)scratch;
#endif
}
