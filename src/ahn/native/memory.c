/* A single token of decoding: written into the states of all layers, and answered from the state of one.
 *
 * Legend of shapes: X states, B batch, H query heads, G kv heads, K key size, V value size (a multiple of PANEL),
 * D hidden size.
 */
#include "kernels.h"

#define UNIT_EPSILON 1e-6f /* as in ahn.ops.norms: of a vector's squared length */
#define NORM_EPSILON 1e-5f /* of its mean square */

int ahn_panel(void) { return PANEL; }

#define MOST_PANELS 4 /* of a state that are written together: their sums stay in registers */

/* Columns of one state: what it holds for the key is taken out, then the value is written. Row by row, as it lies. */
INLINE void write_columns(const int panels, index_t K, index_t V, const float *k, const float *v, float decay,
                          float write, const float *old, float *state)
{
    vec sums[2 * MOST_PANELS];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * panels; i++) sums[i] = (vec){0};
    for (index_t d = 0; d < K; d++)
#pragma GCC unroll 8
        for (int i = 0; i < 2 * panels; i++) sums[i] += splat(k[d]) * load(old + d * V + i * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < 2 * panels; i++) sums[i] = splat(write) * (load(v + i * LANES) - splat(decay) * sums[i]);
    for (index_t d = 0; d < K; d++)
#pragma GCC unroll 8
        for (int i = 0; i < 2 * panels; i++)
            store(state + d * V + i * LANES, splat(decay) * load(old + d * V + i * LANES) + splat(k[d]) * sums[i]);
}

/* S <- decay S + k (write (v - decay S^T k))^T for each state [K, V]; see ahn.ops.write_delta_.
 *
 * State x begins at `places[x]`, in floats, or the states lie side by side where that is NULL. The former states are
 * those of `former`, which stay as they are, or of `state` where that is NULL. */
void ahn_write_delta(index_t states, index_t K, index_t V, const float *k, const float *v, const float *decay,
                     const float *write, const index_t *places, const float *former, float *state)
{
#pragma omp parallel for schedule(static)
    for (index_t x = 0; x < states; x++) {
        const float *key = k + x * K, *value = v + x * V;
        float factor = decay ? decay[x] : 1;
        for (index_t column = 0; column < V; column += MOST_PANELS * PANEL) {
            index_t place = (places ? places[x] : x * K * V) + column;
            const float *old = (former ? former : state) + place;
            switch ((V - column) / PANEL) {
            case 1: write_columns(1, K, V, key, value + column, factor, write[x], old, state + place); break;
            case 2: write_columns(2, K, V, key, value + column, factor, write[x], old, state + place); break;
            case 3: write_columns(3, K, V, key, value + column, factor, write[x], old, state + place); break;
            default: write_columns(4, K, V, key, value + column, factor, write[x], old, state + place); break;
            }
        }
    }
}

/* S <- decay S + step v k^T for each state [V, K]; see ahn.ops.write_state_space_, and above. */
void ahn_write_state_space(index_t states, index_t K, index_t V, const float *k, const float *v, const float *decay,
                           const float *step, const index_t *places, const float *former, float *state)
{
#pragma omp parallel for schedule(static)
    for (index_t x = 0; x < states; x++)
        for (index_t row = 0; row < V; row++) {
            index_t place = (places ? places[x] : x * V * K) + row * K;
            const float *old = (former ? former : state) + place;
            float factor = step[x] * v[x * V + row];
            for (index_t d = 0; d < K; d += LANES)
                store(state + place + d, splat(decay[x]) * load(old + d) + splat(factor) * load(k + x * K + d));
        }
}

INLINE float silu(float x) { return x / (1 + expf(-x)); }

/* What a query [K] reads from a state, [V]; it is brought to length `scale` first. With `key_first` the state is [K, V],
 * else [V, K]. */
static void read_state(const float *query, const float *state, index_t K, index_t V, float scale, int key_first,
                       float *to)
{
    float length = scale / sqrtf(dot(query, query, K) + UNIT_EPSILON);
    if (key_first) {
        for (index_t v = 0; v < V; v += PANEL) tile(1, K, query, K, state + v, V, to + v, V, 0);
        for (index_t v = 0; v < V; v += LANES) store(to + v, load(to + v) * splat(length));
    } else {
        for (index_t v = 0; v < V; v++) to[v] = dot(query, state + v * K, K) * length;
    }
}

/* What head h reads of its state, gated: with `per_head` by the length of that too. x[D] is what the layer read. */
static void read_gated(const Output *output, index_t h, index_t K, index_t V, index_t D, const float *query,
                       const float *x, const float *state, float *read)
{
    read_state(query, state, K, V, output->scale, output->key_first, read);
    float gate = dot(x, output->gate + h * D, D) + (output->gate_bias ? output->gate_bias[h] : 0);
    gate = silu(gate);
    if (output->per_head) gate /= sqrtf(dot(read, read, V) / (float)V + NORM_EPSILON);
    for (index_t v = 0; v < V; v++) read[v] *= gate;
}

void project_read(const Output *output, index_t h, index_t H, index_t V, const float *read, float *out)
{
    float normed[V], shrink = 1;
    if (!output->per_head) shrink = 1 / sqrtf(dot(read, read, H * V) / (float)(H * V) + NORM_EPSILON);
    const float *weight = output->norm + (output->per_head ? 0 : h * V);
    for (index_t v = 0; v < V; v++) normed[v] = read[h * V + v] * shrink * weight[v];
    const float *project = output->project + h * V * V;
    for (index_t v = 0; v < V; v += PANEL) tile(1, V, normed, V, project + v, V, out + v, V, 1);
}

const Output *joint_output(const Memory *memory)
{
    const Output *output = memory->kind == GATED ? memory->output : NULL;
    return output && !output->per_head ? output : NULL;
}

void add_answer(const Memory *memory, index_t h, index_t H, index_t K, index_t D, const float *query, const float *x,
                const float *state, float log_sum, float *read, float *local)
{
    if (memory->kind == LINEARIZED) {
        add_linearized(memory->output, h, K, K, D, query, x, state + h * (K + 1) * (K + 1), log_sum, local);
        return;
    }
    read_gated(memory->output, h, K, K, D, query, x, state + h * K * K, read + h * K);
    if (!joint_output(memory)) project_read(memory->output, h, H, K, read, local);
}

/* out [B, H, V] += what the memory answers to the queries [B, H, K], as Memory.read and Memory.project_out do in steps.
 *
 * x [B, D] is what the attention layer read; gate_weight [H, D] and gate_bias [H] (or NULL) give a gate per head,
 * through silu. With `per_head` the norm is taken per head before the gate, weight [V]; else over all heads after the
 * gate, weight [H, V]. With `key_first` states are [K, V], else [V, K]. o_proj is [H, V, V]. The states
 * of row b begin at `places[b]`, in floats, or lie side by side where that is NULL. Returns 0, or 1 where there is no
 * memory for the scratch. */
int ahn_decode_add(index_t B, index_t H, index_t K, index_t V, index_t D, const float *q, const float *x,
                   const float *state, const index_t *places, const float *gate_weight, const float *gate_bias,
                   const float *norm_weight, const float *o_proj, float scale, int per_head, int key_first, float *out)
{
    Output output = {gate_weight, gate_bias, norm_weight, o_proj, scale, per_head, key_first};
    float *read = scratch(B * H * V);
    if (!read) return 1;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (index_t row = 0; row < B * H; row++) {
            index_t place = places ? places[row / H] + row % H * K * V : row * K * V;
            read_gated(&output, row % H, K, V, D, q + row * K, x + row / H * D, state + place, read + row * V);
        }
#pragma omp for schedule(static)
        for (index_t row = 0; row < B * H; row++)
            project_read(&output, row % H, H, V, read + row / H * H * V, out + row * V);
    }
    free(read);
    return 0;
}
