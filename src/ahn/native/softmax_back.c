/* The elementwise part of the gradient of attention: weights of a softmax, and the gradient of its scores.
 *
 * Legend of shapes: X heads and rows of a batch, R queries, M keys.
 */
#include "mixed.h"

typedef struct {
    index_t M;
    float scaling;
    const void *mask; /* [R, M], rows `step` apart */
    index_t step;
} Scores;

INLINE void row_back(const int is_half, const Scores *all, index_t r, const float *scores, const float *to_weights,
                     float log_sum, float mean, void *weights, void *slopes)
{
    wide scaling = splat_wide(all->scaling), top = splat_wide(log_sum), middle = splat_wide(mean);
    for (index_t m = 0, left = all->M; m < all->M; m += WIDE, left -= WIDE) {
        wide masked = read_mixed(is_half, all->mask, r * all->step + m, left, 0) - top;
        wide weight = exp_wide(read_mixed(0, scores, m, left, 0) * scaling + masked);
        write_mixed(is_half, weights, m, left, weight);
        write_mixed(is_half, slopes, m, left, weight * (read_mixed(0, to_weights, m, left, 0) - middle) * scaling);
    }
}

/* weights[X, R, M] = exp(scaling * scores + mask - log_sum) and slopes = scaling * weights * (to_weights - means).
 *
 * scores and to_weights [X, R, M] and log_sums and means [X, R] are float32; mask [R, M], weights and slopes are
 * bfloat16 where `is_half` is set, else float32. Rows of the mask lie `mask_step` apart. */
void ahn_softmax_back(index_t X, index_t R, index_t M, index_t mask_step, float scaling, const float *scores,
                      const float *to_weights, const void *mask, const float *log_sums, const float *means,
                      void *weights, void *slopes, int is_half)
{
    const Scores all = {M, scaling, mask, mask_step};
    index_t bytes = M * (is_half ? 2 : 4);
    char *weight_rows = weights, *slope_rows = slopes;
#pragma omp parallel for schedule(static)
    for (index_t row = 0; row < X * R; row++) {
        const float *score = scores + row * M, *to_weight = to_weights + row * M;
        char *weight = weight_rows + row * bytes, *slope = slope_rows + row * bytes;
        if (is_half) row_back(1, &all, row % R, score, to_weight, log_sums[row], means[row], weight, slope);
        else row_back(0, &all, row % R, score, to_weight, log_sums[row], means[row], weight, slope);
    }
}
