/* Decoded tokens through decoder layers: norm, projections, rotation, attention, memory, output, gated MLP.
 *
 * All of it is one team of threads, which meets six times in a layer. What is cheap is done by every thread for itself
 * (norms, rotated queries), because meeting costs more.
 *
 * Legend of shapes: B tokens, each of a text of its own, D hidden size, H query heads, G kv heads, R = H / G, K size of
 * keys and values, I inner size.
 */
#include "kernels.h"

#define UNIT PANEL_ROWS /* rows of a weight that a thread multiplies at once */

#define PACKED 3 /* a kind of weights beside those of numbers */

/* A linear map [rows, columns] of one kind; `numbers` is a `packed` where it is PACKED. */
typedef struct {
    index_t kind, rows, columns;
    const void *numbers;
    const float *bias; /* [rows], or NULL */
} Weight;

typedef struct {
    const float *weight; /* NULL where there is no such norm */
    float epsilon;
} Norm;

/* What does not change from token to token. */
typedef struct {
    index_t hidden, heads, kv_heads, size, is_gelu;
    Norm first, second, query_norm, key_norm;
    Weight query, key, value, output, gate, up, down;
    Memory memory;
    float scaling;
} Layer;

/* One token: the ring of its layer, where it goes, and what else it reads. */
typedef struct {
    const float *x;                 /* [D] */
    float *out, *normed;            /* [D]; what the attention layer reads */
    float *projected;               /* [H + 2 G, K]: queries and keys, rotated, and values; or NULL */
    const float *cos, *sin;         /* [K] */
    const float *sink_cos, *sink_sin; /* that turn queries once more for sinks and anchors, or NULL */
    void *keys, *values;            /* [G, places, K] */
    index_t kind;                   /* of their numbers and of those of the anchors */
    index_t places, slot, used, sinks, seen;
    const void *anchor_keys, *anchor_values; /* [G, anchors, K] */
    const index_t *visible_from, *visible_until;
    index_t anchors;
    const float *state; /* of the kind of the memory, or NULL where nothing has left the window */
} Token;

static index_t rows_from(const Weight *w, index_t row) { return w->rows - row < UNIT ? w->rows - row : UNIT; }

static index_t units(const Weight *w) { return (w->rows + UNIT - 1) / UNIT; }

/* What a packed weight is to be multiplied by, as it takes it: x laid, [B, columns], and the sums of its groups. */
static void prepare(const Weight *w, index_t B, const float *x, float *laid)
{
    if (w->kind == PACKED) lay_vectors(w->numbers, B, x, laid + B * w->columns, laid);
}

/* out[B, UNIT] = rows of a weight from `unit` * UNIT on, times each x[B, columns] (+ bias), which `prepare` has laid. */
static void multiply(const Weight *w, index_t B, index_t unit, const float *x, const float *laid, float *out)
{
    index_t row = unit * UNIT, count = rows_from(w, row), D = w->columns;
    for (index_t b = 0; b < B; b += MOST_VECTORS) {
        index_t vectors = B - b < MOST_VECTORS ? B - b : MOST_VECTORS;
        const float *mine = x + b * D;
        float *to = out + b * UNIT;
        if (w->kind == PACKED) {
            const packed *numbers = w->numbers;
            multiply_panel(numbers, unit, vectors, laid + b * D, laid + B * D + b * numbers->groups, to);
        } else if (w->kind == FLOAT32) {
            multiply_rows(vectors, count, D, mine, (const float *)w->numbers + row * D, to, UNIT);
        } else {
            for (index_t i = 0; i < vectors * count; i++)
                to[i / count * UNIT + i % count] = multiply_half_row(
                    (const uint16_t *)w->numbers + (row + i % count) * D, mine + i / count * D, D);
        }
    }
    if (w->bias)
        for (index_t b = 0; b < B; b++)
            for (index_t i = 0; i < count; i++) out[b * UNIT + i] += w->bias[row + i];
}

static void normalize(const Norm *norm, const float *x, index_t size, float *to)
{
    float shrink = 1 / sqrtf(dot(x, x, size) / (float)size + norm->epsilon);
    for (index_t d = 0; d < size; d++) to[d] = norm->weight[d] * (x[d] * shrink);
}

/* x[K] turned, whose halves are rotated together. */
static void turn(const float *x, const float *cos, const float *sin, index_t K, float *to)
{
    for (index_t d = 0; d < K / 2; d++) {
        float left = x[d], right = x[d + K / 2];
        to[d] = left * cos[d] - right * sin[d];
        to[d + K / 2] = right * cos[d + K / 2] + left * sin[d + K / 2];
    }
}

INLINE vec activate(vec x, int is_gelu)
{
    /* gelu by tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) */
    vec y = is_gelu ? splat(1.5957691216f) * (x + splat(0.044715f) * x * x * x) : x;
    return x * sigmoid_vec(y);
}

/* x[K] as numbers of a kind, from place `at` of a ring on. */
static void put(const float *x, index_t K, index_t kind, void *ring, index_t at)
{
    if (kind == FLOAT32) memcpy((float *)ring + at, x, (size_t)K * sizeof(float));
    else
        for (index_t d = 0; d < K; d++) ((uint16_t *)ring)[at + d] = narrow(x[d], kind);
}

/* Puts the key and the value of the token into its slot, those of kv head g. */
static void store_token(const Layer *layer, const Token *token, index_t g, const float *keys, const float *values,
                        float *room)
{
    index_t K = layer->size, at = (g * token->places + token->slot) * K;
    const float *key = keys + g * K;
    if (layer->key_norm.weight) {
        normalize(&layer->key_norm, key, K, room);
        key = room;
    }
    turn(key, token->cos, token->sin, K, room + K);
    put(room + K, K, token->kind, token->keys, at);
    put(values + g * K, K, token->kind, token->values, at);
    if (token->projected) {
        float *to = token->projected + (layer->heads + g) * K;
        memcpy(to, room + K, (size_t)K * sizeof(float));
        memcpy(to + layer->kv_heads * K, values + g * K, (size_t)K * sizeof(float));
    }
}

/* Where a place of a ring of some kind lies. */
static const void *place(const void *ring, index_t kind, index_t at)
{
    return kind == FLOAT32 ? (const void *)((const float *)ring + at) : (const void *)((const uint16_t *)ring + at);
}

/* The segments that the token reads, with queries [H, K]; how many there are. */
static index_t lay_segments(const Layer *layer, const Token *token, const float *query, const float *sink_query,
                            Segment *segments)
{
    index_t K = layer->size, first = token->sink_cos ? token->sinks : 0, count = 0;
    Segment ring = {.query = query, .kind = token->kind, .key_place = K, .value_place = K};
    ring.key_head = ring.value_head = token->places * K;
    if (first) {
        segments[count] = ring;
        segments[count].query = sink_query;
        segments[count].keys = token->keys, segments[count].values = token->values, segments[count++].count = first;
    }
    segments[count] = ring;
    segments[count].keys = place(token->keys, token->kind, first * K);
    segments[count].values = place(token->values, token->kind, first * K);
    segments[count++].count = token->used - first;
    if (token->anchors) {
        Segment *anchors = segments + count++;
        *anchors = ring;
        anchors->query = sink_query;
        anchors->keys = token->anchor_keys, anchors->values = token->anchor_values;
        anchors->key_head = anchors->value_head = token->anchors * K;
        anchors->count = token->anchors;
        anchors->visible_from = token->visible_from, anchors->visible_until = token->visible_until;
    }
    return count;
}

/* Block of keys that holds the slot of the token. */
static index_t slot_block(const Token *token)
{
    index_t first = token->sink_cos ? token->sinks : 0;
    if (token->slot < first) return token->slot / KEY_BLOCK;
    return (first + KEY_BLOCK - 1) / KEY_BLOCK + (token->slot - first) / KEY_BLOCK;
}

/* Queries as they read the window, and as they read sinks and anchors, [H, K] each. */
static void turn_queries(const Layer *layer, const Token *token, const float *raw, float *query, float *sink_query)
{
    index_t K = layer->size;
    for (index_t h = 0; h < layer->heads; h++) {
        const float *mine = raw + h * K;
        if (layer->query_norm.weight) {
            normalize(&layer->query_norm, mine, K, sink_query + h * K);
            mine = sink_query + h * K;
        }
        float room[K];
        turn(mine, token->cos, token->sin, K, room);
        memcpy(query + h * K, room, sizeof room);
        if (token->sink_cos) turn(room, token->sink_cos, token->sink_sin, K, sink_query + h * K);
    }
}

/* What the threads share. */
typedef struct {
    float *projected[3]; /* queries [B, H, K], keys and values [B, G, K] */
    float *sums;         /* [B, G, blocks, R, K] */
    Tally *tallies;      /* [B, G, blocks, R] */
    float *attended;     /* [B, H, K] */
    float *read;         /* [B, H, K] */
    float *middle;       /* [B, D] */
    float *inner;        /* [B, I] */
} Shared;

/* Puts what a unit of a weight gave, block[B, UNIT], to its rows of out[B, rows]. */
static void lay_unit(const Weight *w, index_t B, index_t unit, const float *block, float *out)
{
    index_t row = unit * UNIT, count = rows_from(w, row);
    for (index_t b = 0; b < B; b++)
        memcpy(out + b * w->rows + row, block + b * UNIT, (size_t)count * sizeof(float));
}

/* What the tokens read of their rings, their anchors and the states, added up: attended[B, H, K]. `input` [B, D] is
 * what the layer reads, `query` and `sink_query` are [B, H, K], and `blocks` are those of the token that reads most. */
static void attend_tokens(const Layer *layer, index_t B, const Token *tokens, const Shared *shared, index_t blocks,
                          const float *input, const float *query, const float *sink_query, float *room)
{
    index_t D = layer->hidden, H = layer->heads, G = layer->kv_heads, R = H / G, K = layer->size;
#pragma omp for schedule(static)
    for (index_t unit = 0; unit < B * G * blocks; unit++) {
        index_t b = unit / blocks / G, g = unit / blocks % G, block = unit % blocks;
        const Token *token = tokens + b;
        Segment segments[3];
        index_t count = lay_segments(layer, token, query + b * H * K,
                                     (token->sink_cos ? sink_query : query) + b * H * K, segments);
        if (block >= key_blocks(segments, count)) continue;
        Call call = {.T = 1, .H = H, .R = R, .K = K, .V = K, .seen = token->seen, .scaling = layer->scaling};
        if (block == slot_block(token))
            store_token(layer, token, g, shared->projected[1] + b * G * K, shared->projected[2] + b * G * K, room);
        attend_block(&call, segments, block, 0, g, shared->tallies + unit * R, shared->sums + unit * R * K);
    }
#pragma omp for schedule(static)
    for (index_t unit = 0; unit < B * H; unit++) {
        index_t b = unit / H, h = unit % H, found = (b * G + h / R) * blocks * R + h % R;
        const Token *token = tokens + b;
        Segment segments[3];
        index_t own = key_blocks(segments, lay_segments(layer, token, NULL, NULL, segments));
        float *attended = shared->attended + unit * K;
        float log_sum = merge_blocks(shared->tallies + found, shared->sums + found * K, own, R, K, attended);
        if (token->state)
            add_answer(&layer->memory, h, H, K, D, query + unit * K, input + b * D, token->state,
                       log_sum, shared->read + b * H * K, attended);
    }
    const Output *joint = joint_output(&layer->memory);
    if (joint) {
#pragma omp for schedule(static)
        for (index_t unit = 0; unit < B * H; unit++)
            if (tokens[unit / H].state)
                project_read(joint, unit % H, H, K, shared->read + unit / H * H * K, shared->attended + unit * K);
    }
}

/* The work of one thread of the team, with scratch of its own: input [B, widest], three times an input and its sums
 * [2, B, widest], two times queries [B, H, K]. */
static void run(const Layer *layer, index_t B, const Token *tokens, const Shared *shared, index_t blocks,
                index_t widest, float *input)
{
    index_t D = layer->hidden, H = layer->heads, K = layer->size, step = B * widest;
    float *laid = input + step, *query = laid + 6 * step, *sink_query = query + B * H * K;
    float block[B * UNIT] __attribute__((aligned(ALIGNMENT))), other[B * UNIT] __attribute__((aligned(ALIGNMENT)));
    const Weight *maps[] = {&layer->query, &layer->key, &layer->value};
    for (index_t b = 0; b < B; b++) normalize(&layer->first, tokens[b].x, D, input + b * D);
    for (int i = 0; i < 3; i++) prepare(maps[i], B, input, laid + 2 * i * step);
    index_t first = units(maps[0]), second = first + units(maps[1]), last = second + units(maps[2]);
#pragma omp for schedule(static)
    for (index_t unit = 0; unit < last; unit++) {
        int i = (unit >= first) + (unit >= second);
        index_t mine = unit - (i == 0 ? 0 : i == 1 ? first : second);
        multiply(maps[i], B, mine, input, laid + 2 * i * step, block);
        lay_unit(maps[i], B, mine, block, shared->projected[i]);
    }
    for (index_t b = 0; b < B; b++)
        turn_queries(layer, tokens + b, shared->projected[0] + b * H * K, query + b * H * K, sink_query + b * H * K);
    attend_tokens(layer, B, tokens, shared, blocks, input, query, sink_query, laid);
#pragma omp master
    for (index_t b = 0; b < B; b++) {
        memcpy(tokens[b].normed, input + b * D, (size_t)D * sizeof(float));
        if (tokens[b].projected) memcpy(tokens[b].projected, query + b * H * K, (size_t)(H * K) * sizeof(float));
    }
    prepare(&layer->output, B, shared->attended, laid);
#pragma omp for schedule(static)
    for (index_t unit = 0; unit < units(&layer->output); unit++) {
        index_t row = unit * UNIT;
        multiply(&layer->output, B, unit, shared->attended, laid, block);
        for (index_t b = 0; b < B; b++)
            for (index_t i = 0; i < rows_from(&layer->output, row); i++)
                shared->middle[b * D + row + i] = tokens[b].x[row + i] + block[b * UNIT + i];
    }
    for (index_t b = 0; b < B; b++) normalize(&layer->second, shared->middle + b * D, D, input + b * D);
    prepare(&layer->gate, B, input, laid);
    prepare(&layer->up, B, input, laid + 2 * step);
#pragma omp for schedule(static)
    for (index_t unit = 0; unit < units(&layer->gate); unit++) {
        multiply(&layer->gate, B, unit, input, laid, block);
        multiply(&layer->up, B, unit, input, laid + 2 * step, other);
        for (index_t i = 0; i < B * UNIT; i += LANES)
            store(block + i, activate(load(block + i), (int)layer->is_gelu) * load(other + i));
        lay_unit(&layer->gate, B, unit, block, shared->inner);
    }
    prepare(&layer->down, B, shared->inner, laid);
#pragma omp for schedule(static)
    for (index_t unit = 0; unit < units(&layer->down); unit++) {
        index_t row = unit * UNIT;
        multiply(&layer->down, B, unit, shared->inner, laid, block);
        for (index_t b = 0; b < B; b++)
            for (index_t i = 0; i < rows_from(&layer->down, row); i++)
                tokens[b].out[row + i] = shared->middle[b * D + row + i] + block[b * UNIT + i];
    }
}

extern int omp_get_max_threads(void);
extern int omp_get_thread_num(void);

INLINE index_t to_line(index_t floats) { return (floats + LINE - 1) / LINE * LINE; }

INLINE index_t larger(index_t a, index_t b) { return a > b ? a : b; }

/* Scratch of a layer, in floats. */
typedef struct {
    index_t blocks, widest;
    index_t own;    /* of each thread */
    index_t shared; /* of all together */
} Room;

static Room room_of(const Layer *layer, index_t B, const Token *tokens)
{
    index_t D = layer->hidden, H = layer->heads, G = layer->kv_heads, K = layer->size, I = layer->gate.rows, blocks = 0;
    for (index_t b = 0; b < B; b++) {
        Segment segments[3];
        blocks = larger(blocks, key_blocks(segments, lay_segments(layer, tokens + b, NULL, NULL, segments)));
    }
    index_t widest = to_line(larger(larger(D, I), H * K));
    return (Room){.blocks = blocks,
                  .widest = widest,
                  .own = 7 * B * widest + to_line(2 * B * H * K),
                  .shared = to_line(B * H * blocks * K) + to_line(2 * B * H * blocks) + 3 * to_line(B * H * K) +
                            2 * to_line(B * G * K) + to_line(B * D) + to_line(B * I)};
}

static Shared lay_shared(const Layer *layer, index_t B, index_t blocks, float *memory)
{
    index_t D = layer->hidden, H = layer->heads, G = layer->kv_heads, K = layer->size;
    Shared shared = {.sums = memory};
    shared.tallies = (Tally *)(memory + to_line(B * H * blocks * K));
    shared.attended = (float *)shared.tallies + to_line(2 * B * H * blocks);
    shared.read = shared.attended + to_line(B * H * K);
    shared.projected[0] = shared.read + to_line(B * H * K);
    shared.projected[1] = shared.projected[0] + to_line(B * H * K);
    shared.projected[2] = shared.projected[1] + to_line(B * G * K);
    shared.middle = shared.projected[2] + to_line(B * G * K);
    shared.inner = shared.middle + to_line(B * D);
    return shared;
}

/* Takes B tokens of as many texts through `count` layers, of which each reads what the one before gave: tokens
 * [count, B]. Returns 0, or 1 where there is no memory for the scratch. */
int ahn_decode_layers(index_t count, index_t B, const Layer *const *layers, const Token *tokens, int threads)
{
    index_t own = 0, shared = 0;
    for (index_t i = 0; i < count; i++) {
        Room room = room_of(layers[i], B, tokens + i * B);
        own = larger(own, room.own), shared = larger(shared, room.shared);
    }
    int most = omp_get_max_threads();
    if (threads < 1 || threads > most) threads = most;
    float *memory = scratch(threads * own + shared);
    if (!memory) return 1;
#pragma omp parallel num_threads(threads)
    for (index_t i = 0; i < count; i++) {
        Room room = room_of(layers[i], B, tokens + i * B);
        Shared mine = lay_shared(layers[i], B, room.blocks, memory + threads * own);
        run(layers[i], B, tokens + i * B, &mine, room.blocks, room.widest, memory + omp_get_thread_num() * own);
    }
    free(memory);
    return 0;
}
