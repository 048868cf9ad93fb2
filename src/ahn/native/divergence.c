/* KL(teacher || student) of rows of logits, and its gradient with respect to the student's.
 *
 * Legend of shapes: N rows, V vocabulary. Logits are float32 or, where `is_half` is set, bfloat16.
 */
#include "mixed.h"

/* Of one row of logits: the largest, and the sum of exp(logit - largest). */
typedef struct {
    float largest, sum;
} Softmax;

INLINE float largest_of(const int is_half, const void *row, index_t V)
{
    wide largest = splat_wide(-INFINITY);
    for EACH (at, left, V) largest = max_wide(largest, read_mixed(is_half, row, at, left, -INFINITY));
    float most = largest[0];
    for (int lane = 1; lane < WIDE; lane++) most = largest[lane] > most ? largest[lane] : most;
    return most;
}

INLINE float row_divergence(const int is_half, const void *student, const void *teacher, index_t V, Softmax *ours,
                            Softmax *theirs)
{
    float s = largest_of(is_half, student, V), t = largest_of(is_half, teacher, V);
    double our_sum = 0, their_sum = 0, weighted = 0;
    for (index_t start = 0; start < V; start += 64 * WIDE) { /* float32 sums of few numbers keep their digits */
        wide our_part = {0}, their_part = {0}, weighted_part = {0};
        for (index_t at = start; at < V && at < start + 64 * WIDE; at += WIDE) {
            wide our = read_mixed(is_half, student, at, V - at, -INFINITY) - splat_wide(s);
            wide their = read_mixed(is_half, teacher, at, V - at, -INFINITY) - splat_wide(t), weight = exp_wide(their);
            our_part += exp_wide(our);
            their_part += weight;
            weighted_part += at + WIDE <= V ? weight * (their - our) : (wide){0};
            for (index_t rest = at; at + WIDE > V && rest < V; rest++)
                weighted += weight[rest - at] * (their[rest - at] - our[rest - at]);
        }
        our_sum += sum_wide(our_part);
        their_sum += sum_wide(their_part);
        weighted += sum_wide(weighted_part);
    }
    *ours = (Softmax){s, (float)our_sum};
    *theirs = (Softmax){t, (float)their_sum};
    return (float)(weighted / their_sum + log(our_sum) - log(their_sum));
}

INLINE void row_slope(const int is_half, const void *student, const void *teacher, index_t V, const Softmax *ours,
                      const Softmax *theirs, float factor, void *slope)
{
    wide our_share = splat_wide(factor / ours->sum), their_share = splat_wide(factor / theirs->sum);
    for EACH (at, left, V) {
        wide our = exp_wide(read_mixed(is_half, student, at, left, 0) - splat_wide(ours->largest));
        wide their = exp_wide(read_mixed(is_half, teacher, at, left, 0) - splat_wide(theirs->largest));
        write_mixed(is_half, slope, at, left, our * our_share - their * their_share);
    }
}

/* out[N] = KL of each row, and what the gradient needs again: ours[N], theirs[N]. */
void ahn_divergence(index_t N, index_t V, const void *student, const void *teacher, Softmax *ours, Softmax *theirs,
                    float *out, int is_half)
{
    const char *student_rows = student, *teacher_rows = teacher;
    index_t bytes = V * (is_half ? 2 : 4);
#pragma omp parallel for schedule(static)
    for (index_t n = 0; n < N; n++) {
        const void *s = student_rows + n * bytes, *t = teacher_rows + n * bytes;
        out[n] = is_half ? row_divergence(1, s, t, V, ours + n, theirs + n)
                         : row_divergence(0, s, t, V, ours + n, theirs + n);
    }
}

/* slope[N, V] = factor[n] * (softmax(student) - softmax(teacher)). */
void ahn_divergence_back(index_t N, index_t V, const void *student, const void *teacher, const Softmax *ours,
                         const Softmax *theirs, const float *factor, void *slope, int is_half)
{
    const char *student_rows = student, *teacher_rows = teacher;
    char *slopes = slope;
    index_t bytes = V * (is_half ? 2 : 4);
#pragma omp parallel for schedule(static)
    for (index_t n = 0; n < N; n++) {
        const void *s = student_rows + n * bytes, *t = teacher_rows + n * bytes;
        if (is_half) row_slope(1, s, t, V, ours + n, theirs + n, factor[n], slopes + n * bytes);
        else row_slope(0, s, t, V, ours + n, theirs + n, factor[n], slopes + n * bytes);
    }
}
