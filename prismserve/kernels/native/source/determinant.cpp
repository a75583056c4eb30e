// The choice of rows with the largest determinant, and folding the others into them; on one thread, as in subsets.cpp.
#include <memory>

#include "similar.h"

namespace prismserve {
namespace {

// Greedy enlargement of a determinant, see largest_determinant in reference.py. Columns are padded to whole vectors;
// what lies behind the last and in columns already chosen is computed along and never read.
//
// A row of the kernel is computed together with those of the next best tokens, which are mostly chosen next: one pass
// over the features and over the factors serves them all. A row may so be ready before its turn; the factors that have
// come since are then subtracted in the same order.
class Determinant {
  public:
    Determinant(const Rows& rows, const float* quality, const float* places, float share, float falloff, int64_t picks,
                float least, bool folding)
        : rows(rows),
          padded((rows.count + LANES - 1) / LANES * LANES),
          picks(picks),
          share(share),
          falloff(falloff),
          folding(folding),
          inverse(inverse_norms(rows)),
          live(rows),
          slot(rows.count, -1),
          weight(padded, 0.0f),
          gain(padded, -1.0f),
          floor(padded, 0.0f),
          similar(STRIP * rows.count),
          axes(places == nullptr ? 0 : 3 * padded, 0.0f),
          held(new float[picks * padded]),
          cosines(folding ? new float[picks * padded] : nullptr) {
        for (int64_t j = 0; j < rows.count; ++j) {
            weight[j] = quality == nullptr ? 1.0f : quality[j];
            gain[j] = inverse[j] > 0.0f ? weight[j] * weight[j] : 0.0f;
            floor[j] = least * gain[j];
            for (int axis = 0; axis < 3 && places != nullptr; ++axis) axes[axis * padded + j] = places[3 * j + axis];
        }
    }

    // Choose number i; called for 0, 1, ... picks - 1.
    int64_t pick(int64_t i) {
        const int64_t pick = largest(gain.data(), rows.count);
        float* row = held.get() + i * padded;
        if ((gain[pick] > 0.0f || folding) && slot[pick] < 0) prepare(pick, i);
        if (folding) std::copy_n(ahead[slot[pick]].cosines.data(), padded, cosines.get() + i * padded);
        if (gain[pick] > 0.0f) {
            Ahead& ready = ahead[slot[pick]];
            float* const into = ready.row.data();
            subtract<1>(&into, &pick, ready.level, i);
            shrink(into, row, 1.0f / std::sqrt(gain[pick]));
        } else {
            std::fill_n(row, padded, 0.0f);
        }
        if (slot[pick] >= 0) unused.push_back(slot[pick]);
        gain[pick] = -1.0f;
        live.drop(pick);
        return pick;
    }

    // owner[a]: which of `centres`, all of them chosen, row others()[a] is most like, as match() finds; ranks[i]: which of
    // the centres was chosen as number i.
    std::vector<int64_t> owners(const std::vector<int64_t>& centres, const std::vector<int64_t>& ranks) const;

    const std::vector<int64_t>& others() const { return live.which; }

  private:
    struct Ahead {
        int64_t level;  // how many factors have been subtracted
        std::vector<float> row, cosines;
    };

    // Rows of the kernel less the factors 0 ... i - 1, for `pick` and those that are likely to follow.
    void prepare(int64_t pick, int64_t i) {
        int64_t together[STRIP] = {pick, -1, -1}, many = 1;
        for (const int64_t j : live.which) {
            if (j == pick || slot[j] >= 0 || gain[j] <= 0.0f) continue;
            if (together[1] < 0 || gain[j] > gain[together[1]])
                together[2] = together[1], together[1] = j;
            else if (together[2] < 0 || gain[j] > gain[together[2]])
                together[2] = j;
        }
        while (many < std::min<int64_t>(STRIP, picks - i) && together[many] >= 0) ++many;
        const int64_t rights = live.count();
        const float* left[STRIP] = {};
        for (int64_t a = 0; a < many; ++a) left[a] = rows[together[a]];
        strip(left, many, live.data.data(), rights, rows.width, similar.data(), rights);
        float* into[STRIP];
        for (int64_t a = 0; a < many; ++a) {
            const int64_t one = together[a];
            if (unused.empty()) {
                unused.push_back(ahead.size());
                ahead.push_back({0, std::vector<float>(padded), std::vector<float>(folding ? padded : 0)});
            }
            Ahead& ready = ahead[slot[one] = unused.back()];
            unused.pop_back();
            ready.level = i;
            into[a] = ready.row.data();
            std::fill_n(into[a], padded, 0.0f);
            for (int64_t b = 0; b < rights; ++b)
                into[a][live.which[b]] = similar[a * rights + b] * (inverse[one] * inverse[live.which[b]]);
            if (folding) std::copy_n(into[a], padded, ready.cosines.data());
            weigh(into[a], one);
        }
        if (many == 1)
            subtract<1>(into, together, 0, i);
        else if (many == 2)
            subtract<2>(into, together, 0, i);
        else
            subtract<3>(into, together, 0, i);
    }

    // The kernel's row from cosines: faded with distance, times both qualities.
    void weigh(float* row, int64_t one) const {
        const float *x = axes.data(), *y = x + padded, *z = y + padded;
        for (int64_t j = 0; j < padded; j += LANES) {
            Floats value = load(row + j);
            if (!axes.empty()) {
                const Floats right = load(x + j) - x[one], down = load(y + j) - y[one], deep = load(z + j) - z[one];
                const Floats squared = right * right + down * down + deep * deep;
                value *= (1.0f - share) + share * exponential(falloff * squared);
            }
            store(row + j, value * (weight[one] * load(weight.data() + j)));
        }
    }

    // into[a][j] -= sum over t = from ... behind - 1 of held[t][tokens[a]] * held[t][j], in order.
    template <int MANY>
    void subtract(float* const* into, const int64_t* tokens, int64_t from, int64_t behind) const {
        int64_t j = 0;
        for (; j + 4 * LANES <= padded; j += 4 * LANES) subtract<MANY, 4>(into, tokens, from, behind, j);
        for (; j < padded; j += LANES) subtract<MANY, 1>(into, tokens, from, behind, j);
    }

    template <int MANY, int WIDE>
    void subtract(float* const* into, const int64_t* tokens, int64_t from, int64_t behind, int64_t j) const {
        Floats left[MANY * WIDE];
#pragma GCC unroll 16
        for (int s = 0; s < MANY * WIDE; ++s) left[s] = load(into[s / WIDE] + j + s % WIDE * LANES);
        for (int64_t t = from; t < behind; ++t) {
            const float* factor = held.get() + t * padded;
#pragma GCC unroll 4
            for (int a = 0; a < MANY; ++a) {
                const Floats scale = splat(factor[tokens[a]]);
#pragma GCC unroll 4
                for (int w = 0; w < WIDE; ++w) left[a * WIDE + w] -= scale * load(factor + j + w * LANES);
            }
        }
#pragma GCC unroll 16
        for (int s = 0; s < MANY * WIDE; ++s) store(into[s / WIDE] + j + s % WIDE * LANES, left[s]);
    }

    // The factor, and what is left to gain behind it.
    void shrink(const float* row, float* factor, float scale) {
        for (int64_t j = 0; j < padded; j += LANES) {
            const Floats scaled = load(row + j) * scale, before = load(gain.data() + j);
            store(factor + j, scaled);
            const Floats left = before - scaled * scaled;
            const Floats counted = left <= load(floor.data() + j) ? splat(0.0f) : left;
            store(gain.data() + j, before < 0.0f ? before : counted);
        }
    }

    const Rows rows;
    const int64_t padded, picks;
    const float share, falloff;
    const bool folding;
    const std::vector<float> inverse;
    Some live;  // not chosen
    std::vector<int64_t> slot, unused;
    std::vector<Ahead> ahead;
    std::vector<float> weight, gain, floor, similar, axes;
    const std::unique_ptr<float[]> held, cosines;  // [picks, padded]
};

// The cosines the choice was made with say nearly always which centre is nearest. They are rounded otherwise than
// match() rounds them, so where two centres are closer than rounding can tell, match()'s own products decide.
std::vector<int64_t> Determinant::owners(const std::vector<int64_t>& centres, const std::vector<int64_t>& ranks) const {
    const Floats slack = splat(static_cast<float>(rows.width + 8) * 0x1p-22f);
    std::vector<float> most(padded, NONE);
    std::vector<int32_t> leader(padded, 0), rivals(padded, 0);
    for (int64_t i = 0; i < picks; ++i)
        for (int64_t j = 0; j < padded; j += LANES)
            store(most.data() + j, maximum(load(cosines.get() + i * padded + j), load(most.data() + j)));
    for (int64_t i = 0; i < picks; ++i) {
        const Ints rank = Ints{} + static_cast<int32_t>(ranks[i]);
        for (int64_t j = 0; j < padded; j += LANES) {
            const Ints near = load(cosines.get() + i * padded + j) >= load(most.data() + j) - slack;
            Ints& lead = *reinterpret_cast<Ints*>(leader.data() + j);
            lead = near ? rank : lead;
            *reinterpret_cast<Ints*>(rivals.data() + j) -= near;
        }
    }
    std::vector<int64_t> owner(live.count()), doubtful, asking;
    for (int64_t a = 0; a < live.count(); ++a) {
        owner[a] = leader[live.which[a]];
        if (rivals[live.which[a]] != 1) doubtful.push_back(a), asking.push_back(live.which[a]);
    }
    if (!doubtful.empty()) {
        std::vector<float> panels, block;
        std::vector<Match> found;
        pack(rows, centres, inverse, panels);
        match(rows, asking, centres.size(), inverse, panels, block, found);
        for (const Match& one : found) owner[doubtful[one.proposer]] = one.partner;
    }
    return owner;
}

}  // namespace
}  // namespace prismserve

using namespace prismserve;

extern "C" {

// quality [count] and places [count, 3] may be null. See largest_determinant in reference.py.
int ps_largest_determinant(const float* data, int64_t stride, int64_t count, int64_t width, const float* quality,
                           const float* places, float share, float falloff, int64_t picks, float least,
                           int64_t* chosen) {
    return guarded([&] {
        Determinant determinant({data, stride, count, width}, quality, places, share, falloff, picks, least, false);
        for (int64_t i = 0; i < picks; ++i) chosen[i] = determinant.pick(i);
    });
}

// As ps_largest_determinant, but `chosen` is ascending; weights [picks, count] are those of ps_fold_alike with all that
// is chosen as centres. See determinant_folded in reference.py.
int ps_determinant_folded(const float* data, int64_t stride, int64_t count, int64_t width, const float* quality,
                          const float* places, float share, float falloff, int64_t picks, float least, float own,
                          float taken, int64_t* chosen, float* weights) {
    return guarded([&] {
        Determinant determinant({data, stride, count, width}, quality, places, share, falloff, picks, least, true);
        std::vector<int64_t> order(picks), ranks(picks);
        for (int64_t i = 0; i < picks; ++i) order[i] = determinant.pick(i);
        std::vector<int64_t> centres = order;
        std::sort(centres.begin(), centres.end());
        for (int64_t i = 0; i < picks; ++i)
            ranks[i] = std::lower_bound(centres.begin(), centres.end(), order[i]) - centres.begin();
        const std::vector<int64_t> owner = determinant.owners(centres, ranks);
        std::copy(centres.begin(), centres.end(), chosen);
        fold(count, chosen, picks, centres, determinant.others(), owner, own, taken, weights);
    });
}

}  // extern "C"
