/* Gradients of the recurrences. Each chunk is computed again from the state before it, and kept in the nearest cache
 * while the chunks are walked from the last to the first. A slope is the gradient of what its name says.
 *
 * Legend of shapes: B batch, T tokens, H query heads, G kv heads, K key size, V value size (a multiple of PANEL),
 * C = CHUNK tokens, W = K rounded up to PANEL.
 */
#include "recurrence.h"

/* What one chunk of a head has computed on the way forward. */
typedef struct {
    float *state;  /* [K, V], before the chunk */
    float *update; /* [C, V] */
    float *decay;  /* [C, C], after token j, up to and including token i; 0 for j > i */
    float *system; /* [C, C], strictly lower: decay * k k^T, without the write strength */
} Kept;

/* Scratch of one head on the way back; W is K rounded up to PANEL, its columns behind K are zeros. */
typedef struct {
    float *query, *key;                          /* [C, W] */
    float *value, *to_out, *to_update;           /* [C, V] */
    float *key_columns;                          /* [K, C] */
    float *update_columns;                       /* [V, C] */
    float *to_state, *next;                      /* [K, V] */
    float *state_columns, *to_state_columns;     /* [V, W] */
    float *scores, *to_scores, *square, *turned; /* [C, C] */
    float *rows, *read, *to_query, *to_key;      /* [C, W] */
    Gates gates;
    float until_end[CHUNK];
    float to_log_decay[CHUNK], to_write[CHUNK];
    index_t K, V, W;
    int is_delta;
} Back;

static index_t kept_size(index_t K, index_t V) { return K * V + CHUNK * V + 2 * CHUNK * CHUNK; }

static Kept kept_at(float *memory, index_t chunk, index_t K, index_t V)
{
    float *state = memory + chunk * kept_size(K, V), *update = state + K * V, *decay = update + CHUNK * V;
    return (Kept){state, update, decay, decay + CHUNK * CHUNK};
}

static float *lay_out_back(Back *back, index_t K, index_t V, int is_delta)
{
    index_t W = (K + PANEL - 1) / PANEL * PANEL;
    Part parts[] = {
        {&back->query, CHUNK * W},          {&back->key, CHUNK * W},        {&back->rows, CHUNK * W},
        {&back->read, CHUNK * W},           {&back->to_query, CHUNK * W},   {&back->to_key, CHUNK * W},
        {&back->key_columns, CHUNK * K},    {&back->value, CHUNK * V},      {&back->to_out, CHUNK * V},
        {&back->to_update, CHUNK * V},      {&back->update_columns, CHUNK * V}, {&back->to_state, K * V},
        {&back->next, K * V},               {&back->state_columns, V * W},  {&back->to_state_columns, V * W},
        {&back->scores, CHUNK * CHUNK},     {&back->to_scores, CHUNK * CHUNK}, {&back->square, CHUNK * CHUNK},
        {&back->turned, CHUNK * CHUNK},
    };
    back->K = K, back->V = V, back->W = W, back->is_delta = is_delta;
    return lay_out(parts, sizeof parts / sizeof *parts);
}

/* Rows of a head, `width` numbers apart, with zeros behind the last token and behind `size`. */
static void gather_wide(float *to, index_t width, const float *from, index_t count, index_t size, index_t step)
{
    memset(to, 0, (size_t)(CHUNK * width) * sizeof(float));
    for (index_t t = 0; t < count; t++) memcpy(to + t * width, from + t * step, (size_t)size * sizeof(float));
}

/* to[j, i] = from[i, j]; columns of `to` behind `rows` are zeros. */
static void transpose(float *to, index_t width, const float *from, index_t rows, index_t columns, index_t step)
{
    for (index_t j = 0; j < columns; j++) {
        for (index_t i = 0; i < rows; i++) to[j * width + i] = from[i * step + j];
        for (index_t i = rows; i < width; i++) to[j * width + i] = 0;
    }
}

/* to[t] = factor * from[t] * each[t] for all rows. */
static void scaled_rows(float *to, const float *from, const float *each, float factor, index_t width)
{
    for (int t = 0; t < CHUNK; t++)
        for (index_t d = 0; d < width; d += LANES)
            store(to + t * width + d, load(from + t * width + d) * splat(factor * each[t]));
}

/* Adds factor * each[t] * x[t] to the rows of `to`. */
static void add_rows(float *to, const float *x, const float *each, float factor, index_t width)
{
    for (int t = 0; t < CHUNK; t++)
        for (index_t d = 0; d < width; d += LANES)
            store(to + t * width + d, load(to + t * width + d) + load(x + t * width + d) * splat(factor * each[t]));
}

/* Computes a chunk again; keys and values are there. Its state is read from `kept` and the next one written to `after`,
 * unless that is NULL. */
static void redo_chunk(Back *back, const Kept *kept, float *after)
{
    index_t K = back->K, V = back->V, W = back->W;
    const float *log_decay = back->gates.log_decay;
    for (int i = 0; i < CHUNK; i++) {
        for (int j = 0; j < CHUNK; j += LANES)
            store(kept->decay + i * CHUNK + j, exp_vec(splat(log_decay[i]) - load(log_decay + j)));
        for (int j = i + 1; j < CHUNK; j++) kept->decay[i * CHUNK + j] = 0;
    }
    scaled_rows(kept->update, back->value, back->gates.write, 1, V);
    transpose(back->key_columns, CHUNK, back->key, CHUNK, K, W);
    if (back->is_delta) {
        product(CHUNK, CHUNK, K, back->key, W, back->key_columns, CHUNK, PANEL, kept->system, CHUNK, 0);
        for (int i = 0; i < CHUNK; i++) {
            for (int j = 0; j < i; j++) {
                kept->system[i * CHUNK + j] *= kept->decay[i * CHUNK + j];
                back->square[i * CHUNK + j] = back->gates.write[i] * kept->system[i * CHUNK + j];
            }
            for (int j = i; j < CHUNK; j++) kept->system[i * CHUNK + j] = 0;
        }
        scaled_rows(back->rows, back->key, back->gates.write, -1, W);
        scaled_rows(back->rows, back->rows, back->gates.since_start, 1, W);
        product(CHUNK, V, K, back->rows, W, kept->state, V, PANEL, kept->update, V, 1);
        solve(back->square, kept->update, V);
    }
    if (!after) return;
    scaled_rows(back->to_update, kept->update, back->until_end, 1, V);
    memcpy(after, kept->state, (size_t)(K * V) * sizeof(float));
    product(K, V, CHUNK, back->key_columns, CHUNK, back->to_update, V, PANEL, after, V,
            back->gates.since_start[CHUNK - 1]);
}

/* x = (I + diag(write) system)^-T x, from the last row to the first. */
static void solve_turned(const float *system, const float *write, float *x, index_t V)
{
    for (int i = CHUNK - 2; i >= 0; i--)
        for (index_t v = 0; v < V; v += PANEL) {
            float *row = x + i * V + v;
            vec left = load(row), right = load(row + LANES);
            for (int j = i + 1; j < CHUNK; j++) {
                vec factor = splat(write[j] * system[j * CHUNK + i]);
                left -= factor * load(x + j * V + v);
                right -= factor * load(x + j * V + v + LANES);
            }
            store(row, left);
            store(row + LANES, right);
        }
}

/* The slopes of running sums of log decays: x holds, for each decay from token j to token i, its slope times itself. */
static void add_decay_slopes(float *to_log_decay, const float *x)
{
    for (int i = 0; i < CHUNK; i++)
        for (int j = 0; j < i; j++) {
            to_log_decay[i] += x[i * CHUNK + j];
            to_log_decay[j] -= x[i * CHUNK + j];
        }
}

/* From the outputs: slopes of queries and updates, of keys so far, and of the state so far. */
static void back_from_reads(Back *back, const Kept *kept)
{
    index_t K = back->K, V = back->V, W = back->W;
    transpose(back->state_columns, W, kept->state, K, V, V);
    transpose(back->to_state_columns, W, back->to_state, K, V, V);
    transpose(back->update_columns, CHUNK, kept->update, CHUNK, V, V);
    transpose(back->key_columns, CHUNK, back->key, CHUNK, K, W);
    product(CHUNK, CHUNK, K, back->query, W, back->key_columns, CHUNK, PANEL, back->scores, CHUNK, 0);
    product(CHUNK, CHUNK, V, back->to_out, V, back->update_columns, CHUNK, PANEL, back->to_scores, CHUNK, 0);
    for (int n = 0; n < CHUNK * CHUNK; n++) {
        back->scores[n] *= kept->decay[n];
        back->square[n] = back->to_scores[n] * back->scores[n];
        back->to_scores[n] *= kept->decay[n];
    }
    add_decay_slopes(back->to_log_decay, back->square);

    transpose(back->turned, CHUNK, back->scores, CHUNK, CHUNK, CHUNK);
    product(CHUNK, V, CHUNK, back->turned, CHUNK, back->to_out, V, PANEL, back->to_update, V, 0);
    scaled_rows(back->rows, back->key, back->until_end, 1, W);
    product(CHUNK, V, K, back->rows, W, back->to_state, V, PANEL, back->to_update, V, 1);

    product(CHUNK, W, V, back->to_out, V, back->state_columns, W, PANEL, back->read, W, 0);
    scaled_rows(back->to_query, back->read, back->gates.since_start, 1, W);
    for (int t = 0; t < CHUNK; t++) back->to_log_decay[t] += dot(back->to_query + t * W, back->query + t * W, K);
    product(CHUNK, W, CHUNK, back->to_scores, CHUNK, back->key, W, PANEL, back->to_query, W, 1);

    product(CHUNK, W, V, kept->update, V, back->to_state_columns, W, PANEL, back->read, W, 0);
    scaled_rows(back->to_key, back->read, back->until_end, 1, W);
    float end = back->gates.since_start[CHUNK - 1] * dot(kept->state, back->to_state, K * V);
    for (int t = 0; t < CHUNK; t++) {
        float own = dot(back->to_key + t * W, back->key + t * W, K);
        back->to_log_decay[t] -= own;
        end += own;
    }
    back->to_log_decay[CHUNK - 1] += end;
    transpose(back->turned, CHUNK, back->to_scores, CHUNK, CHUNK, CHUNK);
    product(CHUNK, W, CHUNK, back->turned, CHUNK, back->query, W, PANEL, back->to_key, W, 1);

    memcpy(back->next, back->to_state, (size_t)(K * V) * sizeof(float));
    scaled_rows(back->rows, back->query, back->gates.since_start, 1, W);
    transpose(back->key_columns, CHUNK, back->rows, CHUNK, K, W);
    product(K, V, CHUNK, back->key_columns, CHUNK, back->to_out, V, PANEL, back->next, V,
            back->gates.since_start[CHUNK - 1]);
}

/* From the updates of the delta rule: slopes of values and gates, and the rest of those of keys and state. */
static void back_from_updates(Back *back, const Kept *kept)
{
    index_t K = back->K, V = back->V, W = back->W;
    solve_turned(kept->system, back->gates.write, back->to_update, V);
    product(CHUNK, W, V, back->to_update, V, back->state_columns, W, PANEL, back->read, W, 0);
    scaled_rows(back->read, back->read, back->gates.since_start, 1, W);
    product(CHUNK, CHUNK, V, back->to_update, V, back->update_columns, CHUNK, PANEL, back->to_scores, CHUNK, 0);
    for (int t = 0; t < CHUNK; t++) {
        float erased = dot(back->read + t * W, back->key + t * W, K), own = 0;
        for (int j = 0; j < CHUNK; j++) {
            float slope = -back->to_scores[t * CHUNK + j] * kept->system[t * CHUNK + j];
            own += slope;
            back->square[t * CHUNK + j] = back->gates.write[t] * slope;
            back->to_scores[t * CHUNK + j] *= j < t ? -back->gates.write[t] * kept->decay[t * CHUNK + j] : 0;
        }
        back->to_write[t] = dot(back->to_update + t * V, back->value + t * V, V) - erased + own;
        back->to_log_decay[t] -= back->gates.write[t] * erased;
    }
    add_decay_slopes(back->to_log_decay, back->square);
    add_rows(back->to_key, back->read, back->gates.write, -1, W);
    product(CHUNK, W, CHUNK, back->to_scores, CHUNK, back->key, W, PANEL, back->to_key, W, 1);
    transpose(back->turned, CHUNK, back->to_scores, CHUNK, CHUNK, CHUNK);
    product(CHUNK, W, CHUNK, back->turned, CHUNK, back->key, W, PANEL, back->to_key, W, 1);

    scaled_rows(back->rows, back->key, back->gates.since_start, -1, W);
    scaled_rows(back->rows, back->rows, back->gates.write, 1, W);
    transpose(back->key_columns, CHUNK, back->rows, CHUNK, K, W);
    product(K, V, CHUNK, back->key_columns, CHUNK, back->to_update, V, PANEL, back->next, V, 1);
}

/* The slopes of a chunk whose rows are there; those of the state after it become those of the state before it. */
static void back_chunk(Back *back, const Kept *kept)
{
    memset(back->to_log_decay, 0, sizeof back->to_log_decay);
    back_from_reads(back, kept);
    if (back->is_delta) {
        back_from_updates(back, kept);
    } else {
        for (int t = 0; t < CHUNK; t++)
            back->to_write[t] = dot(back->to_update + t * back->V, back->value + t * back->V, back->V);
    }
    float *before = back->to_state;
    back->to_state = back->next, back->next = before;
}

/* Addresses of a call; see `ahn_scan_back`. */
typedef struct {
    index_t T, H, G;
    const float *q, *k, *v, *log_decay, *write, *to_out;
    float *to_q, *to_k, *to_v, *to_log_decay, *to_write;
} Slopes;

static void read_chunk(Back *back, const Slopes *call, index_t b, index_t h, index_t t, index_t count)
{
    index_t H = call->H, G = call->G, g = h / (H / G), row = b * call->T + t;
    gather_wide(back->key, back->W, call->k + (row * G + g) * back->K, count, back->K, G * back->K);
    gather_wide(back->value, back->V, call->v + (row * G + g) * back->V, count, back->V, G * back->V);
    const float *log_decay = call->log_decay ? call->log_decay + row * H + h : NULL;
    read_gates(&back->gates, log_decay, call->write + row * H + h, count, H);
    float whole = back->gates.log_decay[CHUNK - 1];
    for (int t = 0; t < CHUNK; t++) back->until_end[t] = expf(whole - back->gates.log_decay[t]);
}

/* Puts the slopes of a chunk where they belong; those of keys and values are added to what other heads gave. */
static void write_slopes(Back *back, const Slopes *call, index_t b, index_t h, index_t t, index_t count)
{
    index_t H = call->H, G = call->G, g = h / (H / G), K = back->K, V = back->V, row = b * call->T + t;
    float sum = 0;
    for (index_t i = CHUNK - 1; i >= count; i--) sum += back->to_log_decay[i];
    for (index_t i = count - 1; i >= 0; i--) {
        index_t gate = (row + i) * H + h;
        float *to_k = call->to_k + ((row + i) * G + g) * K, *to_v = call->to_v + ((row + i) * G + g) * V;
        memcpy(call->to_q + gate * K, back->to_query + i * back->W, (size_t)K * sizeof(float));
        for (index_t d = 0; d < K; d++) to_k[d] += back->to_key[i * back->W + d];
        for (index_t v = 0; v < V; v += LANES)
            store(to_v + v, load(to_v + v) + splat(back->gates.write[i]) * load(back->to_update + i * V + v));
        call->to_write[gate] = back->to_write[i];
        sum += back->to_log_decay[i];
        if (call->log_decay) call->to_log_decay[gate] = call->log_decay[gate] < LEAST_LOG_DECAY ? 0 : sum;
    }
}

static void back_head(Back *back, const Slopes *call, index_t b, index_t h, float *memory, const float *state,
                      float *to_state)
{
    index_t K = back->K, V = back->V, T = call->T, H = call->H, chunks = (T + CHUNK - 1) / CHUNK;
    float *first = kept_at(memory, 0, K, V).state;
    for (index_t d = 0; d < K; d++)
        for (index_t x = 0; x < V; x++) {
            index_t place = back->is_delta ? d * V + x : x * K + d;
            first[d * V + x] = state[place];
            back->to_state[d * V + x] = to_state[place];
        }
    for (index_t c = 0; c < chunks; c++) {
        Kept kept = kept_at(memory, c, K, V);
        index_t t = c * CHUNK, count = T - t < CHUNK ? T - t : CHUNK;
        read_chunk(back, call, b, h, t, count);
        redo_chunk(back, &kept, c + 1 < chunks ? kept_at(memory, c + 1, K, V).state : NULL);
    }
    for (index_t c = chunks - 1; c >= 0; c--) {
        Kept kept = kept_at(memory, c, K, V);
        index_t t = c * CHUNK, count = T - t < CHUNK ? T - t : CHUNK, row = (b * T + t) * H + h;
        read_chunk(back, call, b, h, t, count);
        gather_wide(back->query, back->W, call->q + row * K, count, K, H * K);
        gather_wide(back->to_out, V, call->to_out + row * V, count, V, H * V);
        back_chunk(back, &kept);
        write_slopes(back, call, b, h, t, count);
    }
    for (index_t d = 0; d < K; d++)
        for (index_t x = 0; x < V; x++) to_state[back->is_delta ? d * V + x : x * K + d] = back->to_state[d * V + x];
}

/* Slopes of both recurrences; see ahn/native/__init__.py. Returns 0, or 1 where there is no memory for the scratch.
 *
 * Tensors are those of `ahn_scan`, `state` that before the first token. `to_out` [B, T, H, V] and `to_state`, in the
 * layout of the state, are the slopes of its results; `to_state` becomes that of the first state. `to_k` and `to_v` are
 * added to. */
int ahn_scan_back(index_t B, index_t T, index_t H, index_t G, index_t K, index_t V, const float *q, const float *k,
                  const float *v, const float *log_decay, const float *write, const float *state, const float *to_out,
                  float *to_state, float *to_q, float *to_k, float *to_v, float *to_log_decay, float *to_write,
                  int is_delta)
{
    Slopes call = {T, H, G, q, k, v, log_decay, write, to_out, to_q, to_k, to_v, to_log_decay, to_write};
    int failed = 0;
#pragma omp parallel
    {
        Back back;
        float *memory = lay_out_back(&back, K, V, is_delta);
        float *chunks = scratch((T + CHUNK - 1) / CHUNK * kept_size(K, V));
#pragma omp for schedule(dynamic)
        for (index_t unit = 0; unit < B * G; unit++) { /* heads that share keys add to the same slopes */
            if (!memory || !chunks) {
                failed = 1;
                continue;
            }
            index_t b = unit / G, heads = H / G;
            for (index_t h = unit % G * heads; h < (unit % G + 1) * heads; h++)
                back_head(&back, &call, b, h, chunks, state + (b * H + h) * K * V, to_state + (b * H + h) * K * V);
        }
        free(chunks);
        free(memory);
    }
    return failed;
}
