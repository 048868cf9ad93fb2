/* Norms and gated activations of many rows, and their gradients, with one pass over memory each.
 *
 * Legend of shapes: N rows, D numbers of a row, S slabs of rows.
 */
#include "mixed.h"

typedef struct {
    const float *weight; /* [D], or NULL */
    float share, eps;
} Norm;

INLINE float inverse_length(const Norm *norm, const float *x, index_t D)
{
    wide squares = {0};
    for EACH (at, left, D) {
        wide part = read_mixed(0, x, at, left, 0);
        squares += part * part;
    }
    return 1 / sqrtf(norm->share * sum_wide(squares) + norm->eps);
}

INLINE wide weight_at(const Norm *norm, index_t at, index_t left)
{
    return norm->weight ? read_mixed(0, norm->weight, at, left, 0) : splat_wide(1);
}

/* The gradient of a row of the output, from that of its float32 and that of its bfloat16 form; either may be NULL. */
INLINE wide slope_at(const float *to_out, const uint16_t *to_half, index_t at, index_t left)
{
    wide slope = to_out ? read_mixed(0, to_out, at, left, 0) : (wide){0};
    return to_half ? slope + read_mixed(1, to_half, at, left, 0) : slope;
}

/* out[N, D] = weight * x / sqrt(share * (sum of the squares of a row) + eps), and the same in bfloat16 where `half` is
 * not NULL. */
void ahn_norm(index_t N, index_t D, float share, float eps, const float *x, const float *weight, float *out,
              uint16_t *half)
{
    const Norm norm = {weight, share, eps};
#pragma omp parallel for schedule(static)
    for (index_t n = 0; n < N; n++) {
        const float *row = x + n * D;
        wide scale = splat_wide(inverse_length(&norm, row, D));
        for EACH (at, left, D) {
            wide y = read_mixed(0, row, at, left, 0) * scale * weight_at(&norm, at, left);
            write_mixed(0, out + n * D, at, left, y);
            if (half) write_mixed(1, half + n * D, at, left, y);
        }
    }
}

/* to_x[N, D], and for each of S slabs of rows its part to_weight[S, D] where that is not NULL. */
void ahn_norm_back(index_t N, index_t D, index_t S, float share, float eps, const float *x, const float *weight,
                   const float *to_out, const uint16_t *to_half, float *to_x, float *to_weight)
{
    const Norm norm = {weight, share, eps};
#pragma omp parallel for schedule(static)
    for (index_t slab = 0; slab < S; slab++)
        for (index_t n = N * slab / S; n < N * (slab + 1) / S; n++) {
            const float *row = x + n * D, *full = to_out ? to_out + n * D : NULL;
            const uint16_t *half = to_half ? to_half + n * D : NULL;
            float *sums = to_weight ? to_weight + slab * D : NULL, scale = inverse_length(&norm, row, D);
            wide products = {0};
            for EACH (at, left, D) {
                wide slope = slope_at(full, half, at, left), part = read_mixed(0, row, at, left, 0);
                products += slope * weight_at(&norm, at, left) * part;
                if (sums)
                    write_mixed(0, sums, at, left, read_mixed(0, sums, at, left, 0) + slope * part * splat_wide(scale));
            }
            wide along = splat_wide(share * scale * scale * scale * sum_wide(products)), whole = splat_wide(scale);
            for EACH (at, left, D) {
                wide slope = slope_at(full, half, at, left) * weight_at(&norm, at, left);
                write_mixed(0, to_x + n * D, at, left, slope * whole - read_mixed(0, row, at, left, 0) * along);
            }
        }
}

#define BLOCK 4096 /* numbers that a thread takes at once */

/* out[N] = silu(gate) * up, all bfloat16. */
void ahn_gated(index_t N, const uint16_t *gate, const uint16_t *up, uint16_t *out)
{
#pragma omp parallel for schedule(static)
    for (index_t start = 0; start < N; start += BLOCK)
        for (index_t at = start; at < N && at < start + BLOCK; at += WIDE) {
            wide x = read_mixed(1, gate, at, N - at, 0);
            write_mixed(1, out, at, N - at, x * sigmoid_wide(x) * read_mixed(1, up, at, N - at, 0));
        }
}

/* Gradients of gate and up, all bfloat16. */
void ahn_gated_back(index_t N, const uint16_t *gate, const uint16_t *up, const uint16_t *to_out, uint16_t *to_gate,
                    uint16_t *to_up)
{
#pragma omp parallel for schedule(static)
    for (index_t start = 0; start < N; start += BLOCK)
        for (index_t at = start; at < N && at < start + BLOCK; at += WIDE) {
            wide x = read_mixed(1, gate, at, N - at, 0), share = sigmoid_wide(x), one = splat_wide(1);
            wide slope = read_mixed(1, to_out, at, N - at, 0), linear = read_mixed(1, up, at, N - at, 0);
            write_mixed(1, to_up, at, N - at, slope * x * share);
            write_mixed(1, to_gate, at, N - at, slope * linear * share * (one + x * (one - share)));
        }
}
