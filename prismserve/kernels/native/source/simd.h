// Eight float32 lanes through the compiler's vector extensions: AVX2, NEON or SSE, whatever -march=native offers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace prismserve {

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4), may_alias));

constexpr int LANES = 8;
// Columns of a packed panel: two vectors.
constexpr int PANEL = 16;

// Element types as the Python side numbers them.
enum Element : int { FLOAT32 = 0, BFLOAT16 = 1 };

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
inline Floats splat(float value) { return Floats{value, value, value, value, value, value, value, value}; }

inline float widen(uint16_t bits) {
    uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// Round to nearest, ties to even, as PyTorch does; NaN stays NaN.
inline uint16_t narrow(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((word >> 16) | 0x40u);
    return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

// Eight consecutive bfloat16 values.
inline Floats widen(const uint16_t* from) {
    typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
    Halves halves = *reinterpret_cast<const Halves*>(from);
    Words words = __builtin_convertvector(halves, Words) << 16;
    return reinterpret_cast<Floats&>(words);
}

inline Floats load(const uint16_t* from) { return widen(from); }
inline void store_one(float* to, float value) { *to = value; }
inline void store_one(uint16_t* to, float value) { *to = narrow(value); }

inline float load_one(const float* from) { return *from; }
inline float load_one(const uint16_t* from) { return widen(*from); }

// Both halves of eight lanes, added.
inline Quad halved(Floats value) {
    Quad halves[2];
    std::memcpy(halves, &value, sizeof value);
    return halves[0] + halves[1];
}

inline float sum(Floats value) {
    const Quad pairs = halved(value);
    return (pairs[0] + pairs[2]) + (pairs[1] + pairs[3]);
}

// The sums of four, each bit for bit as `sum`.
inline Quad sums(Floats a, Floats b, Floats c, Floats d) {
    const Quad p = halved(a), q = halved(b), r = halved(c), s = halved(d);
    const Quad pq = Quad{p[0], p[1], q[0], q[1]} + Quad{p[2], p[3], q[2], q[3]};
    const Quad rs = Quad{r[0], r[1], s[0], s[1]} + Quad{r[2], r[3], s[2], s[3]};
    return Quad{pq[0], pq[2], rs[0], rs[2]} + Quad{pq[1], pq[3], rs[1], rs[3]};
}

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
inline Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

// exp by range reduction to [-ln2/2, ln2/2] and a polynomial of degree 6 (Cephes' expf); 2 ulp, flushed below 2^-126.
inline Floats exponential(Floats x) {
    x = x < splat(88.72283f) ? x : splat(88.72283f);
    x = x > splat(-87.33654f) ? x : splat(-87.33654f);
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Floats shifted = x * 1.44269504088896341f + magic;
    Floats whole = shifted - magic;
    Floats rest = x - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    Floats poly = splat(1.9875691500e-4f);
    poly = poly * rest + 1.3981999507e-3f;
    poly = poly * rest + 8.3334519073e-3f;
    poly = poly * rest + 4.1665795894e-2f;
    poly = poly * rest + 1.6666665459e-1f;
    poly = poly * rest + 5.0000001201e-1f;
    poly = poly * (rest * rest) + rest + 1.0f;
    Ints power = (reinterpret_cast<Ints&>(shifted) - reinterpret_cast<const Ints&>(magic) + 127) << 23;
    return poly * reinterpret_cast<Floats&>(power);
}

inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

// 1 / sqrt(mean(row^2) + eps)
inline float inverse_norm(const float* row, int64_t width, float eps) {
    Floats squares = splat(0.0f);
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
        Floats part = load(row + k);
        squares += part * part;
    }
    float total = sum(squares);
    for (; k < width; ++k) total += row[k] * row[k];
    return 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
}

}  // namespace prismserve
