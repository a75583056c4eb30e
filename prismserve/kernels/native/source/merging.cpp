// Merging rows of features: which are folded into which, with what weights, and their sums.
#include "similar.h"

using namespace prismserve;

extern "C" {

// owner [count]: which of the groups that are left a row belongs to. See merge_alike in reference.py.
int ps_merge_alike(const float* data, int64_t stride, int64_t count, int64_t width, int64_t groups, int64_t per_round,
                   int64_t* places, int64_t* owner) {
    return guarded([&] {
        std::vector<float> sums(count * width), panels, block;
        for (int64_t i = 0; i < count; ++i) std::copy_n(data + i * stride, width, sums.data() + i * width);
        const Rows rows{sums.data(), width, count, width};
        std::vector<float> inverse = inverse_norms(rows);
        std::vector<int64_t> alive = numbers(count), even, odd, joined(count, -1);
        std::vector<Match> found;
        while (static_cast<int64_t>(alive.size()) > groups) {
            split(alive, even, odd);
            const int64_t left = alive.size();
            const int64_t pairs = std::min({per_round, left - groups, left / 2});
            pack(rows, odd, inverse, panels);
            match(rows, even, odd.size(), inverse, panels, block, found);
            rank(found, pairs);
            for (int64_t p = 0; p < pairs; ++p) {
                const int64_t source = even[found[p].proposer], target = odd[found[p].partner];
                joined[source] = target;
                float* into = sums.data() + target * width;
                for (int64_t k = 0; k < width; ++k) into[k] += rows[source][k];
                inverse[target] = inverse_norms({into, width, 1, width})[0];
            }
            alive.erase(std::remove_if(alive.begin(), alive.end(), [&](int64_t i) { return joined[i] >= 0; }),
                        alive.end());
        }
        std::vector<int64_t> number(count);
        for (int64_t g = 0; g < groups; ++g) number[places[g] = alive[g]] = g;
        for (int64_t i = 0; i < count; ++i) {
            int64_t last = i;
            while (joined[last] >= 0) last = joined[last];
            owner[i] = number[last];
        }
    });
}

// weights [keep, count]: what the rows `kept` are made of, of which `centres` take in others; both ascending. See
// fold_alike in reference.py.
int ps_fold_alike(const float* data, int64_t stride, int64_t count, int64_t width, const int64_t* kept, int64_t keep,
                  const int64_t* centres, int64_t middle, float own, float share, float* weights) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        const std::vector<int64_t> into(centres, centres + middle);
        std::vector<int64_t> others;
        for (int64_t i = 0, next = 0; i < count; ++i)
            if (next < keep && kept[next] == i)
                ++next;
            else
                others.push_back(i);
        std::vector<float> panels, block;
        std::vector<Match> found;
        pack(rows, into, inverse, panels);
        match(rows, others, middle, inverse, panels, block, found);
        std::vector<int64_t> owner(others.size());
        for (const Match& one : found) owner[one.proposer] = one.partner;
        fold(count, kept, keep, into, others, owner, own, share, weights);
    });
}

// weights [keep, count]: what the rows `kept` are made of if each takes in the `nearest` most like it, times their
// scores [count]; where `mean` is not 0, divided by their sum. See fold_nearest in reference.py.
int ps_fold_nearest(const float* data, int64_t stride, int64_t count, int64_t width, const int64_t* kept, int64_t keep,
                    const float* scores, int64_t nearest, int mean, float* weights) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        const Some all(rows);
        std::vector<float> similar(STRIP * count);
        Best best;
        for (int64_t first = 0; first < keep; first += STRIP) {
            const int64_t lefts = std::min<int64_t>(STRIP, keep - first);
            const float* left[STRIP] = {};
            for (int64_t a = 0; a < lefts; ++a) left[a] = rows[kept[first + a]];
            strip(left, lefts, all.data.data(), count, width, similar.data(), count);
            for (int64_t a = 0; a < lefts; ++a) {
                const int64_t one = kept[first + a];
                float *values = similar.data() + a * count, *weight = weights + (first + a) * count, total = 0.0f;
                for (int64_t j = 0; j < count; ++j) values[j] *= inverse[one] * inverse[j];
                values[one] = NONE;
                if (nearest > 0) best.choose(values, count, nearest);
                for (int64_t j = 0; j < count; ++j) {
                    weight[j] = j == one ? 1.0f : nearest > 0 && best.take(j) ? scores[j] : 0.0f;
                    total += weight[j];
                }
                for (int64_t j = 0; j < count && mean; ++j) weight[j] /= total;
            }
        }
    });
}

// out [merged, width]: sums of rows by weights [merged, count], most of which are 0. See merge_rows in reference.py.
int ps_merge_rows(const float* data, int64_t stride, int64_t count, int64_t width, const float* weights,
                  int64_t weight_stride, int64_t merged, float* out) {
    return guarded([&] {
        std::vector<int64_t> counting(count);
        for (int64_t m = 0; m < merged; ++m) {
            const float* weight = weights + m * weight_stride;
            float* into = out + m * width;
            int64_t terms = 0;
            for (int64_t j = 0; j < count; ++j) {
                counting[terms] = j;
                terms += weight[j] != 0.0f;
            }
            if (terms == 0) {
                std::fill_n(into, width, 0.0f);
                continue;
            }
            int64_t k = 0;
            while (width - k >= LANES) {
                const int vectors = static_cast<int>(std::min<int64_t>(TILE_ROWS, (width - k) / LANES));
                with_rows(vectors, [&](auto many) {
                    constexpr int WIDE = decltype(many)::value;
                    Floats sums[WIDE];
                    const float* row = data + counting[0] * stride + k;
                    for (int w = 0; w < WIDE; ++w) sums[w] = weight[counting[0]] * load(row + w * LANES);
                    for (int64_t t = 1; t < terms; ++t) {
                        const float scale = weight[counting[t]];
                        row = data + counting[t] * stride + k;
#pragma GCC unroll 8
                        for (int w = 0; w < WIDE; ++w) sums[w] += scale * load(row + w * LANES);
                    }
                    for (int w = 0; w < WIDE; ++w) store(into + k + w * LANES, sums[w]);
                });
                k += vectors * LANES;
            }
            for (; k < width; ++k) {
                into[k] = weight[counting[0]] * data[counting[0] * stride + k];
                for (int64_t t = 1; t < terms; ++t) into[k] += weight[counting[t]] * data[counting[t] * stride + k];
            }
        }
    });
}

}  // extern "C"
