// Choices among rows of features: the farthest point, what is most alike, the best.
//
// All of it runs on one thread, since one picture has little work and pictures are prepared side by side.
#include "similar.h"

namespace prismserve {
namespace {

// What some rows have in common, pair by pair, for rounds that ask for ever fewer of them. Up to DENSE rows every pair
// is multiplied once, to the same bits as match() does; of more the pairs are multiplied when asked for.
class Likeness {
  public:
    Likeness(const Rows& rows, const std::vector<int64_t>& which, const std::vector<float>& inverse)
        : rows(rows), which(which), inverse(inverse), padded((which.size() + PANEL - 1) / PANEL * PANEL) {
        const int64_t count = which.size();
        if (count > DENSE) return;
        products.resize(count * padded);
        std::vector<float> panels, block(TILE_ROWS * rows.width);
        pack(rows, which, inverse, panels);
        for (int64_t first = 0; first < count; first += TILE_ROWS) {
            const int live = static_cast<int>(std::min<int64_t>(TILE_ROWS, count - first));
            for (int r = 0; r < live; ++r)
                for (int64_t k = 0; k < rows.width; ++k)
                    block[r * rows.width + k] = rows[which[first + r]][k] * inverse[which[first + r]];
            with_rows(live, [&](auto many) {
                constexpr int ROWS = decltype(many)::value;
                for (int64_t column = first / PANEL * PANEL; column < count; column += PANEL) {
                    Floats tile[ROWS][2] = {};
                    multiply<ROWS, 1, false>(block.data(), rows.width, int64_t{1}, panels.data() + column * rows.width,
                                             int64_t{0}, int64_t{PANEL}, rows.width, int64_t{0}, tile);
                    for (int r = 0; r < ROWS; ++r) {
                        float* row = products.data() + (first + r) * padded + column;
                        store(row, tile[r][0]);
                        store(row + LANES, tile[r][1]);
                    }
                }
            });
        }
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < i; ++j) products[i * padded + j] = products[j * padded + i];
    }

    // As prismserve::match between places in `which`, where of `found` only values and proposers are told.
    void match(const std::vector<int64_t>& proposers, const std::vector<int64_t>& partners,
               std::vector<Match>& found) const {
        if (products.empty()) {
            std::vector<float> panels, block;
            pack(rows, rows_of(partners), inverse, panels);
            prismserve::match(rows, rows_of(proposers), partners.size(), inverse, panels, block, found);
            return;
        }
        found.clear();
        std::vector<float> apart(padded, NONE);
        for (const int64_t j : partners) apart[j] = 0.0f;
        for (size_t i = 0; i < proposers.size(); ++i) {
            const float* row = products.data() + proposers[i] * padded;
            Floats lanes = splat(NONE);
            for (int64_t j = 0; j < padded; j += LANES) lanes = maximum(load(row + j) + load(apart.data() + j), lanes);
            float most = NONE;
            for (int lane = 0; lane < LANES; ++lane) most = std::max(most, lanes[lane]);
            found.push_back({most, static_cast<int64_t>(i), 0});
        }
    }

  private:
    static constexpr int64_t DENSE = 1024;  // 4 MiB

    std::vector<int64_t> rows_of(const std::vector<int64_t>& places) const {
        std::vector<int64_t> numbers;
        for (const int64_t place : places) numbers.push_back(which[place]);
        return numbers;
    }

    const Rows rows;
    const std::vector<int64_t>& which;
    const std::vector<float>& inverse;
    const int64_t padded;
    std::vector<float> products;  // [count, padded], or empty
};

}  // namespace
}  // namespace prismserve

using namespace prismserve;

extern "C" {

// See farthest_first in reference.py.
int ps_farthest_first(const float* data, int64_t stride, int64_t count, int64_t width, int64_t picks, int64_t* chosen) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        Some live(rows);
        std::vector<float> distance(count, -NONE), similar(STRIP * count);
        for (int64_t first = 0; first + 1 < count; first += STRIP) {
            // Every pair once: a strip of rows with itself and the rows behind it.
            const int64_t lefts = std::min<int64_t>(STRIP, count - first), rights = count - first;
            strip(live.data.data() + first, lefts, live.data.data() + first, rights, width, similar.data(), count);
            for (int64_t a = 0; a < lefts; ++a) {
                const int64_t i = first + a;
                const float* products = similar.data() + a * count;
                Floats nearest = splat(distance[i]);
                int64_t j = i + 1;
                for (; j + LANES <= count; j += LANES) {
                    const Floats apart = 1.0f - load(products + j - first) * (inverse[i] * load(inverse.data() + j));
                    nearest = minimum(apart, nearest);
                    store(distance.data() + j, minimum(apart, load(distance.data() + j)));
                }
                for (int lane = 0; lane < LANES; ++lane) distance[i] = std::min(distance[i], nearest[lane]);
                for (; j < count; ++j) {
                    const float apart = 1.0f - products[j - first] * (inverse[i] * inverse[j]);
                    distance[i] = std::min(distance[i], apart);
                    distance[j] = std::min(distance[j], apart);
                }
            }
        }
        for (int64_t i = 0; i < picks; ++i) {
            const int64_t pick = largest(distance.data(), count);
            chosen[i] = pick;
            live.drop(pick);
            if (i == 0) std::fill(distance.begin(), distance.end(), -NONE);
            distance[pick] = NONE;
            cosines(rows, inverse, pick, live, similar.data());
            for (int64_t a = 0; a < live.count(); ++a)
                distance[live.which[a]] = std::min(distance[live.which[a]], 1.0f - similar[a]);
        }
    });
}

// among [candidates] row numbers, ascending; the first `kept` of them become what is left. See drop_alike.
int ps_drop_alike(const float* data, int64_t stride, int64_t count, int64_t width, int64_t* among, int64_t candidates,
                  int64_t kept, int64_t per_round) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        const std::vector<int64_t> asked(among, among + candidates);
        std::vector<int64_t> alive = numbers(candidates), even, odd;
        std::vector<char> gone(candidates, 0);
        std::vector<Match> found;
        const Likeness likeness(rows, asked, inverse);
        while (static_cast<int64_t>(alive.size()) > kept) {
            split(alive, even, odd);
            const int64_t left = alive.size();
            const int64_t leaving = std::min({per_round, left - kept, static_cast<int64_t>(even.size())});
            likeness.match(even, odd, found);
            rank(found, leaving);
            for (int64_t i = 0; i < leaving; ++i) gone[even[found[i].proposer]] = 1;
            alive.erase(std::remove_if(alive.begin(), alive.end(), [&](int64_t i) { return gone[i]; }), alive.end());
        }
        for (size_t i = 0; i < alive.size(); ++i) among[i] = asked[alive[i]];
    });
}

// owner [choosers]: which of the rows `partners` each of the rows `among` is most like. See closest in reference.py.
int ps_closest(const float* data, int64_t stride, int64_t count, int64_t width, const int64_t* among, int64_t choosers,
               const int64_t* partners, int64_t chosen, int64_t* owner) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        std::vector<float> panels, block;
        std::vector<Match> found;
        pack(rows, std::vector<int64_t>(partners, partners + chosen), inverse, panels);
        match(rows, std::vector<int64_t>(among, among + choosers), chosen, inverse, panels, block, found);
        for (const Match& one : found) owner[one.proposer] = one.partner;
    });
}

// indices [rows, keep]: the largest of each row of [rows, count], ascending; of equals the earlier are taken.
int ps_top_k(const float* scores, int64_t stride, int64_t rows, int64_t count, int64_t keep, int64_t* indices) {
    return guarded([&] {
        Best best;
        for (int64_t r = 0; r < rows && keep > 0; ++r) {
            best.choose(scores + r * stride, count, keep);
            int64_t* next = indices + r * keep;
            for (int64_t i = 0; i < count; ++i)
                if (best.take(i)) *next++ = i;
        }
    });
}

}  // extern "C"
