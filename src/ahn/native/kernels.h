/* What the files of kernels share beside vectors: structures that Python fills, and functions that run within a team.
 *
 * Functions that are declared here open no team of threads: each call is the work of one thread.
 */
#ifndef AHN_KERNELS_H
#define AHN_KERNELS_H

#include "vector.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define WITHIN __attribute__((visibility("hidden")))
#define KEY_BLOCK 256 /* keys that a row of queries meets at once */
#define PANEL_ROWS 16 /* rows of a packed weight that lie side by side */

/* The widest vector of the machine: compilers keep what is wider in memory instead of in registers. */
#ifdef __AVX512F__
#define WIDE 16
#else
#define WIDE 8
#endif

typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef uint32_t words __attribute__((vector_size(4 * WIDE)));
typedef int32_t signed_words __attribute__((vector_size(4 * WIDE)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDE)));
typedef wide loose_wide __attribute__((aligned(4), may_alias));
typedef words loose_words __attribute__((aligned(4), may_alias));
typedef halves loose_halves __attribute__((aligned(2), may_alias));

enum { FLOAT32, BFLOAT16, FLOAT16 };

INLINE wide splat_wide(float x) { return x - (wide){0}; }

/* Numbers of float16, exactly. */
INLINE wide widen(const uint16_t *from)
{
#if defined(__AVX512F__)
    return (wide)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
#elif defined(__F16C__)
    return (wide)_mm256_cvtph_ps(_mm_loadu_si128((const void *)from));
#else /* the exponent is shifted by a product, which also brings subnormals along */
    words bits = __builtin_convertvector(*(const loose_halves *)from, words);
    wide size = (wide)((bits & 0x7fff) << 13) * splat_wide(0x1p112f);
    return (wide)((words)size | (bits & 0x8000) << 16);
#endif
}

INLINE wide widen_bfloat16(const uint16_t *from)
{
    return (wide)(__builtin_convertvector(*(const loose_halves *)from, words) << 16);
}

/* Rounds to the nearest number of half precision, of two to the even one; what is too large for it is infinite. */
INLINE uint16_t narrow(float x, index_t kind)
{
    uint32_t bits, half;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return kind == BFLOAT16 ? 0x7fc0 : 0x7e00;
    if (kind == BFLOAT16) return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) { /* a sum with 1/2 rounds to the steps of subnormals */
        float moved;
        memcpy(&moved, &size, sizeof moved);
        moved += 0.5f;
        memcpy(&half, &moved, sizeof half);
        return (uint16_t)(sign | (half - 0x3f000000));
    }
    return (uint16_t)(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

/* --- attention -----------------------------------------------------------------------------------------------------*/

/* Keys [B, G, count, K] and values [B, G, count, V] of consecutive places, and who reads them. */
typedef struct {
    const float *query; /* the queries that read them; their strides are those of the call */
    const void *keys, *values; /* of `kind`, which is FLOAT32 where there are many queries */
    index_t kind;
    index_t key_batch, key_head, key_place; /* strides in numbers; those of a key lie side by side */
    index_t value_batch, value_head, value_place;
    index_t count;
    index_t first, window; /* token at the first place; a query reads as many tokens up to its own */
    /* or, for each place, the first query that reads it and the first that reads it no more */
    const index_t *visible_from, *visible_until;
    index_t visible_batch;
    const float *mask; /* for a single query: added to its scores, or NULL */
    index_t mask_batch;
    /* for a single query: where the keys of each row of the batch lie, and how many places of them it reads; or NULL */
    const index_t *rows, *counts;
} Segment;

/* The best score so far of a row, the sum of exp(score - best), and the sum of values weighted so. */
typedef struct {
    float best, total;
} Tally;

typedef struct {
    index_t T, H, R, K, V;
    index_t query_batch, query_head, query_token; /* strides */
    index_t seen;                                 /* index of the first query */
    float scaling;
} Call;

/* Blocks of keys that a single query meets. */
WITHIN index_t key_blocks(const Segment *segments, index_t count);
/* One of these blocks: tallies [R] and sums [R, V] of the query heads of kv head g in row b. */
WITHIN void attend_block(const Call *call, const Segment *segments, index_t block, index_t b, index_t g,
                         Tally *tallies, float *sums);
/* Adds up what the blocks of keys found for one query head; those of one block lie `step` apart. Returns the logarithm
 * of the sum of exp(score). */
WITHIN float merge_blocks(const Tally *tallies, const float *sums, index_t blocks, index_t step, index_t V, float *out);

/* --- memories ------------------------------------------------------------------------------------------------------*/

/* The output of a memory; see OutputWeights in ahn/native/__init__.py. */
typedef struct {
    const float *gate, *gate_bias, *norm, *project;
    float scale;
    int per_head, key_first;
} Output;

/* out[V] += the projection of what head h read; `read` [H, V] is that of all heads of its row. */
WITHIN void project_read(const Output *output, index_t h, index_t H, index_t V, const float *read, float *out);

/* The output of linearised attention; see LinearizedWeights in ahn/native/linearized.py. */
typedef struct {
    const float *mean_query, *share_key, *gate, *gate_bias, *size_weight, *match_weight, *exact_weight, *project;
} Linearized;

/* local[V] += the projection of what head h makes of its state [V + 1, K + 1]; x[D] is what the layer read, log_sum is
 * that of the exact tokens. */
WITHIN void add_linearized(const Linearized *weights, index_t h, index_t K, index_t V, index_t D, const float *query,
                           const float *x, const float *state, float log_sum, float *local);

enum { GATED, LINEARIZED }; /* kinds of memory: what is read passes a gate, or is weighed against the exact tokens */

/* A memory of any kind, with values as large as keys. */
typedef struct {
    index_t kind;
    const void *output; /* an `Output` where it is GATED, state [H, K, K]; else a `Linearized`, [H, K + 1, K + 1] */
} Memory;

/* The output of a memory with a norm over all heads, which waits until these have read; else NULL. */
WITHIN const Output *joint_output(const Memory *memory);
/* local[K] += what head h answers, where the exact tokens have log_sum; with a joint output it is only noted in
 * read[H, K] what it reads. */
WITHIN void add_answer(const Memory *memory, index_t h, index_t H, index_t K, index_t D, const float *query,
                       const float *x, const float *state, float log_sum, float *read, float *local);

/* --- weights -------------------------------------------------------------------------------------------------------*/

/* A weight of `panels` times PANEL_ROWS rows and groups * group_words * 32 / bits columns; see packed.c. */
typedef struct {
    index_t bits, panels, groups, group_words, halved;
    const uint32_t *codes; /* [panels, groups, group_words, PANEL_ROWS] */
    const void *scales;    /* [panels, groups, PANEL_ROWS], float16 if halved, else float32 */
    const void *minima;
} packed;

/* Vectors x[vectors, columns] as a weight is multiplied by them: `laid` of the same shape, in which each number is as
 * much smaller as its code is larger in its word; and sums[vectors, groups] of x over the columns of each group. */
WITHIN void lay_vectors(const packed *w, index_t vectors, const float *x, float *sums, float *laid);
/* One panel times some vectors that were laid, at most MOST_VECTORS: out[vectors][PANEL_ROWS]. */
WITHIN void multiply_panel(const packed *w, index_t panel, index_t vectors, const float *x, const float *sums,
                           float *out);
/* out[M, N], `out_step` apart, = x[M, D] rows[N, D]^T; M is at most MOST_VECTORS, D a multiple of LANES. Each out[i]
 * has room for N rounded up to LANES. */
WITHIN void multiply_rows(index_t M, index_t N, index_t D, const float *x, const float *rows, float *out,
                          index_t out_step);
/* row . x, the row in bfloat16; D is a multiple of PANEL_ROWS. */
WITHIN float multiply_half_row(const uint16_t *row, const float *x, index_t D);

#endif
