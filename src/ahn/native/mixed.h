/* Vectors of numbers that lie in memory as float32 or bfloat16, and are computed with in float32. */
#ifndef AHN_MIXED_H
#define AHN_MIXED_H

#include "kernels.h"

/* The head of a loop over `count` numbers, WIDE at a time, of which `left` are still to come. */
#define EACH(at, left, count) (index_t at = 0, left = count; at < count; at += WIDE, left -= WIDE)

DEFINE_MAX(max_wide, wide, signed_words)
DEFINE_EXP(exp_wide, wide, signed_words, max_wide)
DEFINE_SIGMOID(sigmoid_wide, wide, signed_words, exp_wide, max_wide)

INLINE float sum_wide(wide x)
{
    vec parts[WIDE / LANES], sum = {0};
    memcpy(parts, &x, sizeof parts);
    for (int n = 0; n < WIDE / LANES; n++) sum += parts[n];
    return sum_lanes(sum);
}

/* Rounds to the nearest number of bfloat16, of two to the even one; NaN stays NaN. */
INLINE halves narrow_bfloat16(wide x)
{
    words bits = (words)x, is_nan = (words)(x != x);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), halves);
}

/* Numbers `at` and following; where fewer than WIDE are left, `fill` behind the last. */
INLINE wide read_mixed(const int is_half, const void *from, index_t at, index_t left, float fill)
{
    const float *floats = (const float *)from + at;
    const uint16_t *shorts = (const uint16_t *)from + at;
    if (left >= WIDE && is_half) return widen_bfloat16(shorts);
    if (left >= WIDE) return *(const loose_wide *)floats;
    wide part = splat_wide(fill);
    for (int lane = 0; lane < left; lane++) {
        uint32_t bits = is_half ? (uint32_t)shorts[lane] << 16 : 0;
        float one;
        memcpy(&one, &bits, sizeof one);
        part[lane] = is_half ? one : floats[lane];
    }
    return part;
}

INLINE void write_mixed(const int is_half, void *to, index_t at, index_t left, wide x)
{
    float *floats = (float *)to + at;
    uint16_t *shorts = (uint16_t *)to + at;
    halves narrowed = narrow_bfloat16(x);
    if (left >= WIDE) {
        if (is_half) *(loose_halves *)shorts = narrowed;
        else *(loose_wide *)floats = x;
        return;
    }
    for (int lane = 0; lane < left; lane++) {
        if (is_half) shorts[lane] = narrowed[lane];
        else floats[lane] = x[lane];
    }
}

#endif
