// Causal attention over a paged cache, and writing into it.
//
// One kernel for prompts and single tokens: the rows of a work item are (token, query head) pairs that share a KV head,
// the cache is read where it lies, in tiles of 64 slots counted from the sequence's first. A row's result is a function
// of its query and its cache alone, whatever chunk or batch it is computed in: the same bits (online softmax,
// arXiv:1805.02867, with a fixed order of tiles).
#include <omp.h>

#include <algorithm>
#include <limits>

#include "ops.h"
#include "scratch.h"
#include "tile.h"

namespace prismserve {
namespace {

constexpr int64_t SLOTS = 64;  // of the cache in one tile
constexpr int64_t ITEM_ROWS = 96;  // of a work item; more only where more heads share a KV head
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

struct Cache {
    void* base;
    int element;
    int64_t group_stride, side_stride, slot_stride, head_stride;  // elements
    int64_t block_tokens, kv_heads, width;
};

struct Step {
    const float* q;
    int64_t token_stride, heads;
    const int32_t *tables, *starts, *queries, *cached;
    int64_t table_width, sequences;
    float scale;
    float* out;  // [tokens, heads, width]
    float* lse;  // [tokens, heads] or null
};

// Some query tokens of one sequence and one KV head.
struct Item {
    int64_t sequence, head, first, last;
};

void transpose(Floats (&x)[8]) {
    Floats a[8];
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], Ints{0, 8, 1, 9, 4, 12, 5, 13});
        a[2 * i + 1] = __builtin_shuffle(x[2 * i], x[2 * i + 1], Ints{2, 10, 3, 11, 6, 14, 7, 15});
    }
    Floats b[8];
    for (int half = 0; half < 8; half += 4)
        for (int i = 0; i < 2; ++i) {
            b[half + 2 * i] = __builtin_shuffle(a[half + i], a[half + i + 2], Ints{0, 1, 8, 9, 4, 5, 12, 13});
            b[half + 2 * i + 1] = __builtin_shuffle(a[half + i], a[half + i + 2], Ints{2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (int i = 0; i < 4; ++i) {
        x[i] = __builtin_shuffle(b[i], b[i + 4], Ints{0, 1, 2, 3, 8, 9, 10, 11});
        x[i + 4] = __builtin_shuffle(b[i], b[i + 4], Ints{4, 5, 6, 7, 12, 13, 14, 15});
    }
}

template <typename T>
class Attention {
  public:
    Attention(const Cache& cache, const Step& step, float* memory) : cache(cache), step(step) {
        const int64_t rows = rows_max(cache, step);
        padded = (cache.width + PANEL - 1) / PANEL * PANEL;
        keys = memory;
        values = keys + SLOTS * padded;
        scores = values + SLOTS * padded;
        sums = scores + rows * SLOTS;
        queries = sums + rows * padded;
        most = queries + rows * padded;
        total = most + rows;
        std::fill(values, values + SLOTS * padded, 0.0f);
    }

    static int64_t rows_max(const Cache& cache, const Step& step) {
        return std::max(ITEM_ROWS, step.heads / cache.kv_heads);
    }

    static int64_t floats(const Cache& cache, const Step& step) {
        const int64_t padded = (cache.width + PANEL - 1) / PANEL * PANEL;
        return 2 * SLOTS * padded + rows_max(cache, step) * (SLOTS + 2 * padded + 2);
    }

    void run(const Item& item) {
        const int64_t shared = step.heads / cache.kv_heads, width = cache.width;
        const int64_t rows = (item.last - item.first) * shared;
        const int64_t earlier = step.cached[item.sequence] - step.queries[item.sequence];
        const int64_t start = step.starts[item.sequence];
        for (int64_t r = 0; r < rows; ++r) {
            const float* q = step.q + (start + item.first + r / shared) * step.token_stride +
                             (item.head * shared + r % shared) * width;
            std::copy(q, q + width, queries + r * padded);
        }
        std::fill(sums, sums + rows * padded, 0.0f);
        std::fill(most, most + rows, HIDDEN);
        std::fill(total, total + rows, 0.0f);
        const int64_t seen = earlier + item.last;  // slots the last token sees
        for (int64_t slot = 0; slot < seen; slot += SLOTS) {
            const int64_t live = std::min(SLOTS, seen - slot);
            fill(item, slot, live);
            for (int64_t first = 0; first < rows; first += TILE_ROWS)
                with_rows(static_cast<int>(std::min<int64_t>(TILE_ROWS, rows - first)), [&](auto count) {
                    tile<decltype(count)::value>(first, shared, earlier + item.first - slot, live);
                });
        }
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t token = start + item.first + r / shared, head = item.head * shared + r % shared;
            float* out = step.out + (token * step.heads + head) * width;
            for (int64_t c = 0; c < width; ++c) out[c] = sums[r * padded + c] / total[r];
            if (step.lse != nullptr) step.lse[token * step.heads + head] = most[r] + std::log(total[r]);
        }
    }

  private:
    // Keys of slots [slot, slot + live) as panels [width][16], values as rows [live][padded]; the rest as zeros.
    void fill(const Item& item, int64_t slot, int64_t live) {
        const int32_t* table = step.tables + item.sequence * step.table_width;
        const T* base = static_cast<const T*>(cache.base) + item.head * cache.head_stride;
        const T* at[SLOTS];
        for (int64_t s = 0; s < live; ++s)
            at[s] = base + table[(slot + s) / cache.block_tokens] * cache.group_stride +
                    (slot + s) % cache.block_tokens * cache.slot_stride;
        const int64_t whole = cache.width / LANES * LANES;
        for (int64_t s = 0; s < live; s += LANES) {
            float* panel = keys + s / PANEL * PANEL * cache.width + s % PANEL;
            for (int64_t c = 0; c < whole; c += LANES) {
                Floats block[LANES];
                for (int64_t i = 0; i < LANES; ++i) block[i] = s + i < live ? load(at[s + i] + c) : splat(0.0f);
                transpose(block);
                for (int64_t i = 0; i < LANES; ++i) store(panel + (c + i) * PANEL, block[i]);
            }
            for (int64_t c = whole; c < cache.width; ++c)
                for (int64_t i = 0; i < LANES; ++i)
                    panel[c * PANEL + i] = s + i < live ? load_one(at[s + i] + c) : 0.0f;
        }
        if (live % PANEL != 0 && live % PANEL <= LANES) {
            float* panel = keys + live / PANEL * PANEL * cache.width + LANES;
            for (int64_t c = 0; c < cache.width; ++c) store(panel + c * PANEL, splat(0.0f));
        }
        for (int64_t s = 0; s < live; ++s) {
            const T* from = at[s] + cache.side_stride;
            float* row = values + s * padded;
            int64_t c = 0;
            for (; c < whole; c += LANES) store(row + c, load(from + c));
            for (; c < cache.width; ++c) row[c] = load_one(from + c);
        }
    }

    // Rows [first, first + ROWS) against the tile; the token of row 0 of the item sees slots up to `visible` of it.
    template <int ROWS>
    void tile(int64_t first, int64_t shared, int64_t visible, int64_t live) {
        const float* q = queries + first * padded;
        for (int64_t panel = 0; panel * PANEL < live; ++panel) {
            Floats acc[ROWS][2] = {};
            multiply<ROWS, 1, false>(q, padded, 1, keys + panel * PANEL * cache.width, 0, PANEL, cache.width, 0, acc);
            for (int r = 0; r < ROWS; ++r) {
                float* to = scores + (first + r) * SLOTS + panel * PANEL;
                store(to, acc[r][0] * step.scale);
                store(to + LANES, acc[r][1] * step.scale);
            }
        }
        for (int r = 0; r < ROWS; ++r) soften(first + r, std::min(live, visible + (first + r) / shared + 1));
        for (int64_t column = 0; column < padded; column += PANEL) {
            Floats acc[ROWS][2];
            for (int r = 0; r < ROWS; ++r) {
                const float* row = sums + (first + r) * padded + column;
                acc[r][0] = load(row);
                acc[r][1] = load(row + LANES);
            }
            multiply<ROWS, 1, false>(scores + first * SLOTS, SLOTS, 1, values + column, 0, padded, live, 0, acc);
            for (int r = 0; r < ROWS; ++r) {
                float* row = sums + (first + r) * padded + column;
                store(row, acc[r][0]);
                store(row + LANES, acc[r][1]);
            }
        }
    }

    // Scores of a row to weights relative to the largest score so far; the first `visible` slots count.
    void soften(int64_t row, int64_t visible) {
        float* line = scores + row * SLOTS;
        for (int64_t s = std::max<int64_t>(visible, 0); s < SLOTS; ++s) line[s] = HIDDEN;
        if (visible <= 0) {
            std::fill(line, line + SLOTS, 0.0f);
            return;
        }
        Floats peak = splat(most[row]);
        for (int64_t s = 0; s < SLOTS; s += LANES) peak = maximum(peak, load(line + s));
        float now = peak[0];
        for (int i = 1; i < LANES; ++i) now = std::max(now, peak[i]);
        const float before = most[row];
        Floats weight = splat(0.0f);
        for (int64_t s = 0; s < SLOTS; s += LANES) {
            const Floats score = load(line + s);
            Floats part = exponential(score - now);
            part = score == splat(HIDDEN) ? splat(0.0f) : part;
            store(line + s, part);
            weight += part;
        }
        most[row] = now;
        if (before == now) {
            total[row] += sum(weight);
            return;
        }
        const float kept = before == HIDDEN ? 0.0f : exponential(splat(before - now))[0];
        total[row] = total[row] * kept + sum(weight);
        float* out = sums + row * padded;
        for (int64_t c = 0; c < padded; c += LANES) store(out + c, load(out + c) * kept);
    }

    const Cache& cache;
    const Step& step;
    int64_t padded;
    float *keys, *values, *scores, *sums, *queries, *most, *total;
};

template <typename T>
int attend(const Cache& cache, const Step& step, int threads) {
    const int64_t shared = step.heads / cache.kv_heads;
    const int64_t tokens = std::max<int64_t>(1, ITEM_ROWS / shared);
    int64_t count = 0;
    for (int64_t b = 0; b < step.sequences; ++b) count += (step.queries[b] + tokens - 1) / tokens;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* memory = scratch().floats(Attention<T>::floats(cache, step));
        if (memory == nullptr) {
#pragma omp atomic write
            failed = 1;
        } else {
            Attention<T> work(cache, step, memory);
            // The last chunks of a prompt see most: they go first.
#pragma omp for schedule(dynamic)
            for (int64_t index = count * cache.kv_heads - 1; index >= 0; --index) {
                int64_t chunk = index / cache.kv_heads, b = 0;
                for (; chunk >= (step.queries[b] + tokens - 1) / tokens; ++b)
                    chunk -= (step.queries[b] + tokens - 1) / tokens;
                const int64_t last = std::min<int64_t>((chunk + 1) * tokens, step.queries[b]);
                work.run(Item{b, index % cache.kv_heads, chunk * tokens, last});
            }
        }
    }
    return failed;
}

template <typename T>
void write(const Cache& cache, const int64_t* slots, int64_t tokens, const float* keys, int64_t key_stride,
           const float* values, int64_t value_stride) {
    for (int64_t t = 0; t < tokens; ++t) {
        T* at = static_cast<T*>(cache.base) + slots[t] / cache.block_tokens * cache.group_stride +
                slots[t] % cache.block_tokens * cache.slot_stride;
        for (int64_t h = 0; h < cache.kv_heads; ++h) {
            const float *key = keys + t * key_stride + h * cache.width, *value = values + t * value_stride + h * cache.width;
            T *to = at + h * cache.head_stride, *beside = to + cache.side_stride;
            for (int64_t c = 0; c < cache.width; ++c) {
                store_one(to + c, key[c]);
                store_one(beside + c, value[c]);
            }
        }
    }
}

}  // namespace
}  // namespace prismserve

using namespace prismserve;

extern "C" {

// The cache: [groups, 2, block_tokens, kv_heads, width] with the given strides, the last axis contiguous.
int ps_attend(void* base, int element, const int64_t* strides, int64_t block_tokens, int64_t kv_heads, int64_t width,
              const float* q, int64_t token_stride, int64_t heads, const int32_t* tables, int64_t table_width,
              const int32_t* starts, const int32_t* queries, const int32_t* cached, int64_t sequences, float scale,
              float* out, float* lse, int threads) {
    const Cache cache{base, element, strides[0], strides[1], strides[2], strides[3], block_tokens, kv_heads, width};
    const Step step{q, token_stride, heads, tables, starts, queries, cached, table_width, sequences, scale, out, lse};
    return element == BFLOAT16 ? attend<uint16_t>(cache, step, threads) : attend<float>(cache, step, threads);
}

int ps_write_kv(void* base, int element, const int64_t* strides, int64_t block_tokens, int64_t kv_heads, int64_t width,
                const int64_t* slots, int64_t tokens, const float* keys, int64_t key_stride, const float* values,
                int64_t value_stride) {
    const Cache cache{base, element, strides[0], strides[1], strides[2], strides[3], block_tokens, kv_heads, width};
    if (element == BFLOAT16)
        write<uint16_t>(cache, slots, tokens, keys, key_stride, values, value_stride);
    else
        write<float>(cache, slots, tokens, keys, key_stride, values, value_stride);
    return 0;
}
}
