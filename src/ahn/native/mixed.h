/* Vectors of numbers that lie in memory as float32 or bfloat16, and are computed with in float32. */
#ifndef AHN_MIXED_H
#define AHN_MIXED_H

#include "kernels.h"

typedef uint16_t short_halves __attribute__((vector_size(2 * LANES)));
typedef short_halves loose_short_halves __attribute__((aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

INLINE vec widen_vec(short_halves x) { return (vec)(__builtin_convertvector(x, uvec) << 16); }

/* Rounds to the nearest, of two to the even one; NaN stays NaN. */
INLINE short_halves narrow_vec(vec x)
{
    uvec bits = (uvec)x, is_nan = (uvec)(x != x);
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), short_halves);
}

/* Numbers `at` and following; where fewer than LANES are left, `fill` behind the last. */
INLINE vec read_mixed(const int is_half, const void *from, index_t at, index_t left, float fill)
{
    const float *floats = (const float *)from + at;
    const uint16_t *shorts = (const uint16_t *)from + at;
    if (left >= LANES) return is_half ? widen_vec(*(const loose_short_halves *)shorts) : load(floats);
    float part[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t bits = is_half && lane < left ? (uint32_t)shorts[lane] << 16 : 0;
        memcpy(part + lane, &bits, sizeof bits);
        if (!is_half && lane < left) part[lane] = floats[lane];
        if (lane >= left) part[lane] = fill;
    }
    return load(part);
}

INLINE void write_mixed(const int is_half, void *to, index_t at, index_t left, vec x)
{
    float *floats = (float *)to + at;
    uint16_t *shorts = (uint16_t *)to + at;
    short_halves narrowed = narrow_vec(x);
    if (left >= LANES) {
        if (is_half) *(loose_short_halves *)shorts = narrowed;
        else store(floats, x);
        return;
    }
    for (int lane = 0; lane < left; lane++) {
        if (is_half) shorts[lane] = narrowed[lane];
        else floats[lane] = x[lane];
    }
}

#endif
