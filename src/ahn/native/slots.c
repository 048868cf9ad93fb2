/* One slot of the rings of several layers, [G, places, size] each: taken out, or written. */
#include "vector.h"

void ahn_take_slots(index_t L, index_t G, index_t places, index_t slot, index_t size, const float *const *rings,
                    float *to)
{
    for (index_t row = 0; row < L * G; row++)
        memcpy(to + row * size, rings[row / G] + (row % G * places + slot) * size, (size_t)size * sizeof(float));
}

void ahn_put_slots(index_t L, index_t G, index_t places, index_t slot, index_t size, const float *from,
                   float *const *rings)
{
    for (index_t row = 0; row < L * G; row++)
        memcpy(rings[row / G] + (row % G * places + slot) * size, from + row * size, (size_t)size * sizeof(float));
}
