// attention: decode over a paged cache with online softmax, rows one after the other.
//
// Built twice, -DKV_BITS=16 and 32: attention_f16 and attention_f32. An item of work is one row of q with up to HEAD_LANES
// of the query heads that share a kv head, so that a key is read once for all of them. Processes:
//
//   plan -> read keys   -> cut -> score -> soften -> weigh -> write
//        -> read values -> cut ---------------------> /
#include "hls_math.h"
#include "memory.h"

#if KV_BITS == 16
#define ATTENTION attention_f16
#elif KV_BITS == 32
#define ATTENTION attention_f32
#else
#error "KV_BITS is 16 or 32"
#endif

// What is asked of every item.
struct shape_t {
    int tokens, heads, kv_heads, head_dim, page_size, max_pages, pages, sequences, window;
};

// Keys that lie one after the other in a page; no keys and `is_last` for an item without any.
struct run_t {
    int64_t start;  // element of the cache
    int32_t keys;
    bool is_last;
};

// One item: how many keys its heads see, and the number that they are if they see none.
struct item_t {
    int32_t token, head, heads, keys;
    float fill;
};

constexpr int READERS = 6;  // processes that want to know the items

struct heads_t {
    float head[HEAD_LANES];
};
struct query_t {
    float lane[HEAD_LANES][LANES];
};

// Process: finds out which keys each row sees, whether its pages exist, and where they lie.
template <typename Runs, typename Items>
static void plan(const int32_t *block_table, const int32_t *seq_ids, const int32_t *positions, shape_t shape, int64_t k_offset,
                 int64_t v_offset, Runs &key_runs, Runs &value_runs, Items (&items)[READERS]) {
    const int group = shape.heads / shape.kv_heads;
ROWS:
    for (int token = 0; token < shape.tokens; token++) {
        const int sequence = seq_ids[token], position = positions[token];
        const bool is_known = sequence >= 0 && sequence < shape.sequences && position >= 0 &&
                              position < int64_t(shape.max_pages) * shape.page_size;
        const int first = is_known && shape.window && position >= shape.window ? position - shape.window + 1 : 0;
        const int first_page = first / shape.page_size, last_page = is_known ? position / shape.page_size : -1;
        bool has_keys = is_known;
    PAGES:
        for (int page = first_page; page <= last_page; page++) {
#pragma HLS pipeline II=1
            const int at = block_table[int64_t(sequence) * shape.max_pages + page];
            has_keys &= at >= 0 && at < shape.pages;
        }
    KV_HEADS:
        for (int kv_head = 0; kv_head < shape.kv_heads; kv_head++) {
        HEADS:
            for (int head = 0; head < group; head += HEAD_LANES) {
                item_t item;
                item.token = token;
                item.head = kv_head * group + head;
                item.heads = group - head < HEAD_LANES ? group - head : HEAD_LANES;
                item.keys = has_keys ? position - first + 1 : 0;
                item.fill = sequence < 0 ? 0 : float_of(0x7FC00000);
            TO_READERS:
                for (int i = 0; i < READERS; i++) {
#pragma HLS unroll
                    items[i].write(item);
                }
                if (!has_keys) {
                    key_runs.write({0, 0, true});
                    value_runs.write({0, 0, true});
                    continue;
                }
            RUNS:
                for (int page = first_page; page <= last_page; page++) {
#pragma HLS pipeline II=1
                    const int at = block_table[int64_t(sequence) * shape.max_pages + page];
                    const int from = page == first_page ? first % shape.page_size : 0;
                    const int to = page == last_page ? position % shape.page_size : shape.page_size - 1;
                    run_t run;
                    const int64_t start = ((int64_t(at) * shape.kv_heads + kv_head) * shape.page_size + from) * shape.head_dim;
                    run.keys = to - from + 1;
                    run.is_last = page == last_page;
                    run.start = k_offset + start;
                    key_runs.write(run);
                    run.start = v_offset + start;
                    value_runs.write(run);
                }
            }
        }
    }
}

// Process: the beats of planned runs, each run one burst; hands the runs on to whoever cuts the beats.
static void read_runs(const beat_t *cache, hls::stream<run_t> &runs, int items, int head_dim, hls::stream<run_t> &cuts,
                      hls::stream<beat_t> &beats) {
READ_ITEMS:
    for (int item = 0; item < items; item++) {
        run_t run;
        do {
            run = runs.read();
            cuts.write(run);
            read_run<KV_BITS>(cache, run.start, int64_t(run.keys) * head_dim, beats);
        } while (!run.is_last);
    }
}

// Process: keys (or values) as words of floats.
static void cut_runs(hls::stream<run_t> &runs, hls::stream<beat_t> &beats, int items, int head_dim, hls::stream<word_t> &words) {
CUT_ITEMS:
    for (int item = 0; item < items; item++) {
        run_t run;
        do {
            run = runs.read();
            cut_run<KV_BITS>(beats, run.start, run.keys, head_dim, words);
        } while (!run.is_last);
    }
}

// Processes: q of each item, head by head.
static void read_queries(const beat_t *q, int64_t offset, int64_t stride, hls::stream<item_t> &work, int items, int head_dim,
                         hls::stream<beat_t> &beats) {
READ_QUERIES:
    for (int i = 0; i < items; i++) {
        const item_t item = work.read();
        for (int head = 0; head < item.heads; head++) {
            read_run<32>(q, offset + item.token * stride + int64_t(item.head + head) * head_dim, head_dim, beats);
        }
    }
}

static void cut_queries(hls::stream<beat_t> &beats, int64_t offset, int64_t stride, hls::stream<item_t> &work, int items,
                        int head_dim, hls::stream<word_t> &words) {
CUT_QUERIES:
    for (int i = 0; i < items; i++) {
        const item_t item = work.read();
        for (int head = 0; head < item.heads; head++) {
            cut_run<32>(beats, offset + item.token * stride + int64_t(item.head + head) * head_dim, 1, head_dim, words);
        }
    }
}

// Process: the score of every key and head, scaled and capped.
static void score(hls::stream<word_t> &queries, hls::stream<word_t> &keys, hls::stream<item_t> &work, int items, int head_dim,
                  float scale, float softcap, hls::stream<heads_t> &scores) {
    const int words = up(head_dim, LANES);
    query_t q[MAX_HEAD_WORDS];
#pragma HLS aggregate variable=q
    float part[HEAD_LANES][MAX_HEAD_WORDS];
#pragma HLS array_partition variable=part complete
SCORE_ITEMS:
    for (int i = 0; i < items; i++) {
        const item_t item = work.read();
    LOAD_HEADS:
        for (int head = 0; head < HEAD_LANES; head++) {
        LOAD_QUERY:
            for (int w = 0; w < words; w++) {
#pragma HLS pipeline II=1
                word_t word = {};
                if (head < item.heads) word = queries.read();
                for (int lane = 0; lane < LANES; lane++) q[w].lane[head][lane] = word.lane[lane];
            }
        }
        int w = 0;
    SCORE_KEYS:
        for (int64_t step = 0; step < int64_t(item.keys) * words; step++) {
#pragma HLS pipeline II=1
            const word_t key = keys.read();
            heads_t score;
        HEAD_PRODUCTS:
            for (int head = 0; head < HEAD_LANES; head++) {
#pragma HLS unroll
                float product[LANES];
                for (int lane = 0; lane < LANES; lane++) product[lane] = q[w].lane[head][lane] * key.lane[lane];
                // One place for each word of a key: no sum waits for the one before.
                part[head][w] = sum_of(product);
                float level[LANES];
                for (int p = 0; p < LANES; p++) level[p] = p < words ? part[head][p] : 0;
                const float scaled = sum_of(level) * scale;
                score.head[head] = softcap > 0 ? softcap * hls::tanh(scaled / softcap) : scaled;
            }
            w = w + 1 == words ? 0 : w + 1;
            if (w == 0) scores.write(score);
        }
    }
}
static_assert(MAX_HEAD_WORDS <= LANES, "the words of a key are added by one tree");

// Process: running softmax, KEY_BLOCK keys at a time: the recurrence over maximum and sum is passed once per block. Of each
// block leave what the sums so far are multiplied by, then the weight of each key.
static void soften(hls::stream<heads_t> &scores, hls::stream<item_t> &work, int items, hls::stream<heads_t> &weights,
                   hls::stream<heads_t> &totals) {
SOFTEN_ITEMS:
    for (int i = 0; i < items; i++) {
        const item_t item = work.read();
        float largest[HEAD_LANES], total[HEAD_LANES];
        for (int head = 0; head < HEAD_LANES; head++) {
            largest[head] = -3.4028234663852886e38f;
            total[head] = 0;
        }
    KEY_BLOCKS:
        for (int first = 0; first < item.keys; first += KEY_BLOCK) {
            const int keys = item.keys - first < KEY_BLOCK ? item.keys - first : KEY_BLOCK;
            float block[KEY_BLOCK][HEAD_LANES];
#pragma HLS array_partition variable=block complete
            heads_t rescale;
        BLOCK_SCORES:
            for (int k = 0; k < KEY_BLOCK; k++) {
#pragma HLS pipeline II=1
                heads_t score = {};
                if (k < keys) score = scores.read();
                for (int head = 0; head < HEAD_LANES; head++) block[k][head] = score.head[head];
            }
        // 4 steps a head: a block of scores takes head_dim cycles to come in, and exp is dear.
        BLOCK_HEADS:
            for (int head = 0; head < HEAD_LANES; head++) {
#pragma HLS pipeline II=4
                float top = largest[head];
                for (int k = 0; k < KEY_BLOCK; k++) {
                    if (k < keys && block[k][head] > top) top = block[k][head];
                }
                float term[LANES];
                for (int k = 0; k < KEY_BLOCK; k++) {
                    term[k] = k < keys ? hls::exp(block[k][head] - top) : 0;
                    block[k][head] = term[k];
                }
                rescale.head[head] = hls::exp(largest[head] - top);
                total[head] = total[head] * rescale.head[head] + sum_of(term);
                largest[head] = top;
            }
            weights.write(rescale);
        BLOCK_WEIGHTS:
            for (int k = 0; k < KEY_BLOCK; k++) {
#pragma HLS pipeline II=1
                heads_t weight;
                for (int head = 0; head < HEAD_LANES; head++) weight.head[head] = block[k][head];
                weights.write(weight);
            }
        }
        heads_t sum;
        for (int head = 0; head < HEAD_LANES; head++) sum.head[head] = total[head];
        totals.write(sum);
    }
}
static_assert(KEY_BLOCK == LANES, "the weights of a block are added by one tree");
static_assert(KEY_BLOCK % KEY_PARTIALS == 0, "partial sums take turns evenly");

// Process: weighted sums of values. Keys take turns in KEY_PARTIALS sums per number, so that a sum comes back only after
// KEY_PARTIALS * head_dim / 16 cycles, longer than an adder and a multiplier from head_dim 48 on.
static void weigh(hls::stream<heads_t> &weights, hls::stream<heads_t> &totals, hls::stream<word_t> &values,
                  hls::stream<item_t> &work, int items, int head_dim, hls::stream<word_t> &results) {
    const int words = up(head_dim, LANES);
    query_t sum[KEY_PARTIALS][MAX_HEAD_WORDS];
#pragma HLS array_partition variable=sum complete dim=1
#pragma HLS aggregate variable=sum
WEIGH_ITEMS:
    for (int i = 0; i < items; i++) {
        const item_t item = work.read();
    CLEAR:
        for (int w = 0; w < words; w++) {
#pragma HLS pipeline II=1
            for (int part = 0; part < KEY_PARTIALS; part++) sum[part][w] = {};
        }
    VALUE_BLOCKS:
        for (int first = 0; first < item.keys; first += KEY_BLOCK) {
            const heads_t rescale = weights.read();
            heads_t weight = {};
            int k = 0, w = 0;
        VALUES:
            for (int step = 0; step < KEY_BLOCK * words; step++) {
#pragma HLS pipeline II=1
#pragma HLS dependence variable=sum inter distance=8 true
                if (w == 0) weight = weights.read();
                word_t value = {};
                if (first + k < item.keys) value = values.read();
                query_t &running = sum[k % KEY_PARTIALS][w];
                for (int head = 0; head < HEAD_LANES; head++) {
#pragma HLS unroll
                    const float factor = k < KEY_PARTIALS ? rescale.head[head] : 1;
                    for (int lane = 0; lane < LANES; lane++) {
                        running.lane[head][lane] =
                            running.lane[head][lane] * factor + weight.head[head] * value.lane[lane];
                    }
                }
                w = w + 1 == words ? 0 : w + 1;
                if (w == 0) k++;
            }
        }
        const heads_t total = totals.read();
    RESULT_HEADS:
        for (int head = 0; head < item.heads; head++) {
        RESULT:
            for (int w = 0; w < words; w++) {
#pragma HLS pipeline II=1
                word_t word;
                for (int lane = 0; lane < LANES; lane++) {
                    const float all = (sum[0][w].lane[head][lane] + sum[1][w].lane[head][lane]) +
                                      (sum[2][w].lane[head][lane] + sum[3][w].lane[head][lane]);
                    word.lane[lane] = item.keys ? all / total.head[head] : item.fill;
                }
                results.write(word);
            }
        }
    }
}
static_assert(KEY_PARTIALS == 4, "the tree above");

// Process: heads of results to y.
static void write_heads(hls::stream<word_t> &results, hls::stream<item_t> &work, int items, int head_dim, beat_t *y,
                        int64_t offset, int64_t stride) {
WRITE_ITEMS:
    for (int i = 0; i < items; i++) {
        const item_t item = work.read();
        for (int head = 0; head < item.heads; head++) {
            write_row(results, y, offset + item.token * stride + int64_t(item.head + head) * head_dim, head_dim);
        }
    }
}

// y [tokens, heads, head_dim]; pages [pages, kv_heads, page_size, head_dim]. Offsets and strides in numbers; `scale` is never
// 0 here, `softcap` and `window` 0 mean none.
extern "C" void ATTENTION(const beat_t *q, int64_t q_offset, int64_t q_stride, const beat_t *k_pages, int64_t k_offset,
                          const beat_t *v_pages, int64_t v_offset, const int32_t *block_table, const int32_t *seq_ids,
                          const int32_t *positions, beat_t *y, int64_t y_offset, int64_t y_stride, float scale, float softcap,
                          int window, int tokens, int heads, int kv_heads, int head_dim, int page_size, int pages,
                          int sequences, int max_pages) {
#pragma HLS interface m_axi port=q bundle=q offset=slave
#pragma HLS interface m_axi port=k_pages bundle=k offset=slave latency=64 max_read_burst_length=64 num_read_outstanding=16
#pragma HLS interface m_axi port=v_pages bundle=v offset=slave latency=64 max_read_burst_length=64 num_read_outstanding=16
#pragma HLS interface m_axi port=block_table bundle=table offset=slave
#pragma HLS interface m_axi port=seq_ids bundle=table offset=slave
#pragma HLS interface m_axi port=positions bundle=table offset=slave
#pragma HLS interface m_axi port=y bundle=y offset=slave
#pragma HLS dataflow
    const shape_t shape = {tokens, heads, kv_heads, head_dim, page_size, max_pages, pages, sequences, window};
    const int items = tokens * kv_heads * up(heads / kv_heads, HEAD_LANES);
    FIFO(run_t, key_runs, RUN_FIFO);
    FIFO(run_t, value_runs, RUN_FIFO);
    FIFO(run_t, key_cuts, RUN_FIFO);
    FIFO(run_t, value_cuts, RUN_FIFO);
    FIFOS(item_t, work, READERS, 4);
    FIFO(beat_t, query_beats, WORD_FIFO);
    FIFO(word_t, queries, WORD_FIFO);
    FIFO(beat_t, key_beats, WEIGHT_FIFO);
    FIFO(beat_t, value_beats, WEIGHT_FIFO);
    FIFO(word_t, keys, WORD_FIFO);
    FIFO(word_t, values, WORD_FIFO);
    FIFO(heads_t, scores, KEY_BLOCK);
    FIFO(heads_t, weights, 2 * (KEY_BLOCK + 1));
    FIFO(heads_t, totals, 2);
    FIFO(word_t, results, WORD_FIFO);
    DATAFLOW
    PROCESS(plan(block_table, seq_ids, positions, shape, k_offset, v_offset, key_runs, value_runs, work));
    PROCESS(read_queries(q, q_offset, q_stride, work[0], items, head_dim, query_beats));
    PROCESS(cut_queries(query_beats, q_offset, q_stride, work[1], items, head_dim, queries));
    PROCESS(read_runs(k_pages, key_runs, items, head_dim, key_cuts, key_beats));
    PROCESS(cut_runs(key_cuts, key_beats, items, head_dim, keys));
    PROCESS(read_runs(v_pages, value_runs, items, head_dim, value_cuts, value_beats));
    PROCESS(cut_runs(value_cuts, value_beats, items, head_dim, values));
    PROCESS(score(queries, keys, work[2], items, head_dim, scale, softcap, scores));
    PROCESS(soften(scores, work[3], items, weights, totals));
    PROCESS(weigh(weights, totals, values, work[4], items, head_dim, results));
    PROCESS(write_heads(results, work[5], items, head_dim, y, y_offset, y_stride));
}
