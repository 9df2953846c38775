/* Rows of heads: what the matrix-state scan reads of a sequence and a head, whatever its dtype.
 *
 * Letters: S sequences, T tokens, H heads, G groups, K keys, V values.
 */
#include "../selective/lanes.h"

#define COLUMNS (2 * VL) /* values of an item in the forward */

enum { NO_DECAY, OF_HEAD, OF_KEY };

typedef struct {
    const char *data; /* NULL: absent */
    int64_t type, batch, step, head; /* strides in elements; what a head has is adjacent */
} Rows;

typedef struct {
    int64_t parts, sequences, length, heads, groups, keys, width;
    int64_t reverse, exclusive, shift, decay;
    const int64_t *cu;      /* (S + 1,) or NULL */
    const float *initial;   /* (S, H, K, V) or NULL */
    Rows q, k, v, g, write; /* (B, L, G, K), the same, (B, L, H, V), (B, L, H[, K]), (B, L, H) */
} Inputs;

typedef struct {
    int64_t sequence, head, group, batch, first, length, column;
    int lanes;
} Item;

typedef struct {
    int64_t keys, width, steps, chunks; /* of rows, whole vectors; of a chunk; kept states */
} Sizes;

static Item item_of(const Inputs *in, int64_t sequence, int64_t head, int64_t column) {
    int64_t left = in->width - column;
    Item found = {sequence,
                  head,
                  head / (in->heads / in->groups),
                  in->cu ? 0 : sequence,
                  in->cu ? in->cu[sequence] : 0,
                  in->cu ? in->cu[sequence + 1] - in->cu[sequence] : in->length,
                  column,
                  (int)(left < COLUMNS ? left : COLUMNS)};
    return found;
}

INLINE int64_t token_of(const Inputs *in, const Item *item, int64_t step) {
    return item->first + (in->reverse ? item->length - 1 - step : step);
}

INLINE void read_row(float *to, const Inputs *in, const Rows *rows, const Item *item,
                     int64_t head, int64_t step, int64_t column, int64_t count) {
    int64_t token = token_of(in, item, step);
    load(to, rows->data, rows->type,
         item->batch * rows->batch + token * rows->step + head * rows->head + column, (int)count);
}

/* exp of any number, relative error 1e-7 */
INLINE vf exp_of(vf v) {
    vf e = exp_of_minus_abs(v);
    return select(v < 0.f, e, 1.f / e);
}

/* q as it reads, k and the decays of some steps, rows of whole vectors */
static void read_keys(float *q, float *k, float *a, const Inputs *in, const Item *item,
                      const Sizes *size, int64_t start, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float *q_i = q + i * size->keys, *k_i = k + i * size->keys, *a_i = a + i * size->keys;
        int64_t from = start + i - in->shift;
        if (from < 0) memset(q_i, 0, sizeof(float) * (size_t)in->keys);
        else read_row(q_i, in, &in->q, item, item->group, from, 0, in->keys);
        read_row(k_i, in, &in->k, item, item->group, start + i, 0, in->keys);
        if (in->decay == OF_KEY) {
            memset(a_i, 0, sizeof(float) * (size_t)size->keys);
            read_row(a_i, in, &in->g, item, item->head, start + i, 0, in->keys);
            for (int64_t n = 0; n < size->keys; n += VL) *(vf *)(a_i + n) = exp_of(*(vf *)(a_i + n));
        } else {
            vf g = splat(0);
            if (in->decay == OF_HEAD)
                read_row((float *)&g, in, &in->g, item, item->head, start + i, 0, 1);
            g = exp_of(splat(g[0]));
            for (int64_t n = 0; n < size->keys; n += VL) *(vf *)(a_i + n) = g;
        }
    }
}

INLINE float write_of(const Inputs *in, const Item *item, int64_t step) {
    float write = 1.f;
    if (in->write.data) read_row(&write, in, &in->write, item, item->head, step, 0, 1);
    return write;
}

static int64_t longest(const Inputs *in) {
    int64_t most = in->cu ? 0 : in->length;
    for (int64_t s = 0; in->cu && s < in->sequences; s++)
        if (in->cu[s + 1] - in->cu[s] > most) most = in->cu[s + 1] - in->cu[s];
    return most;
}
