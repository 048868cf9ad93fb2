/* What both directions of the recurrences share: their chunks of C = CHUNK tokens. */
#ifndef AHN_RECURRENCE_H
#define AHN_RECURRENCE_H

#include "vector.h"

#define CHUNK 32
#define LEAST_LOG_DECAY -104.f /* exp of it is 0, and differences of running sums keep their digits */

/* A part of the scratch of one head: where its address goes, and its numbers. */
typedef struct {
    float **at;
    index_t size;
} Part;

/* Scratch for all parts, one behind the other; NULL where there is no memory. */
INLINE float *lay_out(const Part *parts, size_t count)
{
    index_t size = 0;
    for (size_t n = 0; n < count; n++) size += parts[n].size;
    float *memory = scratch(size), *next = memory;
    if (!memory) return NULL;
    for (size_t n = 0; n < count; n++) *parts[n].at = next, next += parts[n].size;
    return memory;
}

/* Gates of the tokens of a chunk. */
typedef struct {
    float log_decay[CHUNK];   /* running sums since the chunk began */
    float since_start[CHUNK]; /* exp of them */
    float write[CHUNK];
} Gates;

/* Decays of a chunk; tokens behind the last neither decay nor write. */
INLINE void read_gates(Gates *gates, const float *log_decay, const float *write, index_t count, index_t step)
{
    float sum = 0;
    for (index_t t = 0; t < CHUNK; t++) {
        if (t < count && log_decay) {
            float one = log_decay[t * step];
            sum += one < LEAST_LOG_DECAY ? LEAST_LOG_DECAY : one;
        }
        gates->log_decay[t] = sum;
        gates->since_start[t] = expf(sum);
        gates->write[t] = t < count ? write[t * step] : 0;
    }
}

/* update = (I + system)^-1 update, row by row; the system is strictly lower triangular. */
INLINE void solve(const float *system, float *update, index_t V)
{
    for (int i = 1; i < CHUNK; i++)
        for (index_t v = 0; v < V; v += PANEL) {
            float *row = update + i * V + v;
            vec left = load(row), right = load(row + LANES);
            for (int j = 0; j < i; j++) {
                vec factor = splat(system[i * CHUNK + j]);
                left -= factor * load(update + j * V + v);
                right -= factor * load(update + j * V + v + LANES);
            }
            store(row, left);
            store(row + LANES, right);
        }
}

#endif
