/* What the kernels share: vectors, a fast exp, small matrix products.
 *
 * Vectors are those of GCC and Clang, which lower them to what the machine has. All matrices are float32 and row-major;
 * a leading dimension (lda, ldb, ldc) is the distance between two rows.
 */
#ifndef AHN_VECTOR_H
#define AHN_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define PANEL (2 * LANES) /* columns of one tile of a product */
#define TILE_ROWS 6       /* rows of it: 6 x 2 sums, 2 columns and a factor fill the 16 registers of AVX2 */
#define ALIGNMENT 64
#define LINE 16           /* numbers that memory sends at once */
#define MOST_VECTORS 4    /* that are multiplied together as they pass */
#define INLINE static inline __attribute__((always_inline))

typedef int64_t index_t;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef vec loose_vec __attribute__((aligned(4), may_alias)); /* may lie anywhere */

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec x) { *(loose_vec *)to = x; }
INLINE vec splat(float x) { return x - (vec){0}; }

/* Defines max(a, b) for vectors V with integers I; b where one of them is NaN. */
#define DEFINE_MAX(name, V, I)                                                                                         \
    INLINE V name(V a, V b)                                                                                            \
    {                                                                                                                  \
        I larger = a > b;                                                                                              \
        return (V)(((I)a & larger) | ((I)b & ~larger));                                                                \
    }

DEFINE_MAX(max_vec, vec, ivec)

INLINE float sum_lanes(vec x)
{
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* The sums of the lanes of eight vectors, lane i that of x[i]. */
INLINE vec sum_each(vec x[LANES])
{
    for (int i = 0; i < 4; i++)
        x[i] = SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; i++)
        x[i] = SHUFFLE(x[i], x[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(x[i], x[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(x[0], x[1], 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(x[0], x[1], 1, 9, 3, 11, 5, 13, 7, 15);
}

INLINE float max_lanes(vec x)
{
    float most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
}

/* Defines exp(x) for x <= 0, for vectors V with integers I and `larger` of two; 0 below -87.3, NaN for NaN. It is 2^n
 * times a polynomial of degree 6 (relative error 2e-7); adding `magic`, 1.5 * 2^23, rounds to an integer. */
#define DEFINE_EXP(name, V, I, larger)                                                                                 \
    INLINE V name(V x)                                                                                                 \
    {                                                                                                                  \
        const V none = {0}, least = none - 87.3f, magic = none + 12582912.f;                                           \
        I too_small = x <= least;                                                                                      \
        x = larger(least, x);                                                                                          \
        V n = x * 1.44269504f + magic;                                                                                 \
        I exponent = (I)n << 23;                                                                                       \
        n -= magic;                                                                                                    \
        V r = x - n * 0.693359375f + n * 2.12194440e-4f, p = none + 1.38888889e-3f;                                    \
        p = p * r + 8.33333333e-3f;                                                                                    \
        p = p * r + 4.16666667e-2f;                                                                                    \
        p = p * r + 1.66666667e-1f;                                                                                    \
        p = p * r + 0.5f;                                                                                              \
        p = p * r + 1.f;                                                                                               \
        p = p * r + 1.f;                                                                                               \
        return (V)(((I)p + exponent) & ~too_small);                                                                    \
    }

/* Defines sigmoid(x) for the same vectors, from exp of what is not above 0. */
#define DEFINE_SIGMOID(name, V, I, exp, larger)                                                                        \
    INLINE V name(V x)                                                                                                 \
    {                                                                                                                  \
        const V none = {0}, one = none + 1.f;                                                                          \
        V small = exp(-larger(x, -x));                                                                                 \
        I negative = x < none;                                                                                         \
        return (V)(((I)small & negative) | ((I)one & ~negative)) / (one + small);                                      \
    }

DEFINE_EXP(exp_vec, vec, ivec, max_vec)
DEFINE_SIGMOID(sigmoid_vec, vec, ivec, exp_vec, max_vec)

INLINE float dot(const float *a, const float *b, index_t size)
{
    vec sum = {0};
    index_t d = 0;
    for (; d + LANES <= size; d += LANES) sum += load(a + d) * load(b + d);
    float total = sum_lanes(sum);
    for (; d < size; d++) total += a[d] * b[d];
    return total;
}

/* C[rows, PANEL] = keep * C + A[rows, depth] B[depth, PANEL]; `rows` is a constant where this is inlined. */
INLINE void tile(const int rows, index_t depth, const float *a, index_t lda, const float *b, index_t ldb, float *c,
                 index_t ldc, float keep)
{
    vec sums[TILE_ROWS][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vec){0};
    for (index_t d = 0; d < depth; d++) {
        vec left = load(b + d * ldb), right = load(b + d * ldb + LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            vec factor = splat(a[i * lda + d]);
            sums[i][0] += factor * left;
            sums[i][1] += factor * right;
        }
    }
    for (int i = 0; i < rows; i++) {
        float *row = c + i * ldc;
        if (keep != 0) {
            sums[i][0] += splat(keep) * load(row);
            sums[i][1] += splat(keep) * load(row + LANES);
        }
        store(row, sums[i][0]);
        store(row + LANES, sums[i][1]);
    }
}

/* C[rows, columns] = keep * C + A[rows, depth] B[depth, columns]; columns are a multiple of PANEL.
 * Panel p of B begins at b + p * panel_step: PANEL for a plain matrix, more for one that lies panel by panel. */
INLINE void product(index_t rows, index_t columns, index_t depth, const float *a, index_t lda, const float *b,
                    index_t ldb, index_t panel_step, float *c, index_t ldc, float keep)
{
    for (index_t column = 0; column < columns; column += PANEL, b += panel_step) {
        index_t i = 0;
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
            tile(TILE_ROWS, depth, a + i * lda, lda, b, ldb, c + i * ldc + column, ldc, keep);
        const float *rest = a + i * lda;
        float *out = c + i * ldc + column;
        switch (rows - i) {
        case 1: tile(1, depth, rest, lda, b, ldb, out, ldc, keep); break;
        case 2: tile(2, depth, rest, lda, b, ldb, out, ldc, keep); break;
        case 3: tile(3, depth, rest, lda, b, ldb, out, ldc, keep); break;
        case 4: tile(4, depth, rest, lda, b, ldb, out, ldc, keep); break;
        case 5: tile(5, depth, rest, lda, b, ldb, out, ldc, keep); break;
        default: break;
        }
    }
}

/* out[i, j] = factor * (x[i] . rows[j]), for `count` rows of `size` numbers, eight of them at a time.
 *
 * The number of vectors x, at most MOST_VECTORS, is a constant where this is inlined; size is a multiple of LANES. Rows
 * lie `step` apart; those `ahead` of the current ones are fetched meanwhile: no page of memory fetches the next.
 * out[i] has room for `count` rounded up to LANES. */
INLINE void products(const int vectors, const float *x, index_t x_step, const float *rows, index_t step, index_t count,
                     index_t size, const index_t ahead, float factor, float *out, index_t out_step)
{
    for (index_t j = 0; j < count; j += LANES) {
        const float *row[LANES];
        for (index_t n = 0; n < LANES; n++) {
            row[n] = rows + (j + n < count ? j + n : count - 1) * step;
            if (ahead)
                for (index_t d = 0; d < size; d += LINE) __builtin_prefetch(row[n] + ahead * step + d);
        }
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            vec sums[LANES];
            for (int n = 0; n < LANES; n++) sums[n] = (vec){0};
            for (index_t d = 0; d < size; d += LANES) {
                vec part = load(x + i * x_step + d);
#pragma GCC unroll 8
                for (int n = 0; n < LANES; n++) sums[n] += part * load(row[n] + d);
            }
            store(out + i * out_step + j, sum_each(sums) * splat(factor));
        }
    }
}

/* Scratch memory of a thread, or NULL; free() gives it back. */
INLINE float *scratch(index_t floats)
{
    size_t bytes = ((size_t)floats * sizeof(float) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return aligned_alloc(ALIGNMENT, bytes);
}

#endif
