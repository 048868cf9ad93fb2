/* Weights of 4 or 8 bits in groups, and of bfloat16, multiplied by float32 vectors that are not rounded.
 *
 * PANEL_ROWS rows of a weight lie side by side, so that a vector holds one column of them and no sum goes over lanes. A
 * word holds 32 / bits consecutive columns of a row, the first in its lowest bits. weight = scale * code + minimum.
 */
#include "kernels.h"

#define FETCH_AHEAD 1024 /* words */
#define PARTS (PANEL_ROWS / WIDE)

INLINE wide factors(const int halved, const void *from, index_t at)
{
    if (halved) return widen((const uint16_t *)from + at);
    return *(const loose_wide *)((const float *)from + at);
}

/* Code j of each word times 2^(bits * j), exactly: it stays where it lies, and what it is multiplied by is smaller by
 * as much (`lay_vectors`). The last one is moved down, off the sign. */
INLINE wide code_in_place(const int bits, words word, const int j)
{
    const uint32_t mask = ((1u << bits) - 1) << (j * bits);
    if ((j + 1) * bits == 32) return __builtin_convertvector((signed_words)(word >> (32 - bits)), wide);
    return __builtin_convertvector((signed_words)(word & mask), wide);
}

/* Some vectors of the rows of a panel, from vector `part` on, times some vectors x: out[vectors][PANEL_ROWS].
 *
 * Bits, halved, vectors and parts are constants where it is inlined; sums are even and odd, because each waits for the
 * one before. x[vectors, columns] and sums[vectors, groups] are as `lay_vectors` makes them. */
INLINE void part_product(const int bits, const int halved, const int vectors, const int parts, const packed *w,
                         index_t panel, int part, const float *x, const float *sums, float *out)
{
    const int per_word = 32 / bits;
    const index_t columns = w->groups * w->group_words * per_word;
    const uint32_t *codes = w->codes + panel * w->groups * w->group_words * PANEL_ROWS + part * WIDE;
    wide total[MOST_VECTORS][PARTS];
    for (int i = 0; i < vectors; i++)
        for (int p = 0; p < parts; p++) total[i][p] = (wide){0};
    for (index_t group = 0; group < w->groups; group++) {
        wide even[MOST_VECTORS][PARTS], odd[MOST_VECTORS][PARTS];
        for (int i = 0; i < vectors; i++)
            for (int p = 0; p < parts; p++) even[i][p] = odd[i][p] = (wide){0};
        for (index_t n = 0; n < w->group_words; n++, codes += PANEL_ROWS, x += per_word) {
            words word[PARTS];
            for (int p = 0; p < parts; p++) word[p] = *(const loose_words *)(codes + p * WIDE);
            if (part == 0) __builtin_prefetch(codes + FETCH_AHEAD);
#pragma GCC unroll 8
            for (int j = 0; j < per_word; j += 2)
#pragma GCC unroll 2
                for (int p = 0; p < parts; p++) {
                    wide first = code_in_place(bits, word[p], j), second = code_in_place(bits, word[p], j + 1);
#pragma GCC unroll 4
                    for (int i = 0; i < vectors; i++) {
                        even[i][p] += first * splat_wide(x[i * columns + j]);
                        odd[i][p] += second * splat_wide(x[i * columns + j + 1]);
                    }
                }
        }
        for (int p = 0; p < parts; p++) {
            index_t at = (panel * w->groups + group) * PANEL_ROWS + (part + p) * WIDE;
            wide scale = factors(halved, w->scales, at), minimum = factors(halved, w->minima, at);
            for (int i = 0; i < vectors; i++) {
                wide sum = splat_wide(sums[i * w->groups + group]);
                total[i][p] += scale * (even[i][p] + odd[i][p]) + minimum * sum;
            }
        }
    }
    for (int i = 0; i < vectors; i++)
        for (int p = 0; p < parts; p++) *(loose_wide *)(out + i * PANEL_ROWS + (part + p) * WIDE) = total[i][p];
}

/* One vector leaves registers for the sums of a whole panel, several only for those of a part. */
INLINE void panel_product(const int bits, const int halved, const int vectors, const packed *w, index_t panel,
                          const float *x, const float *sums, float *out)
{
    if (vectors == 1) part_product(bits, halved, 1, PARTS, w, panel, 0, x, sums, out);
    else
        for (int part = 0; part < PARTS; part++)
            part_product(bits, halved, vectors, 1, w, panel, part, x, sums, out);
}

#define CASES(bits, halved)                                                                                            \
    switch (vectors) {                                                                                                 \
    case 1: panel_product(bits, halved, 1, w, panel, x, sums, out); break;                                             \
    case 2: panel_product(bits, halved, 2, w, panel, x, sums, out); break;                                             \
    case 3: panel_product(bits, halved, 3, w, panel, x, sums, out); break;                                             \
    default: panel_product(bits, halved, 4, w, panel, x, sums, out); break;                                            \
    }

void multiply_panel(const packed *w, index_t panel, index_t vectors, const float *x, const float *sums, float *out)
{
    if (w->bits == 4 && w->halved) CASES(4, 1)
    else if (w->bits == 4) CASES(4, 0)
    else if (w->halved) CASES(8, 1)
    else CASES(8, 0)
}

void lay_vectors(const packed *w, index_t vectors, const float *x, float *sums, float *laid)
{
    const index_t per_word = 32 / w->bits, size = w->group_words * per_word;
    float shrink[LANES];
    for (index_t j = 0; j < LANES; j++) shrink[j] = (j + 1) % per_word ? ldexpf(1, -(int)(j % per_word * w->bits)) : 1;
    for (index_t at = 0; at < vectors * w->groups; at++, x += size, laid += size) {
        vec total = {0};
        index_t k = 0;
        for (; k + LANES <= size; k += LANES) {
            total += load(x + k);
            store(laid + k, load(x + k) * load(shrink));
        }
        sums[at] = sum_lanes(total);
        for (; k < size; k++) {
            sums[at] += x[k];
            laid[k] = x[k] * shrink[k % per_word];
        }
    }
}

/* out[M, N] = x[M, columns] weight[N, columns]^T (+ bias). 0, or 1 where there is no memory. */
int ahn_packed_multiply(index_t M, index_t N, const packed *w, const float *x, const float *bias, float *out)
{
    const index_t columns = w->groups * w->group_words * (32 / w->bits);
    float *laid = scratch(M * (columns + w->groups)), *sums = laid + M * columns;
    if (!laid) return 1;
    lay_vectors(w, M, x, sums, laid);
#pragma omp parallel for schedule(static)
    for (index_t panel = 0; panel < w->panels; panel++)
        for (index_t first = 0; first < M; first += MOST_VECTORS) {
            float block[MOST_VECTORS * PANEL_ROWS] __attribute__((aligned(ALIGNMENT)));
            index_t vectors = M - first < MOST_VECTORS ? M - first : MOST_VECTORS, row = panel * PANEL_ROWS;
            multiply_panel(w, panel, vectors, laid + first * columns, sums + first * w->groups, block);
            for (index_t i = 0; i < vectors; i++)
                for (index_t n = 0; n < PANEL_ROWS && row + n < N; n++)
                    out[(first + i) * N + row + n] = block[i * PANEL_ROWS + n] + (bias ? bias[row + n] : 0);
        }
    free(laid);
    return 0;
}

/* Rows of a weight from panel `first` on as float32, out[rows, columns]; `rows` may end within a panel. */
void ahn_packed_unpack(index_t first, index_t rows, const packed *w, float *out)
{
    const index_t per_word = 32 / w->bits, size = w->group_words * per_word, columns = w->groups * size;
    const uint32_t mask = (1u << w->bits) - 1;
#pragma omp parallel for schedule(static)
    for (index_t row = 0; row < rows; row += PANEL_ROWS) {
        index_t panel = first + row / PANEL_ROWS, lanes = rows - row < PANEL_ROWS ? rows - row : PANEL_ROWS;
        for (index_t group = 0; group < w->groups; group++) {
            index_t at = panel * w->groups + group;
            for (index_t n = 0; n < w->group_words; n++) {
                float block[8][PANEL_ROWS] __attribute__((aligned(ALIGNMENT)));
                const uint32_t *codes = w->codes + (at * w->group_words + n) * PANEL_ROWS;
                for (index_t lane = 0; lane < PANEL_ROWS; lane += WIDE) {
                    wide scale = factors((int)w->halved, w->scales, at * PANEL_ROWS + lane);
                    wide minimum = factors((int)w->halved, w->minima, at * PANEL_ROWS + lane);
                    words word = *(const loose_words *)(codes + lane);
                    for (index_t j = 0; j < per_word; j++) {
                        words code = (word >> (uint32_t)(j * w->bits)) & mask;
                        *(loose_wide *)(block[j] + lane) = __builtin_convertvector(code, wide) * scale + minimum;
                    }
                }
                float *to = out + row * columns + group * size + n * per_word;
                for (index_t lane = 0; lane < lanes; lane++)
                    for (index_t j = 0; j < per_word; j++) to[lane * columns + j] = block[j][lane];
            }
        }
    }
}

/* bfloat16: one row of a weight times some vectors, at most MOST_VECTORS. */
INLINE void half_row(const int vectors, index_t D, const float *x, const uint16_t *row, float *to, index_t step)
{
    wide sums[MOST_VECTORS][PARTS];
    for (int i = 0; i < vectors; i++)
        for (int p = 0; p < PARTS; p++) sums[i][p] = (wide){0};
    for (index_t d = 0; d < D; d += PANEL_ROWS)
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; p++) {
            wide part = widen_bfloat16(row + d + p * WIDE);
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++)
                sums[i][p] += part * *(const loose_wide *)(x + i * D + d + p * WIDE);
        }
    for (int i = 0; i < vectors; i++) {
        float total = 0;
        for (int p = 0; p < PARTS; p++)
            for (int lane = 0; lane < WIDE; lane++) total += sums[i][p][lane];
        to[i * step] += total;
    }
}

float multiply_half_row(const uint16_t *row, const float *x, index_t D)
{
    float total = 0;
    half_row(1, D, x, row, &total, 0);
    return total;
}

/* out[M, N] = x[M, D] weight[N, D]^T (+ bias), the weight in bfloat16; D is a multiple of PANEL_ROWS. */
void ahn_half_multiply(index_t M, index_t N, index_t D, const float *x, const uint16_t *weight, const float *bias,
                       float *out)
{
#pragma omp parallel for schedule(static)
    for (index_t row = 0; row < N; row++)
        for (index_t first = 0; first < M; first += MOST_VECTORS) {
            float *to = out + first * N + row;
            index_t vectors = M - first < MOST_VECTORS ? M - first : MOST_VECTORS;
            for (index_t i = 0; i < vectors; i++) to[i * N] = bias ? bias[row] : 0;
            switch (vectors) {
            case 1: half_row(1, D, x + first * D, weight + row * D, to, N); break;
            case 2: half_row(2, D, x + first * D, weight + row * D, to, N); break;
            case 3: half_row(3, D, x + first * D, weight + row * D, to, N); break;
            default: half_row(4, D, x + first * D, weight + row * D, to, N); break;
            }
        }
}
