/* Softmax attention over segments of keys: sinks and anchors, which may have queries of their own, and the window.
 *
 * Legend of shapes: B batch, T queries, H query heads, G kv heads, R = H / G, K key size, V value size (a multiple of
 * PANEL). Query heads that share a kv head are read together, so that its keys and values pass by once.
 */
#include "kernels.h"

#define ROW_BLOCK 48  /* rows of queries that meet them: tokens times the query heads of a kv head */
#define ROWS_LAID 32  /* keys that a single query meets in float32 at the same time */
#define AHEAD 32      /* keys that are fetched ahead of those that a single query meets */

/* Turns scores into weights exp(score - best), in place, and returns by how much earlier sums shrink. */
INLINE float settle(float *scores, index_t width, Tally *tally)
{
    vec most = splat(-INFINITY);
    for (index_t j = 0; j < width; j += LANES) most = max_vec(most, load(scores + j));
    float best = max_lanes(most);
    if (best < tally->best) best = tally->best;
    if (best == -INFINITY) {
        memset(scores, 0, (size_t)width * sizeof(float));
        return 1;
    }
    vec sum = {0};
    for (index_t j = 0; j < width; j += LANES) {
        vec weight = exp_vec(load(scores + j) - splat(best));
        store(scores + j, weight);
        sum += weight;
    }
    float shrink = best > tally->best ? expf(tally->best - best) : 1;
    tally->total = tally->total * shrink + sum_lanes(sum);
    tally->best = best;
    return shrink;
}

/* The logarithm of the sum of exp(score) over all scores of a row. */
INLINE float log_of(const Tally *tally) { return tally->best + logf(tally->total); }

INLINE index_t rounded(index_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

/* --- many queries --------------------------------------------------------------------------------------------------*/

/* One panel of keys, transposed: [K, PANEL], zeros where there are no more. */
static void pack_panel(float *to, const float *keys, index_t step, index_t count, index_t K)
{
    for (index_t j = 0; j < PANEL; j++)
        for (index_t d = 0; d < K; d++) to[d * PANEL + j] = j < count ? keys[j * step + d] : 0;
}

/* First and last + 1 place of a segment that a query reads, whatever `visible_from` says. */
INLINE void span_of(const Segment *segment, index_t query, index_t *from, index_t *to)
{
    index_t low = 0, high = segment->count;
    if (!segment->visible_from) {
        low = query - segment->window + 1 - segment->first;
        high = query + 1 - segment->first;
    }
    *from = low < 0 ? 0 : low;
    *to = high > segment->count ? segment->count : high;
}

/* Hides what a query does not read among `width` scores of places from `start` on. */
static void hide(float *scores, const Segment *segment, index_t batch, index_t query, index_t start, index_t width)
{
    index_t from, to;
    span_of(segment, query, &from, &to);
    for (index_t j = 0; j < width; j++) {
        int seen = start + j >= from && start + j < to;
        if (seen && segment->visible_from) {
            index_t place = batch * segment->visible_batch + start + j;
            seen = segment->visible_from[place] <= query && query < segment->visible_until[place];
        }
        if (!seen) scores[j] = -INFINITY;
    }
}

/* A block of rows over one segment; row = token * R + head. */
static void read_segment(const Call *call, const Segment *segment, const float *panels, index_t b, index_t g,
                         index_t token, index_t tokens, float *queries, float *scores, Tally *tallies, float *sums)
{
    index_t rows = tokens * call->R, K = call->K, V = call->V, from, to, first_to, last_from;
    for (index_t row = 0; row < rows; row++) {
        const float *query = segment->query + b * call->query_batch + (g * call->R + row % call->R) * call->query_head +
                             (token + row / call->R) * call->query_token;
        for (index_t d = 0; d < K; d++) queries[row * K + d] = query[d] * call->scaling;
    }
    span_of(segment, call->seen + token, &from, &first_to);
    span_of(segment, call->seen + token + tokens - 1, &last_from, &to);
    const float *values = (const float *)segment->values + b * segment->value_batch + g * segment->value_head;
    for (index_t start = from / PANEL * PANEL; start < to; start += KEY_BLOCK) {
        index_t count = to - start < KEY_BLOCK ? to - start : KEY_BLOCK, width = rounded(count);
        product(rows, width, K, queries, K, panels + start * K, PANEL, K * PANEL, scores, KEY_BLOCK, 0);
        /* Only where a segment begins or ends for some of the rows is there anything to hide. */
        int whole = !segment->visible_from && start >= last_from && start + width <= first_to;
        for (index_t row = 0; row < rows; row++) {
            float *mine = scores + row * KEY_BLOCK;
            if (!whole) hide(mine, segment, b, call->seen + token + row / call->R, start, width);
            float shrink = settle(mine, width, tallies + row);
            if (shrink != 1)
                for (index_t v = 0; v < V; v += LANES)
                    store(sums + row * V + v, load(sums + row * V + v) * splat(shrink));
        }
        product(rows, V, count, scores, KEY_BLOCK, values + start * segment->value_place,
                segment->value_place, PANEL, sums, V, 1);
    }
}

/* Attention of many queries, and the logarithms of the sums of their weights, log_sum [B, T, H] or NULL; see
 * ahn/native/__init__.py. Returns 0, or 1 where there is no memory for the scratch. */
int ahn_attend(index_t B, index_t T, index_t H, index_t G, index_t K, index_t V, index_t query_batch,
               index_t query_head, index_t query_token, index_t seen, float scaling, const Segment *segments,
               index_t count, float *out, float *log_sum)
{
    Call call = {T, H, H / G, K, V, query_batch, query_head, query_token, seen, scaling};
    index_t block = ROW_BLOCK / call.R > 0 ? ROW_BLOCK / call.R : 1, blocks = (T + block - 1) / block;
    index_t places = 0, rows = block * call.R;
    for (index_t s = 0; s < count; s++) places += rounded(segments[s].count);
    float *panels = scratch(B * G * places * K);
    if (!panels) return 1;
    int failed = 0;
#pragma omp parallel
    {
        float *memory = scratch(rows * (K + KEY_BLOCK + V) + 2 * rows);
        float *queries = memory, *scores = queries + rows * K, *sums = scores + rows * KEY_BLOCK;
        Tally *tallies = (Tally *)(sums + rows * V);
        index_t begin = 0;
        for (index_t s = 0; s < count; begin += rounded(segments[s].count), s++) {
            const Segment *segment = segments + s;
            index_t per_head = rounded(segment->count) / PANEL;
#pragma omp for schedule(static)
            for (index_t unit = 0; unit < B * G * per_head; unit++) {
                index_t pair = unit / per_head, place = unit % per_head * PANEL;
                const float *keys =
                    (const float *)segment->keys + pair / G * segment->key_batch + pair % G * segment->key_head;
                pack_panel(panels + (pair * places + begin + place) * K, keys + place * segment->key_place,
                           segment->key_place, segment->count - place, K);
            }
        }
#pragma omp for schedule(dynamic)
        for (index_t unit = 0; unit < B * G * blocks; unit++) {
            if (!memory) {
                failed = 1;
                continue;
            }
            index_t pair = unit / blocks, b = pair / G, g = pair % G, token = unit % blocks * block;
            index_t tokens = T - token < block ? T - token : block;
            memset(sums, 0, (size_t)(rows * V) * sizeof(float));
            for (index_t row = 0; row < rows; row++) tallies[row] = (Tally){-INFINITY, 0};
            const float *mine = panels + pair * places * K;
            for (index_t s = 0; s < count; mine += rounded(segments[s].count) * K, s++)
                read_segment(&call, segments + s, mine, b, g, token, tokens, queries, scores, tallies, sums);
            for (index_t row = 0; row < tokens * call.R; row++) {
                index_t place = (b * T + token + row / call.R) * H + g * call.R + row % call.R;
                float *to = out + place * V;
                if (log_sum) log_sum[place] = log_of(tallies + row);
                vec share = splat(1 / tallies[row].total);
                for (index_t v = 0; v < V; v += LANES) store(to + v, load(sums + row * V + v) * share);
            }
        }
        free(memory);
    }
    free(panels);
    return failed;
}

/* --- a single query ------------------------------------------------------------------------------------------------*/

/* sums[heads, V] = keep * sums + weights[heads, count] values[count, V]; `heads` is a constant where this is inlined. */
INLINE void weigh(const int heads, const float *weights, const float *values, index_t step, index_t count, index_t V,
                  float *sums, float keep)
{
    for (index_t v = 0; v < V; v += PANEL) tile(heads, count, weights, KEY_BLOCK, values + v, step, sums + v, V, keep);
}

/* Rows as float32 side by side, `size` numbers each, a multiple of WIDE.
 *
 * Float32 is copied too: rows that pass in their order come from memory 1.6 times as fast as column by
 * column or eight at a time. */
static void lay_rows(index_t kind, const void *rows, index_t first, index_t step, index_t count, index_t size, float *to)
{
    const float *whole = (const float *)rows + first;
    const uint16_t *half = (const uint16_t *)rows + first;
    for (index_t j = 0; j < count; j++, whole += step, half += step)
        for (index_t d = 0; d < size; d += WIDE, to += WIDE) {
            if (kind == FLOAT32) {
                __builtin_prefetch(whole + AHEAD * step + d);
                *(loose_wide *)to = *(const loose_wide *)(whole + d);
            } else {
                __builtin_prefetch(half + AHEAD * step + d);
                *(loose_wide *)to = kind == BFLOAT16 ? widen_bfloat16(half + d) : widen(half + d);
            }
        }
}

/* A block of keys: the tallies and sums of the query heads of a kv head. */
INLINE void read_block(const int heads, const Segment *segment, index_t b, index_t g, index_t start, index_t count,
                       const Call *call, index_t head, Tally *tallies, float *sums)
{
    index_t K = call->K, V = call->V, row = segment->rows ? segment->rows[b] : b;
    index_t key = row * segment->key_batch + g * segment->key_head + start * segment->key_place;
    index_t value = row * segment->value_batch + g * segment->value_head + start * segment->value_place;
    const float *query = segment->query + (b * call->H + head) * K;
    float scores[MOST_VECTORS * KEY_BLOCK] __attribute__((aligned(ALIGNMENT)));
    index_t width = rounded(count);
    float room[ROWS_LAID * (K > V ? K : V)] __attribute__((aligned(ALIGNMENT)));
    for (index_t j = 0; j < count; j += ROWS_LAID, key += ROWS_LAID * segment->key_place) {
        index_t here = count - j < ROWS_LAID ? count - j : ROWS_LAID;
        lay_rows(segment->kind, segment->keys, key, segment->key_place, here, K, room);
        products(heads, query, K, room, K, here, K, 0, call->scaling, scores + j, KEY_BLOCK);
    }
    for (int i = 0; i < heads; i++) {
        float *mine = scores + i * KEY_BLOCK;
        if (segment->mask)
            for (index_t j = 0; j < count; j++) mine[j] += segment->mask[b * segment->mask_batch + start + j];
        for (index_t j = count; j < width; j++) mine[j] = -INFINITY;
        if (segment->visible_from) hide(mine, segment, b, call->seen, start, count);
        tallies[i] = (Tally){-INFINITY, 0};
        settle(mine, width, tallies + i);
    }
    for (index_t j = 0; j < count; j += ROWS_LAID, value += ROWS_LAID * segment->value_place) {
        index_t here = count - j < ROWS_LAID ? count - j : ROWS_LAID;
        lay_rows(segment->kind, segment->values, value, segment->value_place, here, V, room);
        weigh(heads, scores + j, room, V, here, V, sums, j > 0);
    }
}

index_t key_blocks(const Segment *segments, index_t count)
{
    index_t blocks = 0;
    for (index_t s = 0; s < count; s++) blocks += (segments[s].count + KEY_BLOCK - 1) / KEY_BLOCK;
    return blocks;
}

void attend_block(const Call *call, const Segment *segments, index_t block, index_t b, index_t g, Tally *tallies,
                  float *sums)
{
    index_t start = block * KEY_BLOCK, R = call->R, V = call->V;
    const Segment *segment = segments;
    for (; start >= segment->count; segment++) start -= (segment->count + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    index_t keys = (segment->counts ? segment->counts[b] : segment->count) - start;
    if (keys > KEY_BLOCK) keys = KEY_BLOCK;
    if (keys <= 0)
        for (index_t i = 0; i < R; i++) tallies[i] = (Tally){-INFINITY, 0};
    for (index_t i = 0; i < R && keys > 0; i += MOST_VECTORS) {
        Tally *found = tallies + i;
        float *to = sums + i * V;
        switch (R - i) {
        case 1: read_block(1, segment, b, g, start, keys, call, g * R + i, found, to); break;
        case 2: read_block(2, segment, b, g, start, keys, call, g * R + i, found, to); break;
        case 3: read_block(3, segment, b, g, start, keys, call, g * R + i, found, to); break;
        default: read_block(4, segment, b, g, start, keys, call, g * R + i, found, to); break;
        }
    }
}

float merge_blocks(const Tally *tallies, const float *sums, index_t blocks, index_t step, index_t V, float *out)
{
    Tally all = {-INFINITY, 0};
    for (index_t n = 0; n < blocks; n++) all.best = tallies[n * step].best > all.best ? tallies[n * step].best : all.best;
    memset(out, 0, (size_t)V * sizeof(float));
    for (index_t n = 0; n < blocks; n++) {
        if (tallies[n * step].best == -INFINITY) continue;
        float share = expf(tallies[n * step].best - all.best);
        all.total += share * tallies[n * step].total;
        for (index_t v = 0; v < V; v += LANES)
            store(out + v, load(out + v) + splat(share) * load(sums + n * step * V + v));
    }
    for (index_t v = 0; v < V; v += LANES) store(out + v, load(out + v) * splat(1 / all.total));
    return log_of(&all);
}

/* Attention of one query per row, q [B, H, K], out [B, H, V] and log_sum [B, H] or NULL; see ahn/native/__init__.py.
 * Returns as ahn_attend.
 *
 * Segments without `visible_from` are read whole. */
int ahn_attend_one(index_t B, index_t H, index_t G, index_t K, index_t V, index_t seen, float scaling,
                   const Segment *segments, index_t count, float *out, float *log_sum)
{
    Call call = {.T = 1, .H = H, .R = H / G, .K = K, .V = V, .seen = seen, .scaling = scaling};
    index_t R = call.R, blocks = key_blocks(segments, count);
    float *memory = scratch(B * H * blocks * (V + 2));
    if (!memory) return 1;
    float *sums = memory;
    Tally *tallies = (Tally *)(memory + B * H * blocks * V);
#pragma omp parallel for schedule(static)
    for (index_t unit = 0; unit < B * G * blocks; unit++) {
        index_t pair = unit / blocks;
        attend_block(&call, segments, unit % blocks, pair / G, pair % G, tallies + unit * R, sums + unit * R * V);
    }
    for (index_t row = 0; row < B * H; row++) {
        index_t first = row / R * blocks * R + row % R;
        float found = merge_blocks(tallies + first, sums + first * V, blocks, R, V, out + row * V);
        if (log_sum) log_sum[row] = found;
    }
    free(memory);
    return 0;
}
