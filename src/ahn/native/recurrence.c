/* The recurrences in chunks of tokens, one head after the other, with everything of a chunk in the nearest cache.
 *
 * Legend of shapes: B batch, T tokens, H query heads, G kv heads, K key size, V value size (a multiple of PANEL),
 * C = CHUNK tokens.
 */
#include "recurrence.h"

/* Scratch of one head. */
typedef struct {
    float *query, *key;         /* [C, K] */
    float *key_columns;         /* [K, C] */
    float *scores, *system;     /* [C, C] */
    float *update;              /* [C, V] */
    float *state;               /* [K, V] */
    Gates gates;
} Head;

static float *lay_out_head(Head *head, index_t K, index_t V)
{
    Part parts[] = {
        {&head->query, CHUNK * K},      {&head->key, CHUNK * K},        {&head->key_columns, CHUNK * K},
        {&head->scores, CHUNK * CHUNK}, {&head->system, CHUNK * CHUNK}, {&head->update, CHUNK * V},
        {&head->state, K * V},
    };
    return lay_out(parts, sizeof parts / sizeof *parts);
}

/* Rows of a head, zeros behind the last token. */
static void gather(float *to, const float *from, index_t count, index_t size, index_t step)
{
    for (index_t t = 0; t < count; t++) memcpy(to + t * size, from + t * step, (size_t)size * sizeof(float));
    memset(to + count * size, 0, (size_t)((CHUNK - count) * size) * sizeof(float));
}

/* x[i, j] *= factor[i] * (decay after token j, up to and including token i); 0 for j > i and, without `diagonal`, for
 * j = i. */
static void weigh(float *x, const Head *head, const float *factor, int diagonal)
{
    for (int i = 0; i < CHUNK; i++) {
        float own = factor ? factor[i] : 1;
        for (int j = 0; j < CHUNK; j += LANES) {
            vec decay = exp_vec(splat(head->gates.log_decay[i]) - load(head->gates.log_decay + j));
            store(x + i * CHUNK + j, load(x + i * CHUNK + j) * decay * splat(own));
        }
        for (int j = i + diagonal; j < CHUNK; j++) x[i * CHUNK + j] = 0;
    }
}

static void scale_rows(float *x, const float *factor, index_t V)
{
    for (int t = 0; t < CHUNK; t++)
        for (index_t v = 0; v < V; v += LANES) store(x + t * V + v, load(x + t * V + v) * splat(factor[t]));
}

/* What the chunk writes, `update`: the corrections of the delta rule, or the plain values. Overwrites the keys. */
static void find_update(Head *head, index_t K, index_t V, int is_delta)
{
    if (!is_delta) {
        scale_rows(head->update, head->gates.write, V);
        return;
    }
    product(CHUNK, CHUNK, K, head->key, K, head->key_columns, CHUNK, PANEL, head->system, CHUNK, 0);
    weigh(head->system, head, head->gates.write, 0);
    float erase[CHUNK];
    for (int t = 0; t < CHUNK; t++) erase[t] = -head->gates.write[t] * head->gates.since_start[t];
    scale_rows(head->update, head->gates.write, V);
    for (int t = 0; t < CHUNK; t++)
        for (index_t d = 0; d < K; d++) head->key[t * K + d] *= erase[t];
    product(CHUNK, V, K, head->key, K, head->state, V, PANEL, head->update, V, 1);
    solve(head->system, head->update, V);
}

/* Reads and writes a chunk: out [count, V] rows lie `out_step` apart. Overwrites the queries. */
static void run_chunk(Head *head, index_t count, index_t K, index_t V, int is_delta, float *out, index_t out_step)
{
    for (int t = 0; t < CHUNK; t++)
        for (index_t d = 0; d < K; d++) head->key_columns[d * CHUNK + t] = head->key[t * K + d];
    product(CHUNK, CHUNK, K, head->query, K, head->key_columns, CHUNK, PANEL, head->scores, CHUNK, 0);
    weigh(head->scores, head, NULL, 1);
    find_update(head, K, V, is_delta);
    for (int t = 0; t < CHUNK; t++)
        for (index_t d = 0; d < K; d++) head->query[t * K + d] *= head->gates.since_start[t];
    product(count, V, K, head->query, K, head->state, V, PANEL, out, out_step, 0);
    product(count, V, CHUNK, head->scores, CHUNK, head->update, V, PANEL, out, out_step, 1);
    float until_end[CHUNK];
    for (int t = 0; t < CHUNK; t++) until_end[t] = expf(head->gates.log_decay[CHUNK - 1] - head->gates.log_decay[t]);
    scale_rows(head->update, until_end, V);
    product(K, V, CHUNK, head->key_columns, CHUNK, head->update, V, PANEL, head->state, V,
            head->gates.since_start[CHUNK - 1]);
}

/* Both recurrences; see ahn/native/__init__.py. Returns 0, or 1 where there is no memory for the scratch.
 *
 * q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] and the gates [B, T, H] lie densely, `log_decay` may be NULL; the
 * state [B, H, K, V] of the delta rules, or [B, H, V, K] where `is_delta` is 0, is overwritten; out is [B, T, H, V]. */
int ahn_scan(index_t B, index_t T, index_t H, index_t G, index_t K, index_t V, const float *q, const float *k,
             const float *v, const float *log_decay, const float *write, float *state, float *out, int is_delta)
{
    int failed = 0;
#pragma omp parallel
    {
        Head head;
        float *memory = lay_out_head(&head, K, V);
#pragma omp for schedule(dynamic)
        for (index_t unit = 0; unit < B * H; unit++) {
            index_t b = unit / H, h = unit % H, g = h / (H / G);
            float *mine = state + unit * K * V;
            if (!memory) {
                failed = 1;
                continue;
            }
            for (index_t d = 0; d < K; d++)
                for (index_t x = 0; x < V; x++) head.state[d * V + x] = mine[is_delta ? d * V + x : x * K + d];
            for (index_t t = 0; t < T; t += CHUNK) {
                index_t count = T - t < CHUNK ? T - t : CHUNK, row = b * T + t;
                gather(head.query, q + (row * H + h) * K, count, K, H * K);
                gather(head.key, k + (row * G + g) * K, count, K, G * K);
                gather(head.update, v + (row * G + g) * V, count, V, G * V);
                read_gates(&head.gates, log_decay ? log_decay + row * H + h : NULL, write + row * H + h, count, H);
                run_chunk(&head, count, K, V, is_delta, out + (row * H + h) * V, H * V);
            }
            for (index_t d = 0; d < K; d++)
                for (index_t x = 0; x < V; x++) mine[is_delta ? d * V + x : x * K + d] = head.state[d * V + x];
        }
        free(memory);
    }
    return failed;
}
