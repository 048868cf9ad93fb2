/* A single token of linearised attention: written into the states of all layers, and answered from the state of one.
 *
 * Legend of shapes: L layers, B batch, H query heads, G kv heads, K key size, V value size (both multiples of LANES, V
 * of PANEL), D hidden size. Rows of a state have K + 1 numbers, so they begin anywhere.
 */
#include "kernels.h"

/* As in ahn.memories.linearized_attention. */
#define HIGHEST_TILT 60.f /* of a key's score with the mean query */
#define EMPTY 1e-12f      /* a sum of weights of at most this much: nothing has been written */

/* S <- old + weight [v; 1] [k; 1]^T for one state [V + 1, K + 1]. */
static void write_state(index_t K, index_t V, const float *k, const float *v, float weight, const float *old,
                        float *state)
{
    for (index_t row = 0; row <= V; row++, old += K + 1, state += K + 1) {
        float factor = row < V ? weight * v[row] : weight;
        for (index_t d = 0; d < K; d += LANES) store(state + d, load(old + d) + splat(factor) * load(k + d));
        state[K] = old[K] + factor;
    }
}

/* S <- S + w [v; 1] [k; 1]^T with w = gate exp(u . k / sqrt(K)), for each state [V + 1, K + 1] of all layers.
 *
 * k is [L, B, G, K], v [L, B, G, V], gate [L, B, H], and u, the mean queries, [L, H, K]. States lie as `places` [L B H]
 * and `former` say; see ahn_write_delta. */
void ahn_write_linearized(index_t L, index_t B, index_t H, index_t G, index_t K, index_t V, const float *k,
                          const float *v, const float *gate, const float *mean_query, const index_t *places,
                          const float *former, float *state)
{
#pragma omp parallel for schedule(static)
    for (index_t x = 0; x < L * B * H; x++) {
        index_t h = x % H, token = x / H * G + h / (H / G), place = places ? places[x] : x * (V + 1) * (K + 1);
        float tilt = dot(mean_query + (x / (B * H) * H + h) * K, k + token * K, K) / sqrtf((float)K);
        float weight = gate[x] * expf(tilt > HIGHEST_TILT ? HIGHEST_TILT : tilt);
        write_state(K, V, k + token * K, v + token * V, weight, (former ? former : state) + place, state + place);
    }
}

void add_linearized(const Linearized *weights, index_t h, index_t K, index_t V, index_t D, const float *query,
                    const float *x, const float *state, float log_sum, float *local)
{
    float beyond[K], both[V + LANES], gated[V], size = state[V * (K + 1) + K];
    if (size <= EMPTY) return;
    for (index_t d = 0; d < K; d++) beyond[d] = query[d] - weights->mean_query[h * K + d];
    products(1, beyond, K, state, K + 1, V + 1, K, 0, 1 / sqrtf((float)K), both, 0);
    float match = both[V] / size, own = dot(beyond, weights->share_key + h * K, K) / sqrtf((float)K);
    float gate = dot(x, weights->gate + h * D, D) + (weights->gate_bias ? weights->gate_bias[h] : 0);
    gate += own + weights->size_weight[h] * logf(size) + weights->match_weight[h] * match;
    gate -= weights->exact_weight[h] * log_sum;
    float share = 1 / (1 + expf(-gate));
    for (index_t v = 0; v < V; v++) {
        float far = (both[v] + (1 - match) * state[v * (K + 1) + K]) / size;
        gated[v] = share * (far - local[v]);
    }
    const float *project = weights->project + h * V * V;
    for (index_t v = 0; v < V; v += PANEL) tile(1, V, gated, V, project + v, V, local + v, V, 1);
}

/* local [B, H, V] += what the memory answers to the queries [B, H, K], as LinearizedAttention.read, `gated` and the
 * output projection [H, V, V] do in steps.
 *
 * x [B, D] is what the attention layer read; share_key [H, K], gate_weight [H, D] and gate_bias [H] (or NULL) are those
 * of the share, size_weight, match_weight and exact_weight are [H]. States [V + 1, K + 1] lie as `places` [B] says; see
 * ahn_decode_add. log_sum [B, H] is that of the scores of the exact tokens. */
void ahn_decode_add_linearized(index_t B, index_t H, index_t K, index_t V, index_t D, const float *q, const float *x,
                               const float *state, const index_t *places, const float *mean_query,
                               const float *share_key, const float *gate_weight, const float *gate_bias,
                               const float *size_weight, const float *match_weight, const float *exact_weight,
                               const float *o_proj, const float *log_sum, float *local)
{
    Linearized weights = {mean_query, share_key, gate_weight, gate_bias, size_weight,
                          match_weight, exact_weight, o_proj};
    index_t size = (V + 1) * (K + 1);
#pragma omp parallel for schedule(static)
    for (index_t row = 0; row < B * H; row++) {
        index_t place = places ? places[row / H] + row % H * size : row * size;
        add_linearized(&weights, row % H, K, V, D, q + row * K, x + row / H * D, state + place, log_sum[row],
                       local + row * V);
    }
}
