/* Linear maps of a few vectors, at the speed at which memory brings the weights. */
#include "kernels.h"

#define ROWS_AT_ONCE 64

void multiply_rows(index_t M, index_t N, index_t D, const float *x, const float *rows, float *out, index_t out_step)
{
    switch (M) {
    case 1: products(1, x, D, rows, D, N, D, 0, 1, out, out_step); break;
    case 2: products(2, x, D, rows, D, N, D, 0, 1, out, out_step); break;
    case 3: products(3, x, D, rows, D, N, D, 0, 1, out, out_step); break;
    default: products(4, x, D, rows, D, N, D, 0, 1, out, out_step); break;
    }
}

/* out[M, N], `out_step` apart, = x[M, D] rows[N, D]^T (+ bias); N is at most ROWS_AT_ONCE. */
static void multiply(index_t M, index_t N, index_t D, const float *x, const float *rows, const float *bias, float *out,
                     index_t out_step)
{
    float block[MOST_VECTORS * ROWS_AT_ONCE] __attribute__((aligned(ALIGNMENT)));
    multiply_rows(M, N, D, x, rows, block, ROWS_AT_ONCE);
    for (index_t i = 0; i < M; i++)
        for (index_t j = 0; j < N; j++) out[i * out_step + j] = block[i * ROWS_AT_ONCE + j] + (bias ? bias[j] : 0);
}

/* out[M, N] = x[M, D] weight[N, D]^T (+ bias); M is at most MOST_VECTORS, D a multiple of LANES. */
void ahn_linear(index_t M, index_t N, index_t D, const float *x, const float *weight, const float *bias, float *out)
{
#pragma omp parallel for schedule(static)
    for (index_t row = 0; row < N; row += ROWS_AT_ONCE)
        multiply(M, N - row < ROWS_AT_ONCE ? N - row : ROWS_AT_ONCE, D, x, weight + row * D, bias ? bias + row : NULL,
                 out + row, N);
}

/* The same of several layers, each with its own input and several maps: x[L, M, D] to out[L, maps, M, N]. */
void ahn_linear_each(index_t L, index_t maps, index_t M, index_t N, index_t D, const float *x,
                     const float *const *weights, float *out)
{
#pragma omp parallel for schedule(static)
    for (index_t unit = 0; unit < L * maps; unit++)
        for (index_t row = 0; row < N; row += ROWS_AT_ONCE)
            multiply(M, N - row < ROWS_AT_ONCE ? N - row : ROWS_AT_ONCE, D, x + unit / maps * M * D,
                     weights[unit] + row * D, NULL, out + unit * M * N + row, N);
}
