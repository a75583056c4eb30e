// XXH3-128 of bytes while they are copied: each is read from memory once, hashed in registers and stored past the caches.
//
// XXH3 (Yann Collet, xxHash 0.8, doc/xxhash_spec.md), seed 0, the branch for more than 240 bytes: eight 64-bit
// accumulators take stripes of 64 bytes; after sixteen stripes they are scrambled.
#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace prismserve {
namespace {

constexpr int64_t STRIPE = 64, BLOCK = 1024, LONG_MIN = 241;
constexpr int SECRET_BYTES = 192;
// Below this many bytes what was copied is likely to be read again before it would have left the caches.
constexpr int64_t STREAM_MIN = 128 << 10;
constexpr int64_t AHEAD = 2048;

constexpr uint64_t P32_1 = 0x9E3779B1u, P32_2 = 0x85EBCA77u, P32_3 = 0xC2B2AE3Du;
constexpr uint64_t P64_1 = 0x9E3779B185EBCA87u, P64_2 = 0xC2B2AE3D27D4EB4Fu, P64_3 = 0x165667B19E3779F9u;
constexpr uint64_t P64_4 = 0x85EBCA77C2B2AE63u, P64_5 = 0x27D4EB2F165667C5u;

alignas(64) constexpr uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d,
    0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0,
    0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0,
    0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b,
    0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac,
    0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51,
    0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34,
    0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49,
    0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8,
    0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b,
    0x40, 0x7e};

uint64_t word(const uint8_t* from) {
    uint64_t value;
    std::memcpy(&value, from, sizeof value);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

void put_big_endian(uint8_t* to, uint64_t value) {
    for (int i = 0; i < 8; ++i) to[i] = static_cast<uint8_t>(value >> (56 - 8 * i));
}

// What becomes of the bytes beside hashing them.
enum class Copy { NONE, CACHED, STREAMED };

#ifdef __AVX2__

struct State {
    __m256i low = _mm256_set_epi64x(P64_3, P64_2, P64_1, P32_3);
    __m256i high = _mm256_set_epi64x(P32_1, P64_5, P32_2, P64_4);

    static __m256i mix(__m256i state, __m256i data, const uint8_t* secret) {
        const __m256i key = _mm256_xor_si256(data, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
        const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
        const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
        return _mm256_add_epi64(product, _mm256_add_epi64(state, swapped));
    }

    template <Copy copy>
    void stripe(const uint8_t* from, uint8_t* to, const uint8_t* secret) {
        const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
        if (copy == Copy::CACHED) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), one);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), other);
        } else if (copy == Copy::STREAMED) {
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to), one);
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), other);
        }
        low = mix(low, one, secret);
        high = mix(high, other, secret + 32);
    }

    static __m256i scrambled(__m256i state, const uint8_t* secret) {
        const __m256i prime = _mm256_set1_epi32(static_cast<int>(P32_1));
        __m256i mixed = _mm256_xor_si256(state, _mm256_srli_epi64(state, 47));
        mixed = _mm256_xor_si256(mixed, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
        const __m256i upper = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
        return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(upper, 32));
    }

    void scramble(const uint8_t* secret) {
        low = scrambled(low, secret);
        high = scrambled(high, secret + 32);
    }

    void give(uint64_t* words) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 4), high);
    }

    static bool streams(const uint8_t* to) { return reinterpret_cast<uintptr_t>(to) % 32 == 0; }
    static void finish() { _mm_sfence(); }
};

#else

struct State {
    uint64_t words[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

    template <Copy copy>
    void stripe(const uint8_t* from, uint8_t* to, const uint8_t* secret) {
        uint64_t data[8];
        for (int i = 0; i < 8; ++i) data[i] = word(from + 8 * i);
        if (copy != Copy::NONE) std::memcpy(to, from, STRIPE);
        for (int i = 0; i < 8; ++i) {
            const uint64_t key = data[i] ^ word(secret + 8 * i);
            words[i] += data[i ^ 1] + (key & 0xffffffffu) * (key >> 32);
        }
    }

    void scramble(const uint8_t* secret) {
        for (int i = 0; i < 8; ++i) words[i] = (words[i] ^ (words[i] >> 47) ^ word(secret + 8 * i)) * P32_1;
    }

    void give(uint64_t* out) const { std::copy(words, words + 8, out); }

    static bool streams(const uint8_t*) { return false; }
    static void finish() {}
};

#endif

uint64_t merged(const uint64_t* words, const uint8_t* secret, uint64_t start) {
    for (int i = 0; i < 4; ++i) {
        const unsigned __int128 product = static_cast<unsigned __int128>(words[2 * i] ^ word(secret + 16 * i)) *
                                          (words[2 * i + 1] ^ word(secret + 16 * i + 8));
        start += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    start ^= start >> 37;
    start *= 0x165667919E3779F9u;
    return start ^ (start >> 32);
}

template <Copy copy>
void run(const uint8_t* from, uint8_t* to, int64_t size, uint8_t* digest) {
    State state;
    const int64_t whole = (size - 1) / BLOCK * BLOCK;
    for (int64_t at = 0; at < whole; at += BLOCK) {
        for (int64_t i = 0; i < BLOCK / STRIPE; ++i) {
            const int64_t here = at + i * STRIPE;
            __builtin_prefetch(from + here + AHEAD, 0, 0);
            state.stripe<copy>(from + here, to + here, SECRET + 8 * i);
        }
        state.scramble(SECRET + SECRET_BYTES - STRIPE);
    }
    const int64_t stripes = (size - 1 - whole) / STRIPE;
    for (int64_t i = 0; i < stripes; ++i)
        state.stripe<copy>(from + whole + i * STRIPE, to + whole + i * STRIPE, SECRET + 8 * i);
    const int64_t done = whole + stripes * STRIPE;
    // The last stripe ends where the bytes end, so it may begin in the one before.
    alignas(32) uint8_t last[STRIPE];
    std::memcpy(last, from + size - STRIPE, STRIPE);
    if (copy != Copy::NONE) std::memcpy(to + done, last + STRIPE - (size - done), static_cast<size_t>(size - done));
    state.stripe<Copy::NONE>(last, nullptr, SECRET + SECRET_BYTES - STRIPE - 7);
    if (copy == Copy::STREAMED) State::finish();
    uint64_t words[8];
    state.give(words);
    const uint64_t length = static_cast<uint64_t>(size);
    put_big_endian(digest, merged(words, SECRET + SECRET_BYTES - STRIPE - 11, ~(length * P64_2)));
    put_big_endian(digest + 8, merged(words, SECRET + 11, length * P64_1));
}

}  // namespace
}  // namespace prismserve

using namespace prismserve;

extern "C" {

// The hash of `size` bytes, at least 241, in its canonical form; they are copied to `target` unless that is null.
// Whatever others write to `source` meanwhile, the hash is that of the bytes copied.
int ps_copy_hashed(const void* source, void* target, int64_t size, void* digest) {
    if (size < LONG_MIN) return 1;
    const uint8_t* from = static_cast<const uint8_t*>(source);
    uint8_t *to = static_cast<uint8_t*>(target), *out = static_cast<uint8_t*>(digest);
    if (to == nullptr)
        run<Copy::NONE>(from, to, size, out);
    else if (size >= STREAM_MIN && State::streams(to))
        run<Copy::STREAMED>(from, to, size, out);
    else
        run<Copy::CACHED>(from, to, size, out);
    return 0;
}
}
