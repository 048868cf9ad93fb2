/* One slot of the rings of several layers, [G, places, size bytes] each: taken out, or written. */
#include "vector.h"

void ahn_take_slots(index_t L, index_t G, index_t places, index_t slot, index_t size, const char *const *rings,
                    char *to)
{
    for (index_t row = 0; row < L * G; row++)
        memcpy(to + row * size, rings[row / G] + (row % G * places + slot) * size, (size_t)size);
}

void ahn_put_slots(index_t L, index_t G, index_t places, index_t slot, index_t size, const char *from,
                   char *const *rings)
{
    for (index_t row = 0; row < L * G; row++)
        memcpy(rings[row / G] + (row % G * places + slot) * size, from + row * size, (size_t)size);
}
