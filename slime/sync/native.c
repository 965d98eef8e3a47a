// Compiled loops of the weight channel: diff, codings of a block, fingerprint, scatter and gather.
//
// Plain C without Python.h: native.py loads it with ctypes, which lets the interpreter run meanwhile. Arrays are little endian and may be
// unaligned. Whatever came over the wire is untrusted: a decoder checks every read, shift and count, and answers BAD_* where one fails.
// x86-64 chooses AVX-512 and AVX2 at run time; other machines take the same loops as the compiler makes them.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "weights are handled as little-endian bits"
#endif
#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,bmi,popcnt")))
#define AVX2 __attribute__((target("avx2,bmi,popcnt")))
#endif

enum { VERSION = 6, BAD_POSITIONS = -1, BAD_VALUES = -2, BAD_STREAM = -3, NO_ROOM = -4, BAD_ARGUMENT = -5 };

API int64_t slime_version(void) { return VERSION; }

// What this processor has, at most what `level` allows. 0: AVX-512, 1: AVX2, 2: neither.
INLINE int best(int level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (level < 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return 0;
    if (level < 2 && __builtin_cpu_supports("avx2")) return 1;
#else
    (void)level;
#endif
    return 2;
}

// ---- elements of 1, 2, 4 or 8 bytes ----

INLINE uint64_t load(const uint8_t *from, uint64_t i, int width) {
    uint16_t two;
    uint32_t four;
    uint64_t eight;
    switch (width) {
    case 1: return from[i];
    case 2: memcpy(&two, from + 2 * i, 2); return two;
    case 4: memcpy(&four, from + 4 * i, 4); return four;
    default: memcpy(&eight, from + 8 * i, 8); return eight;
    }
}

INLINE void store(uint8_t *to, uint64_t i, uint64_t value, int width) { memcpy(to + i * width, &value, width); }

// A call of `body` whose width (and whether it is a float) are constants, so that the compiler makes a loop of each.
#define BY_WIDTH(width, body) \
    switch (width) { \
    case 1: { enum { W = 1 }; body; } break; \
    case 2: { enum { W = 2 }; body; } break; \
    case 4: { enum { W = 4 }; body; } break; \
    case 8: { enum { W = 8 }; body; } break; \
    default: return BAD_ARGUMENT; \
    }

// A float's bits as an unsigned number of the same order: neighbours in value are neighbours here, and -0.0 is below 0.0.
INLINE uint64_t key_of(uint64_t bits, int width, int is_float) {
    uint64_t sign = (uint64_t)1 << (8 * width - 1);
    if (!is_float) return bits;
    return bits ^ (sign | ((0 - (bits >> (8 * width - 1))) & (sign - 1)));  // no branch: signs are random
}

INLINE uint64_t bits_of(uint64_t key, int width, int is_float) {
    uint64_t sign = (uint64_t)1 << (8 * width - 1);
    key &= sign | (sign - 1);
    if (!is_float) return key;
    return key ^ (sign | (((key >> (8 * width - 1)) - 1) & (sign - 1)));
}

// From old to new in units in the last place, modulo the width: its magnitude, and whether it goes down.
INLINE uint64_t step_of(uint64_t old, uint64_t new, int width, int is_float, unsigned *down) {
    uint64_t step = key_of(new, width, is_float) - key_of(old, width, is_float);
    int64_t extended = (int64_t)(step << (64 - 8 * width)) >> (64 - 8 * width);
    *down = extended < 0;
    return ((uint64_t)extended ^ (0 - (uint64_t)*down)) + *down;
}

INLINE uint64_t stepped(uint64_t old, uint64_t magnitude, unsigned down, int width, int is_float) {
    uint64_t key = key_of(old, width, is_float);
    return bits_of(key + ((magnitude ^ (0 - (uint64_t)down)) + down), width, is_float);
}

// ---- diff: positions (base + i) at which two arrays differ; `out` has room for n ----

INLINE uint64_t diff_from(uint64_t i, uint64_t found, const uint8_t *a, const uint8_t *b, uint64_t n, int64_t base, int64_t *out, int width) {
    uint64_t x, y;
    for (; i < n && (i * width) % 8; i++)
        if (load(a, i, width) != load(b, i, width)) out[found++] = base + (int64_t)i;
    for (; i + 8 / width <= n; i += 8 / width) {
        memcpy(&x, a + i * width, 8);
        memcpy(&y, b + i * width, 8);
        if (x == y) continue;
        for (int e = 0; e < 8 / width; e++)
            if (load(a, i + e, width) != load(b, i + e, width)) out[found++] = base + (int64_t)i + e;
    }
    for (; i < n; i++)
        if (load(a, i, width) != load(b, i, width)) out[found++] = base + (int64_t)i;
    return found;
}

#if defined(__x86_64__)
AVX512 INLINE uint64_t diff_512_of(const uint8_t *a, const uint8_t *b, uint64_t n, int64_t base, int64_t *out, int width) {
    uint64_t found = 0, i = 0, per = 64 / width;
    for (; i + per <= n; i += per) {
        __m512i x = _mm512_loadu_si512(a + i * width), y = _mm512_loadu_si512(b + i * width);
        uint64_t mask = width == 1   ? _mm512_cmpneq_epi8_mask(x, y)
                        : width == 2 ? _mm512_cmpneq_epi16_mask(x, y)
                        : width == 4 ? _mm512_cmpneq_epi32_mask(x, y)
                                     : _mm512_cmpneq_epi64_mask(x, y);
        for (; mask; mask &= mask - 1) out[found++] = base + (int64_t)(i + __builtin_ctzll(mask));
    }
    return diff_from(i, found, a, b, n, base, out, width);
}

AVX2 INLINE uint64_t diff_256_of(const uint8_t *a, const uint8_t *b, uint64_t n, int64_t base, int64_t *out, int width) {
    uint64_t found = 0, i = 0, per = 32 / width;
    uint32_t element = (uint32_t)((1ull << width) - 1);
    for (; i + per <= n; i += per) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(a + i * width)), y = _mm256_loadu_si256((const __m256i *)(b + i * width));
        __m256i same = width == 1   ? _mm256_cmpeq_epi8(x, y)
                       : width == 2 ? _mm256_cmpeq_epi16(x, y)
                       : width == 4 ? _mm256_cmpeq_epi32(x, y)
                                    : _mm256_cmpeq_epi64(x, y);
        uint32_t mask = ~(uint32_t)_mm256_movemask_epi8(same);
        while (mask) {
            int bit = __builtin_ctz(mask);
            out[found++] = base + (int64_t)(i + bit / width);
            mask &= ~(element << bit);
        }
    }
    return diff_from(i, found, a, b, n, base, out, width);
}

AVX512 static int64_t diff_512(const uint8_t *a, const uint8_t *b, uint64_t n, int width, int64_t base, int64_t *out) {
    BY_WIDTH(width, return (int64_t)diff_512_of(a, b, n, base, out, W));
}

AVX2 static int64_t diff_256(const uint8_t *a, const uint8_t *b, uint64_t n, int width, int64_t base, int64_t *out) {
    BY_WIDTH(width, return (int64_t)diff_256_of(a, b, n, base, out, W));
}
#endif

API int64_t slime_diff(const uint8_t *a, const uint8_t *b, uint64_t n, int width, int64_t base, int64_t *out, int level) {
#if defined(__x86_64__)
    level = best(level);
    if (level == 0) return diff_512(a, b, n, width, base, out);
    if (level == 1) return diff_256(a, b, n, width, base, out);
#else
    (void)level;
#endif
    BY_WIDTH(width, return (int64_t)diff_from(0, 0, a, b, n, base, out, W));
}

// ---- spans: many stretches of two memories, compared at once; kernels/diff.py says what for ----

typedef struct {
    uint64_t old, live;  // addresses of `count` elements each
    uint64_t first;  // position of the first one in its block
    uint64_t count;
    uint64_t at;  // where its first entry goes; read by slime_spans_list alone
} Span;

enum { SPAN_CHUNK = 4096 };

API int64_t slime_spans_count(const Span *spans, uint64_t n, int width, int64_t *counts) {
    int64_t found[SPAN_CHUNK];
    if (width != 1 && width != 2 && width != 4 && width != 8) return BAD_ARGUMENT;
    for (uint64_t s = 0; s < n; s++) {
        const uint8_t *old = (const uint8_t *)(uintptr_t)spans[s].old, *live = (const uint8_t *)(uintptr_t)spans[s].live;
        counts[s] = 0;
        for (uint64_t i = 0; i < spans[s].count; i += SPAN_CHUNK) {
            uint64_t some = spans[s].count - i < SPAN_CHUNK ? spans[s].count - i : SPAN_CHUNK;
            counts[s] += slime_diff(old + i * (uint64_t)width, live + i * (uint64_t)width, some, width, 0, found, 0);
        }
    }
    return 0;
}

// positions, old, new [room]: what changed, or with `everything` all elements, of each span from its `at` on.
API int64_t slime_spans_list(const Span *spans, uint64_t n, int width, int everything, int32_t *positions, uint8_t *old, uint8_t *new, uint64_t room) {
    int64_t found[SPAN_CHUNK];
    if (width != 1 && width != 2 && width != 4 && width != 8) return BAD_ARGUMENT;
    for (uint64_t s = 0; s < n; s++) {
        const uint8_t *before = (const uint8_t *)(uintptr_t)spans[s].old, *after = (const uint8_t *)(uintptr_t)spans[s].live;
        uint64_t at = spans[s].at;
        for (uint64_t i = 0; i < spans[s].count; i += SPAN_CHUNK) {
            uint64_t some = spans[s].count - i < SPAN_CHUNK ? spans[s].count - i : SPAN_CHUNK, k = some;
            const uint8_t *a = before + i * (uint64_t)width, *b = after + i * (uint64_t)width;
            if (everything)
                for (uint64_t e = 0; e < some; e++) found[e] = (int64_t)e;
            else
                k = (uint64_t)slime_diff(a, b, some, width, 0, found, 0);
            if (at > room || k > room - at) return NO_ROOM;
            for (uint64_t e = 0; e < k; e++, at++) {
                positions[at] = (int32_t)(spans[s].first + i + (uint64_t)found[e]);
                store(old, at, load(a, (uint64_t)found[e], width), width);
                store(new, at, load(b, (uint64_t)found[e], width), width);
            }
        }
    }
    return 0;
}

// `n` stretches of memory, one after the other.
API void slime_collect(const uint64_t *addresses, const uint64_t *sizes, uint64_t n, uint8_t *out) {
    for (uint64_t i = 0; i < n; out += sizes[i++]) memcpy(out, (const void *)(uintptr_t)addresses[i], sizes[i]);
}

// ---- steps: gaps between changed positions, and steps in units in the last place ----
//
// gaps   distance to the last position less one. gap_width 1: a byte, 255 = 255 unchanged elements and go on. gap_width 2: the same with
//        65535, the high bytes in `gaps` and the low ones in `low`.
// signs  a bit each, 1 = down.   flags  a bit each, 1 = more than one unit.   large  of the flagged ones: magnitude - 2, 255 = see raw
// raw    new bits of those that are too far

typedef struct {
    uint64_t gaps, large, raw;  // elements of each stream
} StepSizes;

INLINE int64_t steps_encode_of(const uint8_t *old, const uint8_t *new, uint64_t n, uint8_t *signs, uint8_t *flags,
                               uint8_t *large, uint8_t *raw, StepSizes *sizes, int width, int is_float) {
    uint64_t larges = 0, raws = 0;
    memset(signs, 0, (n + 7) / 8);
    memset(flags, 0, (n + 7) / 8);
    for (uint64_t i = 0; i < n; i++) {
        unsigned down;
        uint64_t magnitude = step_of(load(old, i, width), load(new, i, width), width, is_float, &down);
        if (!magnitude) return BAD_VALUES;
        signs[i >> 3] |= (uint8_t)(down << (i & 7));
        if (magnitude == 1) continue;
        flags[i >> 3] |= (uint8_t)(1u << (i & 7));
        if (magnitude < 257) {
            large[larges++] = (uint8_t)(magnitude - 2);
        } else {
            large[larges++] = 255;
            store(raw, raws++, load(new, i, width), width);
        }
    }
    sizes->large = larges;
    sizes->raw = raws;
    return 0;
}

// positions ascending within [first, first + length); old, new [n]. `gaps` and `low` have room for n + length / 255 + 1, `large` and `raw` for n.
API int64_t slime_steps_encode(int width, int is_float, int gap_width, const int64_t *positions, const uint8_t *old, const uint8_t *new, uint64_t n,
                               int64_t first, int64_t length, uint8_t *gaps, uint8_t *low, uint8_t *signs, uint8_t *flags, uint8_t *large,
                               uint8_t *raw, StepSizes *sizes) {
    int64_t last = first - 1;
    uint64_t k = 0;
    for (uint64_t i = 0; i < n; i++) {
        if (positions[i] <= last || positions[i] >= first + length) return BAD_POSITIONS;
        uint64_t gap = (uint64_t)(positions[i] - last - 1);
        last = positions[i];
        if (gap_width == 1) {
            for (; gap >= 255; gap -= 255) gaps[k++] = 255;
            gaps[k++] = (uint8_t)gap;
        } else {
            for (; gap >= 65535; gap -= 65535, k++) gaps[k] = low[k] = 255;
            gaps[k] = (uint8_t)(gap >> 8);
            low[k++] = (uint8_t)gap;
        }
    }
    sizes->gaps = k;
    if (is_float) {
        BY_WIDTH(width, return steps_encode_of(old, new, n, signs, flags, large, raw, sizes, W, 1));
    }
    BY_WIDTH(width, return steps_encode_of(old, new, n, signs, flags, large, raw, sizes, W, 0));
}

#define ONES 0x0101010101010101ull

// Positions from gaps: exactly n of them, all below first + length, no gap left over. `low` is NULL for bytes.
static int64_t gaps_decode(const uint8_t *gaps, const uint8_t *low, uint64_t count, uint64_t n, int64_t first, int64_t length, int64_t *positions) {
    int64_t at = first - 1, end = first + length, ended = 1;
    uint64_t found = 0;
    int64_t skip = low ? 65535 : 255;
    for (uint64_t i = 0; i < count; i++) {
        for (uint64_t eight; !low && i + 8 <= count && found + 8 <= n; i += 8, found += 8) {
            memcpy(&eight, gaps + i, 8);
            if ((~eight - ONES) & eight & ONES << 7) break;  // one of the bytes is 255: these go one by one
            for (int b = 0; b < 8; b++) positions[found + b] = at += 1 + (int64_t)(eight >> 8 * b & 255);
            if (at >= end) return BAD_POSITIONS;  // positions ascend: the last is the highest
            ended = 1;
        }
        if (i == count) break;
        int64_t gap = low ? (int64_t)gaps[i] << 8 | low[i] : gaps[i];
        ended = gap != skip;
        at += gap + ended;
        if (at >= end || (ended && found == n)) return BAD_POSITIONS;
        if (ended) positions[found++] = at;
    }
    return found == n && ended ? 0 : BAD_POSITIONS;
}

// New bits of at most 64 changes. Types as narrow as the elements, for vectors.
INLINE void step_chunk(const uint8_t *restrict old, const int16_t *restrict steps, uint8_t *restrict new, int n, int width, int is_float) {
#define STEP(type) \
    for (int i = 0; i < n; i++) { \
        type bits, sign = (type)((type)1 << (8 * sizeof(type) - 1)); \
        memcpy(&bits, old + (uint64_t)i * sizeof(type), sizeof(type)); \
        if (is_float) bits ^= (type)(sign | ((type)(0 - (bits >> (8 * sizeof(type) - 1))) & (type)(sign - 1))); \
        bits = (type)(bits + (type)(int64_t)steps[i]); \
        if (is_float) bits ^= (type)(sign | ((type)((bits >> (8 * sizeof(type) - 1)) - 1) & (type)(sign - 1))); \
        memcpy(new + (uint64_t)i * sizeof(type), &bits, sizeof(type)); \
    }
    switch (width) {
    case 1: STEP(uint8_t); break;
    case 2: STEP(uint16_t); break;
    case 4: STEP(uint32_t); break;
    default: STEP(uint64_t); break;
    }
#undef STEP
}

// By 64 changes: the steps, without a branch by flag or sign, which are random where weights moved far; then all new bits at once.
INLINE int64_t steps_decode_of(const uint8_t *block, const int64_t *positions, uint64_t n, int64_t first, const uint8_t *signs, const uint8_t *flags,
                               const uint8_t *large, uint64_t larges, const uint8_t *raw, uint64_t raws, uint8_t *old, uint8_t *new, int width,
                               int is_float) {
    uint64_t l = 0, r = 0;
    for (uint64_t start = 0; start < n; start += 64) {
        int count = n - start < 64 ? (int)(n - start) : 64, used = 0, far = 0;
        uint64_t down = 0, flagged = 0, left = larges - l;
        uint8_t few[65] = {0};  // the last of `large`, so that the loop may read one more than there is
        const uint8_t *next = large + l;
        int16_t steps[64];
        for (uint64_t i = start; i < start + (uint64_t)count; i++) store(old, i, load(block, (uint64_t)(positions[i] - first), width), width);
        memcpy(&down, signs + start / 8, (uint64_t)(count + 7) / 8);
        memcpy(&flagged, flags + start / 8, (uint64_t)(count + 7) / 8);
        if ((uint64_t)__builtin_popcountll(flagged) > left) return BAD_VALUES;
        if (left < 65) next = memcpy(few, next, left);
        for (int i = 0; !flagged && i < count; i++) steps[i] = (int16_t)(1 - 2 * (int)(down >> i & 1));
        for (int i = 0; flagged && i < count; i++) {
            int flag = flagged >> i & 1, sign = down >> i & 1;
            steps[i] = (int16_t)(((1 + flag * (next[used] + 1)) ^ -sign) + sign);
            used += flag;
        }
        step_chunk(old + start * width, steps, new + start * width, count, width, is_float);
        for (int i = 0; i < used; i++) far |= next[i] == 255;
        for (int i = 0, k = 0; far && i < count; i++) {
            if (!(flagged >> i & 1) || next[k++] != 255) continue;
            if (r == raws) return BAD_VALUES;
            store(new, start + (uint64_t)i, load(raw, r++, width), width);
        }
        l += (uint64_t)used;
    }
    return l == larges && r == raws ? 0 : BAD_VALUES;
}

// A block and where its streams lie; `low` is 0 for gaps of one byte.
typedef struct {
    int64_t first, length;  // positions [first, first + length)
    uint64_t n;  // changes
    uint64_t gaps, low, signs, flags, large, raw;  // addresses
    uint64_t count, larges, raws;  // elements of gaps and low, of large, of raw
} StepsBlock;

#define BYTES(address) ((const uint8_t *)(uintptr_t)(address))

// Of every stretch of bytes: bits that are set, or with `full` bytes that are 255.
API int64_t slime_tally(const uint64_t *addresses, const uint64_t *sizes, uint64_t n, int full, int64_t *counts) {
    for (uint64_t i = 0; i < n; i++) {
        const uint8_t *bytes = BYTES(addresses[i]);
        int64_t found = 0;
        for (uint64_t k = 0; full && k < sizes[i]; k++) found += bytes[k] == 255;
        for (uint64_t k = 0; !full && k < sizes[i]; k++) found += __builtin_popcount(bytes[k]);
        counts[i] = found;
    }
    return 0;
}

// bits: old bits of the tensor from position `start` on. Fills positions, old, new with the changes of every block in turn. Where one says
// something impossible, `failed` is its number.
API int64_t slime_steps_decode(int width, int is_float, const uint8_t *bits, int64_t start, const StepsBlock *blocks, uint64_t count,
                               int64_t *positions, uint8_t *old, uint8_t *new, uint64_t *failed) {
    for (*failed = 0; *failed < count; blocks++, ++*failed) {
        const uint8_t *signs = BYTES(blocks->signs), *flags = BYTES(blocks->flags), *large = BYTES(blocks->large), *raw = BYTES(blocks->raw);
        const uint8_t *low = blocks->low ? BYTES(blocks->low) : NULL, *block = bits + (uint64_t)(blocks->first - start) * (uint64_t)width;
        uint64_t n = blocks->n, larges = blocks->larges, raws = blocks->raws;
        int64_t wrong = gaps_decode(BYTES(blocks->gaps), low, blocks->count, n, blocks->first, blocks->length, positions);
        if (wrong) return wrong;
        if (n & 7 && (signs[n >> 3] >> (n & 7) || flags[n >> 3] >> (n & 7))) return BAD_VALUES;
        if (is_float) {
            BY_WIDTH(width, wrong = steps_decode_of(block, positions, n, blocks->first, signs, flags, large, larges, raw, raws, old, new, W, 1));
        } else {
            BY_WIDTH(width, wrong = steps_decode_of(block, positions, n, blocks->first, signs, flags, large, larges, raw, raws, old, new, W, 0));
        }
        if (wrong) return wrong;
        positions += n, old += n * (uint64_t)width, new += n * (uint64_t)width;
    }
    return 0;
}

// ---- bits, lowest first, bounded ----

typedef struct {
    uint8_t *at, *end;
    uint64_t kept;
    int bits, full;
} Writer;

INLINE void put(Writer *to, uint64_t value, int bits) {  // at most 32 bits
    to->kept |= value << to->bits;
    to->bits += bits;
    if (to->bits < 32) return;
    uint32_t word = (uint32_t)to->kept;
    if (to->end - to->at >= 4) memcpy(to->at, &word, 4), to->at += 4;
    else to->full = 1;
    to->kept >>= 32;
    to->bits -= 32;
}

INLINE void put_rice(Writer *to, uint64_t value, int k) {
    uint64_t zeros = value >> k;
    for (; zeros >= 30; zeros -= 30) put(to, 0, 30);
    put(to, 1ull << zeros, (int)zeros + 1);
    put(to, value & ((1ull << k) - 1), k);
}

static int finish(Writer *to) {
    for (; to->bits > 0; to->bits -= 8, to->kept >>= 8) {
        if (to->at == to->end) return 0;
        *to->at++ = (uint8_t)to->kept;
    }
    return !to->full;
}

typedef struct {
    const uint8_t *at, *end;
    uint64_t kept;
    int bits;
    uint64_t past;  // zero bits that were given beyond the end
} Reader;

INLINE void fill(Reader *from) {  // at least 32 bits are there afterwards
    if (from->bits > 32) return;
    if (__builtin_expect(from->end - from->at >= 4, 1)) {
        uint32_t word;
        memcpy(&word, from->at, 4);
        from->kept |= (uint64_t)word << from->bits;
        from->at += 4;
        from->bits += 32;
        return;
    }
    for (; from->bits <= 56 && from->at < from->end; from->bits += 8) from->kept |= (uint64_t)*from->at++ << from->bits;
    if (from->bits <= 32) from->bits += 32, from->past += 32;
}

INLINE uint64_t take(Reader *from, int bits) {  // at most 32
    fill(from);
    uint64_t value = from->kept & ((1ull << bits) - 1);
    from->kept >>= bits;
    from->bits -= bits;
    return value;
}

// The number of zeros before the next one, or any number above `most` when there are more.
INLINE uint64_t take_zeros(Reader *from, uint64_t most) {
    uint64_t zeros = 0;
    fill(from);
    while (!(from->kept & 0x3fffffff)) {
        zeros += 30;
        from->kept >>= 30;
        from->bits -= 30;
        if (zeros > most) return zeros;
        fill(from);
    }
    int more = __builtin_ctzll(from->kept);
    from->kept >>= more + 1;
    from->bits -= more + 1;
    return zeros + more;
}

// Everything was read, nothing beyond the end, and the last byte's rest is zero.
static int read_out(const Reader *from) {
    return from->at == from->end && from->kept == 0 && from->past <= (uint64_t)from->bits && from->bits - (int64_t)from->past < 8;
}

// ---- exponent: Rice codes by the class of the old value's exponent, which both sides know ----
//
// Class 0: exponent >= top; class c: top - c; class 15: that and all below. An element's rank among its class is what gaps count, so that the
// classes that change often and those that do not have a code each. A class most of whose members change has gaps between the unchanged.
// head    u16 top; 16 bytes: k of the gaps (bits 0-4), bit 7 = gaps between the unchanged; 8 bytes: two nibbles, j of the steps, 15 = all are one unit
// gaps    at the start one of every class; then by chunks of 64 elements, in a chunk by class: at each end of a gap the next of its class; the
//         last counts the members that are left
// values  of each changed element: sign, Rice(magnitude - 1, j); 24 zeros = new bits follow

enum { CLASSES = 16, EXPONENTS = 2048, HEAD = 26, FAR = 24, UNITS = 15, INVERTED = 128, MOST_K = 20 };

typedef struct {
    uint64_t masks[CLASSES];  // of the members in a chunk of 64 elements
    uint8_t counts[CLASSES], classes[64];
} Chunk;

typedef void (*Sorter)(Chunk *, const uint8_t *, int, int, int, int, int);

INLINE int class_of(int exponent, int top) { return exponent >= top ? 0 : top - exponent > 15 ? 15 : top - exponent; }

// Classes of the first n elements; the rest of the 64 are of none. Types as narrow as the elements, for vectors.
INLINE void classify(Chunk *chunk, const uint8_t *block, int n, int width, int shift, int mask, int top) {
#define CLASSIFY(type) \
    for (int i = 0; i < n; i++) { \
        type exponent = (type)(load(block, (uint64_t)i, sizeof(type)) >> shift) & (type)mask; \
        type below = (type)top > exponent ? (type)((type)top - exponent) : 0; \
        chunk->classes[i] = (uint8_t)(below < 15 ? below : 15); \
    }
    if (n < 64) memset(chunk->classes, 255, 64);
    switch (width) {
    case 1: CLASSIFY(uint8_t); break;
    case 2: CLASSIFY(uint16_t); break;
    case 4: CLASSIFY(uint32_t); break;
    default: CLASSIFY(uint64_t); break;
    }
#undef CLASSIFY
}

static void sort_any(Chunk *chunk, const uint8_t *block, int n, int width, int shift, int mask, int top) {
    classify(chunk, block, n, width, shift, mask, top);
    memset(chunk->masks, 0, sizeof chunk->masks);
    memset(chunk->counts, 0, sizeof chunk->counts);
    for (int i = 0; i < n; i++) {
        chunk->masks[chunk->classes[i]] |= 1ull << i;
        chunk->counts[chunk->classes[i]]++;
    }
}

#if defined(__x86_64__)
AVX512 static void sort_512(Chunk *chunk, const uint8_t *block, int n, int width, int shift, int mask, int top) {
    if (n == 64 && width == 2) {
        for (int half = 0; half < 2; half++) {
            __m512i exponents = _mm512_srl_epi16(_mm512_loadu_si512(block + 64 * half), _mm_cvtsi32_si128(shift));
            exponents = _mm512_and_si512(exponents, _mm512_set1_epi16((short)mask));
            __m512i under = _mm512_min_epu16(_mm512_subs_epu16(_mm512_set1_epi16((short)top), exponents), _mm512_set1_epi16(15));
            _mm256_storeu_si256((__m256i *)(chunk->classes + 32 * half), _mm512_cvtepi16_epi8(under));
        }
    } else {
        classify(chunk, block, n, width, shift, mask, top);
    }
    __m512i classes = _mm512_loadu_si512(chunk->classes);
    for (int c = 0; c < CLASSES; c++) {
        chunk->masks[c] = _mm512_cmpeq_epi8_mask(classes, _mm512_set1_epi8((char)c));
        chunk->counts[c] = (uint8_t)_mm_popcnt_u64(chunk->masks[c]);
    }
}

AVX2 static void sort_256(Chunk *chunk, const uint8_t *block, int n, int width, int shift, int mask, int top) {
    if (n == 64 && width == 2) {
        for (int quarter = 0; quarter < 4; quarter++) {
            __m256i exponents = _mm256_srl_epi16(_mm256_loadu_si256((const __m256i *)(block + 32 * quarter)), _mm_cvtsi32_si128(shift));
            exponents = _mm256_and_si256(exponents, _mm256_set1_epi16((short)mask));
            __m256i under = _mm256_min_epu16(_mm256_subs_epu16(_mm256_set1_epi16((short)top), exponents), _mm256_set1_epi16(15));
            __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(under), _mm256_extracti128_si256(under, 1));
            _mm_storeu_si128((__m128i *)(chunk->classes + 16 * quarter), bytes);
        }
    } else {
        classify(chunk, block, n, width, shift, mask, top);
    }
    __m256i low = _mm256_loadu_si256((const __m256i *)chunk->classes), high = _mm256_loadu_si256((const __m256i *)(chunk->classes + 32));
    for (int c = 0; c < CLASSES; c++) {
        __m256i own = _mm256_set1_epi8((char)c);
        uint32_t first = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, own));
        chunk->masks[c] = (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, own)) << 32 | first;
        chunk->counts[c] = (uint8_t)_mm_popcnt_u64(chunk->masks[c]);
    }
}
#endif

static Sorter sorter(int level) {
#if defined(__x86_64__)
    level = best(level);
    if (level == 0) return sort_512;
    if (level == 1) return sort_256;
#else
    (void)level;
#endif
    return sort_any;
}

INLINE uint64_t below(int bit) { return ((uint64_t)1 << bit) - 1; }

// The Rice parameter for `count` values of this sum, if they are geometric. In integers: every machine chooses alike.
static int rice_k(uint64_t sum, uint64_t count, int most) {
    int k = 0;
    while (k < most && (count << k) * 2078 <= sum * 1000) k++;
    return k;
}

typedef struct {
    uint64_t members[CLASSES], changed[CLASSES], steps[CLASSES];  // steps: sum of magnitude - 1, each at most 2^20
    int k[CLASSES], j[CLASSES], inverted[CLASSES];
} Shape;

INLINE void shape_of(Shape *shape, const uint8_t *head) {
    for (int c = 0; c < CLASSES; c++) {
        shape->k[c] = head[2 + c] & 31;
        shape->inverted[c] = head[2 + c] >> 7;
        shape->j[c] = head[18 + c / 2] >> 4 * (c & 1) & 15;
    }
}

INLINE void put_value(Writer *to, uint64_t old, uint64_t new, int j, int width, int is_float) {
    unsigned down;
    uint64_t rest = step_of(old, new, width, is_float, &down) - 1;
    put(to, down, 1);
    if (j == UNITS) return;
    if (rest >> j < FAR) {
        put_rice(to, rest, j);
        return;
    }
    put(to, 1ull << FAR, FAR + 1);
    for (int bit = 0; bit < 8 * width; bit += 32) put(to, new >> bit & 0xffffffff, 8 * width - bit < 32 ? 8 * width - bit : 32);
}

INLINE int64_t exponent_encode_of(const uint8_t *block, uint64_t length, int shift, int bits, const int64_t *positions, const uint8_t *new, uint64_t n,
                                  int64_t first, uint32_t *queue, uint8_t *head, uint8_t *gaps, uint64_t gaps_room, uint8_t *values,
                                  uint64_t values_room, uint64_t *sizes, Sorter sort, int width, int is_float) {
    uint32_t histogram[2][EXPONENTS] = {{0}};
    Shape s = {{0}, {0}, {0}, {0}, {0}, {0}};
    uint64_t mask = ((uint64_t)1 << bits) - 1, above = 0;
    int top = (int)mask;
    for (uint64_t i = 0; i < length; i++) histogram[i & 1][load(block, i, width) >> shift & mask]++;
    for (; top > 0; top--) {  // a few outliers, NaN among them, do not set the scale
        above += histogram[0][top] + histogram[1][top];
        if (above > length >> 12) break;
    }
    for (int e = 0; e <= (int)mask; e++) s.members[class_of(e, top)] += histogram[0][e] + histogram[1][e];
    int64_t last = first - 1;
    for (uint64_t i = 0; i < n; i++) {
        unsigned down;
        if (positions[i] <= last || positions[i] >= first + (int64_t)length) return BAD_POSITIONS;
        last = positions[i];
        uint64_t old = load(block, (uint64_t)(last - first), width);
        uint64_t magnitude = step_of(old, load(new, i, width), width, is_float, &down);
        if (!magnitude) return BAD_VALUES;
        int c = class_of((int)(old >> shift & mask), top);
        s.changed[c]++;
        s.steps[c] += magnitude - 1 < 1 << 20 ? magnitude - 1 : 1 << 20;
    }
    head[0] = (uint8_t)top;
    head[1] = (uint8_t)(top >> 8);
    memset(head + 18, 0, 8);
    uint64_t run[CLASSES] = {0}, slot[CLASSES], queued = CLASSES;
    for (int c = 0; c < CLASSES; c++) {
        s.inverted[c] = 2 * s.changed[c] > s.members[c];
        uint64_t ends = s.inverted[c] ? s.members[c] - s.changed[c] : s.changed[c];
        s.k[c] = rice_k(s.members[c] - ends, ends + 1, MOST_K);
        s.j[c] = s.steps[c] ? rice_k(s.steps[c], s.changed[c], UNITS - 1) : UNITS;
        head[2 + c] = (uint8_t)(s.k[c] | (s.inverted[c] ? INVERTED : 0));
        head[18 + c / 2] |= (uint8_t)(s.j[c] << 4 * (c & 1));
        slot[c] = (uint64_t)c;
    }
    Writer out = {values, values + values_room, 0, 0, 0};
    uint64_t done = 0;
    for (uint64_t start = 0; start < length; start += 64) {
        Chunk chunk;
        uint64_t changed = 0;
        sort(&chunk, block + start * width, length - start < 64 ? (int)(length - start) : 64, width, shift, (int)mask, top);
        for (; done < n && (uint64_t)(positions[done] - first) < start + 64; done++) {
            uint64_t i = (uint64_t)(positions[done] - first);
            changed |= 1ull << (i - start);
            put_value(&out, load(block, i, width), load(new, done, width), s.j[chunk.classes[i - start]], width, is_float);
        }
        for (int c = 0; c < CLASSES; c++) {
            uint64_t members = chunk.masks[c], ends = members & (s.inverted[c] ? ~changed : changed);
            if (!ends) {
                run[c] += chunk.counts[c];
                continue;
            }
            for (; ends; ends &= ends - 1) {
                int bit = __builtin_ctzll(ends);
                run[c] += (uint64_t)__builtin_popcountll(members & below(bit));
                members &= ~below(bit) & ~(1ull << bit);
                queue[slot[c]] = (uint32_t)(run[c] | (uint64_t)c << 24);
                slot[c] = queued++;
                run[c] = 0;
            }
            run[c] = (uint64_t)__builtin_popcountll(members);
        }
    }
    for (int c = 0; c < CLASSES; c++) queue[slot[c]] = (uint32_t)(run[c] | (uint64_t)c << 24);
    Writer codes = {gaps, gaps + gaps_room, 0, 0, 0};
    for (uint64_t i = 0; i < queued; i++) put_rice(&codes, queue[i] & 0xffffff, s.k[queue[i] >> 24]);
    if (!finish(&codes) || !finish(&out)) return NO_ROOM;
    sizes[0] = (uint64_t)(codes.at - gaps);
    sizes[1] = (uint64_t)(out.at - values);
    return 0;
}

// block: all old bits; (shift, bits) of the exponent, (0, 0) for integers; queue [n + 16]; head [26]. length < 2^24.
API int64_t slime_exponent_encode(int width, const uint8_t *block, uint64_t length, int shift, int bits, const int64_t *positions, const uint8_t *new,
                                  uint64_t n, int64_t first, uint32_t *queue, uint8_t *head, uint8_t *gaps, uint64_t gaps_room, uint8_t *values,
                                  uint64_t values_room, uint64_t *sizes, int level) {
    if (length >> 24 || bits > 11) return BAD_ARGUMENT;
    Sorter sort = sorter(level);
#define ENCODE(is_float) \
    exponent_encode_of(block, length, shift, bits, positions, new, n, first, queue, head, gaps, gaps_room, values, values_room, sizes, sort, W, is_float)
    if (bits) {
        BY_WIDTH(width, return ENCODE(1));
    }
    BY_WIDTH(width, return ENCODE(0));
#undef ENCODE
}

INLINE int64_t take_value(Reader *from, uint64_t old, int j, uint64_t *new, int width, int is_float) {
    unsigned down = (unsigned)take(from, 1);
    uint64_t zeros = j == UNITS ? 0 : take_zeros(from, FAR);
    if (zeros < FAR) {
        uint64_t rest = j == UNITS ? 0 : zeros << j | take(from, j);
        *new = stepped(old, rest + 1, down, width, is_float);
        return 0;
    }
    if (zeros > FAR) return BAD_VALUES;
    *new = take(from, width < 4 ? 8 * width : 32);
    if (width == 8) *new |= take(from, 32) << 32;
    return 0;
}

// The next gap of a class, at most length + 2^k.
INLINE int64_t take_gap(Reader *from, int k, uint64_t length, uint32_t *gap) {
    uint64_t zeros = take_zeros(from, length >> k);
    *gap = (uint32_t)(zeros << k | take(from, k));
    return zeros > length >> k ? BAD_STREAM : 0;
}

INLINE int64_t exponent_decode_of(const uint8_t *block, uint64_t length, int shift, int mask, int top, const Shape *s, Reader *gaps, Reader *values,
                                  uint64_t n, int64_t first, int64_t *positions, uint8_t *olds, uint8_t *news, Sorter sort, int width,
                                  int is_float) {
    uint32_t left[CLASSES];
    uint64_t found = 0;
    for (int c = 0; c < CLASSES; c++)
        if (take_gap(gaps, s->k[c], length, left + c)) return BAD_STREAM;
    for (uint64_t start = 0; start < length; start += 64) {
        Chunk chunk;
        uint64_t changed = 0;
        sort(&chunk, block + start * width, length - start < 64 ? (int)(length - start) : 64, width, shift, mask, top);
        for (int c = 0; c < CLASSES; c++) {
            uint64_t members = chunk.masks[c], ends = 0;
            uint32_t count = chunk.counts[c];
            while (left[c] < count) {
                for (uint32_t i = 0; i < left[c]; i++) members &= members - 1;
                ends |= members & (0 - members);
                members &= members - 1;
                count -= left[c] + 1;
                if (take_gap(gaps, s->k[c], length, left + c)) return BAD_STREAM;
            }
            left[c] -= count;
            changed |= s->inverted[c] ? chunk.masks[c] & ~ends : ends;
        }
        for (; changed; changed &= changed - 1) {
            int i = __builtin_ctzll(changed);
            uint64_t old = load(block, start + (uint64_t)i, width), new;
            if (found == n) return BAD_POSITIONS;
            if (take_value(values, old, s->j[chunk.classes[i]], &new, width, is_float)) return BAD_VALUES;
            positions[found] = first + (int64_t)start + i;
            store(olds, found, old, width);
            store(news, found++, new, width);
        }
    }
    if (found != n) return BAD_POSITIONS;
    return read_out(gaps) && read_out(values) ? 0 : BAD_STREAM;
}

// Fills positions, olds and news [n].
API int64_t slime_exponent_decode(int width, const uint8_t *block, uint64_t length, int shift, int bits, const uint8_t *head, const uint8_t *gaps,
                                  uint64_t gaps_size, const uint8_t *values, uint64_t values_size, uint64_t n, int64_t first, int64_t *positions,
                                  uint8_t *olds, uint8_t *news, int level) {
    Shape s;
    Reader g = {gaps, gaps + gaps_size, 0, 0, 0}, v = {values, values + values_size, 0, 0, 0};
    Sorter sort = sorter(level);
    int top = head[0] | head[1] << 8, mask = (1 << bits) - 1;
    if (length >> 24 || bits > 11) return BAD_ARGUMENT;
    if (top > mask) return BAD_STREAM;
    shape_of(&s, head);
    for (int c = 0; c < CLASSES; c++)
        if (s.k[c] > MOST_K || head[2 + c] & 0x60) return BAD_STREAM;
#define DECODE(is_float) exponent_decode_of(block, length, shift, mask, top, &s, &g, &v, n, first, positions, olds, news, sort, W, is_float)
    if (bits) {
        BY_WIDTH(width, return DECODE(1));
    }
    BY_WIDTH(width, return DECODE(0));
#undef DECODE
}

// ---- byte planes: all lowest bytes, then all second ones ... ----

INLINE void split_of(const uint8_t *bits, uint64_t n, uint8_t *planes, int width) {
    for (uint64_t i = 0; i < n; i++) {
        uint64_t x = load(bits, i, width);
        for (int b = 0; b < width; b++) planes[b * n + i] = (uint8_t)(x >> 8 * b);
    }
}

INLINE void merge_of(const uint8_t *planes, uint64_t n, uint8_t *bits, int width) {
    for (uint64_t i = 0; i < n; i++) {
        uint64_t x = 0;
        for (int b = 0; b < width; b++) x |= (uint64_t)planes[b * n + i] << 8 * b;
        store(bits, i, x, width);
    }
}

API int64_t slime_split(int width, const uint8_t *bits, uint64_t n, uint8_t *planes) { BY_WIDTH(width, split_of(bits, n, planes, W)); return 0; }

API int64_t slime_merge(int width, const uint8_t *planes, uint64_t n, uint8_t *bits) { BY_WIDTH(width, merge_of(planes, n, bits, W)); return 0; }

// ---- fingerprint: see fingerprint.py ----

#define GOLD 0x9E3779B97F4A7C15ull

INLINE uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

INLINE uint64_t factor(uint64_t key, uint64_t i) { return mix(key + (i + 1) * GOLD) | 1; }

API int64_t slime_table(uint64_t key, uint64_t *table) {
    for (uint64_t j = 0; j < 1024; j++) table[j] = factor(key, j);
    return 0;
}

// sum of table[i] * word[i]. Halves of the factor apart: a multiplication of 32 bits each, and at most 1024 x 2^48 in a sum.
INLINE uint64_t dot_from(uint64_t i, uint64_t low, uint64_t high, const uint64_t *table, const uint8_t *words, uint64_t n, int size) {
    for (; i < n; i++) {
        uint64_t word = load(words, i, size);
        low += (uint64_t)(uint32_t)table[i] * word;
        high += (table[i] >> 32) * word;
    }
    return low + (high << 32);
}

#if defined(__x86_64__)
AVX512 INLINE uint64_t dot_512_of(const uint64_t *table, const uint8_t *words, uint64_t n, int size) {
    __m512i low = _mm512_setzero_si512(), high = low;
    uint64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m512i factors = _mm512_loadu_si512(table + i);
        __m512i word = size == 2 ? _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i *)(words + 2 * i)))
                                 : _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(words + i)));
        low = _mm512_add_epi64(low, _mm512_mul_epu32(factors, word));
        high = _mm512_add_epi64(high, _mm512_mul_epu32(_mm512_srli_epi64(factors, 32), word));
    }
    return dot_from(i, (uint64_t)_mm512_reduce_add_epi64(low), (uint64_t)_mm512_reduce_add_epi64(high), table, words, n, size);
}

AVX2 INLINE uint64_t dot_256_of(const uint64_t *table, const uint8_t *words, uint64_t n, int size) {
    __m256i low = _mm256_setzero_si256(), high = low;
    uint64_t i = 0, lows[4], highs[4];
    for (; i + 4 <= n; i += 4) {
        __m256i factors = _mm256_loadu_si256((const __m256i *)(table + i));
        uint64_t eight = 0;
        memcpy(&eight, words + i * (uint64_t)size, size == 2 ? 8 : 4);
        __m128i few = _mm_cvtsi64_si128((long long)eight);
        __m256i word = size == 2 ? _mm256_cvtepu16_epi64(few) : _mm256_cvtepu8_epi64(few);
        low = _mm256_add_epi64(low, _mm256_mul_epu32(factors, word));
        high = _mm256_add_epi64(high, _mm256_mul_epu32(_mm256_srli_epi64(factors, 32), word));
    }
    _mm256_storeu_si256((__m256i *)lows, low);
    _mm256_storeu_si256((__m256i *)highs, high);
    return dot_from(i, lows[0] + lows[1] + lows[2] + lows[3], highs[0] + highs[1] + highs[2] + highs[3], table, words, n, size);
}

AVX512 static uint64_t dot_512(const uint64_t *table, const uint8_t *words, uint64_t n, int size) {
    return size == 2 ? dot_512_of(table, words, n, 2) : dot_512_of(table, words, n, 1);
}

AVX2 static uint64_t dot_256(const uint64_t *table, const uint8_t *words, uint64_t n, int size) {
    return size == 2 ? dot_256_of(table, words, n, 2) : dot_256_of(table, words, n, 1);
}
#endif

static uint64_t dot(const uint64_t *table, const uint8_t *words, uint64_t n, int size, int level) {
#if defined(__x86_64__)
    if (level == 0) return dot_512(table, words, n, size);
    if (level == 1) return dot_256(table, words, n, size);
#else
    (void)level;
#endif
    return size == 2 ? dot_from(0, 0, 0, table, words, n, 2) : dot_from(0, 0, 0, table, words, n, 1);
}

// `size` bytes a word (1 or 2); `start` is the index of the first word in its tensor.
API uint64_t slime_fingerprint(const uint8_t *words, uint64_t start, uint64_t n, int size, uint64_t key, const uint64_t *table, int level) {
    uint64_t sum = 0;
    level = best(level);
    while (n) {
        uint64_t in = start & 1023, part = n < 1024 - in ? n : 1024 - in;
        sum += factor(key, start >> 10) * dot(table + in, words, part, size, level);
        words += part * (uint64_t)size;
        start += part;
        n -= part;
    }
    return sum;
}

// Whether n positions are consecutive; in any order they may not be, whatever the last one is.
INLINE int in_a_row(const int64_t *positions, uint64_t n) {
    int64_t differ = positions[n - 1] - positions[0] - (int64_t)(n - 1);
    for (uint64_t i = 0; !differ && i < n; i += 64)
        for (uint64_t k = i; k < n && k < i + 64; k++) differ |= positions[k] - positions[0] - (int64_t)k;
    return !differ;
}

// By rows of 1024 words: a row has one factor, and where its elements follow one another they are hashed as they lie.
// `olds` is NULL, or the bits that are subtracted from `bits`.
INLINE uint64_t at_of(const int64_t *positions, const uint8_t *olds, const uint8_t *bits, uint64_t n, uint64_t key, const uint64_t *table,
                      int width, int level) {
    uint64_t sum = 0, per = width == 1 ? 1 : width / 2, of_row = 1024 / per;
    for (uint64_t i = 0; i < n;) {
        uint64_t row = (uint64_t)positions[i] / of_row, in = (uint64_t)positions[i] % of_row, count = of_row - in, inner = 0;
        if (count <= n - i && count > 1 && in_a_row(positions + i, count)) {
            inner = dot(table + in * per, bits + i * width, count * per, width == 1 ? 1 : 2, level);
            if (olds) inner -= dot(table + in * per, olds + i * width, count * per, width == 1 ? 1 : 2, level);
            i += count;
        } else {
            for (; i < n && (uint64_t)positions[i] / of_row == row; i++) {
                uint64_t x = load(bits, i, width), y = olds ? load(olds, i, width) : 0, word = (uint64_t)positions[i] % of_row * per;
                for (uint64_t k = 0; k < per; k++) inner += table[word + k] * ((x >> 16 * k & 0xffff) - (y >> 16 * k & 0xffff));
            }
        }
        sum += factor(key, row) * inner;
    }
    return sum;
}

API int64_t slime_fingerprint_at(int width, const int64_t *positions, const uint8_t *bits, uint64_t n, uint64_t key, const uint64_t *table,
                                 uint64_t *out, int level) {
    level = best(level);
    BY_WIDTH(width, *out = at_of(positions, NULL, bits, n, key, table, W, level));
    return 0;
}

// By how much the fingerprint grows, modulo 2^64, where old becomes new.
API int64_t slime_fingerprint_moved(int width, const int64_t *positions, const uint8_t *old, const uint8_t *new, uint64_t n, uint64_t key,
                                    const uint64_t *table, uint64_t *out, int level) {
    level = best(level);
    BY_WIDTH(width, *out = at_of(positions, old, new, n, key, table, W, level));
    return 0;
}

typedef struct {
    uint64_t address, start, words, key;
    uint32_t out, size;
} Run;

API int64_t slime_over_runs(const Run *runs, uint64_t n, const uint64_t *table, uint64_t *out, uint64_t outs) {
    for (uint64_t i = 0; i < n; i++)
        if (runs[i].out >= outs || (runs[i].size != 1 && runs[i].size != 2)) return BAD_ARGUMENT;
    for (uint64_t i = 0; i < n; i++)
        out[runs[i].out] += slime_fingerprint((const uint8_t *)(uintptr_t)runs[i].address, runs[i].start, runs[i].words, (int)runs[i].size,
                                              runs[i].key, table, 0);
    return 0;
}

// ---- scatter and gather: staged bits [entries] <-> live memory of this process ----

typedef struct {
    uint64_t address, first, count, at;  // at: its first entry of index; entries of runs have none
    uint32_t width, run;
} Segment;

INLINE void move_of(const Segment *s, const uint32_t *index, uint8_t *bits, int write, int width) {
    uint8_t *live = (uint8_t *)(uintptr_t)s->address, *staged = bits + s->first * width;
    for (uint64_t e = 0; e < s->count; e++) {
        if (write) store(live, index[e], load(staged, e, width), width);
        else store(staged, e, load(live, index[e], width), width);
    }
}

// `entries` of bits and `indices` of index are there. write: bits -> live, otherwise live -> bits.
API int64_t slime_move(const Segment *segments, uint64_t n, const uint32_t *index, uint64_t indices, uint8_t *bits, uint64_t entries, int width, int write) {
    for (uint64_t i = 0; i < n; i++) {
        const Segment *s = segments + i;
        if (s->width != (uint32_t)width || s->first > entries || s->count > entries - s->first) return BAD_ARGUMENT;
        if (!s->run && (s->at > indices || s->count > indices - s->at)) return BAD_ARGUMENT;
    }
    for (uint64_t i = 0; i < n; i++) {
        const Segment *s = segments + i;
        if (s->run) {
            uint8_t *live = (uint8_t *)(uintptr_t)s->address, *staged = bits + s->first * (uint64_t)width;
            memcpy(write ? live : staged, write ? staged : live, s->count * (uint64_t)width);
        } else {
            BY_WIDTH(width, move_of(s, index + s->at, bits, write, W));
        }
    }
    return 0;
}

// ---- projection: changes of a tensor -> places in a storage, by stretches that are consecutive in both ----

enum { MOST_DIMENSIONS = 8 };

// The stretches of a strided block, in its order: `from` in the tensor and `to` in the storage are where the present one begins.
typedef struct {
    const int64_t *shape, *source, *target;  // of the dimensions outside a stretch; strides count elements
    int dims;
    int64_t length, from, to, digits[MOST_DIMENSIONS];
} Stretches;

// The stretch after the ones that have the same digits up to dimension `dims`, 0 where there is none.
INLINE int next_stretch(Stretches *s, int dims) {
    while (dims-- > 0) {
        if (++s->digits[dims] < s->shape[dims]) {
            s->from += s->source[dims];
            s->to += s->target[dims];
            return 1;
        }
        s->from -= (s->shape[dims] - 1) * s->source[dims];
        s->to -= (s->shape[dims] - 1) * s->target[dims];
        s->digits[dims] = 0;
    }
    return 0;
}

// The first stretch that ends after position `at` of the block's reach, 0 where there is none.
static int find_stretch(Stretches *s, int64_t at) {
    int64_t rest = at < 0 ? 0 : at;
    memset(s->digits, 0, sizeof s->digits);
    s->from = s->to = 0;
    for (int d = 0; d < s->dims; d++) {
        int64_t digit = rest / s->source[d];
        if (digit >= s->shape[d]) return next_stretch(s, d);
        s->digits[d] = digit;
        s->from += digit * s->source[d];
        s->to += digit * s->target[d];
        rest -= digit * s->source[d];
    }
    return rest < s->length || next_stretch(s, s->dims);
}

// The first of positions [i, n), which ascend, that is at least `least`; n where none is.
INLINE uint64_t first_from(const int64_t *positions, uint64_t i, uint64_t n, int64_t least) {
    if (i == n || positions[i] >= least) return i;
    uint64_t most = (uint64_t)(least - positions[i]), low = i, high, step = 1;
    if (most <= n - i && positions[i + most - 1] == least - 1) return i + most;  // all are listed
    if (most > n - i) most = n - i;
    while (step < most && positions[i + step] < least) low = i + step, step *= 2;
    high = step < most ? i + step : i + most;
    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;
        if (positions[middle] < least) low = middle;
        else high = middle;
    }
    return high;
}

INLINE int64_t project_of(Stretches *s, int64_t source, int64_t target, const int64_t *positions, const uint8_t *olds, const uint8_t *news, uint64_t n,
                          int64_t *to, uint8_t *old, uint8_t *new, uint64_t room, int width) {
    uint64_t found = 0, i = 0;
    int more = n && find_stretch(s, positions[0] - source);
    while (more) {
        i = first_from(positions, i, n, source + s->from);
        if (i == n) break;
        int64_t end = source + s->from + s->length, shift = target + s->to - source - s->from;
        if (positions[i] >= end) {
            more = find_stretch(s, positions[i] - source);
            continue;
        }
        uint64_t last = first_from(positions, i, n, end), count = last - i;
        if (count > room - found) return NO_ROOM;
        for (uint64_t k = 0; k < count; k++) to[found + k] = positions[i + k] + shift;
        if (count < 16) {
            for (uint64_t k = 0; k < count; k++) store(old, found + k, load(olds, i + k, width), width);
            for (uint64_t k = 0; k < count; k++) store(new, found + k, load(news, i + k, width), width);
        } else {
            memcpy(old + found * width, olds + i * width, count * (uint64_t)width);
            memcpy(new + found * width, news + i * width, count * (uint64_t)width);
        }
        found += count;
        i = last;
        more = next_stretch(s, s->dims);
    }
    return (int64_t)found;
}

// positions ascending, olds and news [n]; the move: where it begins in the tensor and in the storage, then shape, strides in the tensor and
// in the storage, [dims] each. Fills what of them lies in the move: `to`, its positions in the storage, old and new [room]. Returns how many.
API int64_t slime_project(int width, const int64_t *positions, const uint8_t *olds, const uint8_t *news, uint64_t n, const int64_t *move, int dims,
                          int64_t *to, uint8_t *old, uint8_t *new, uint64_t room) {
    if (dims < 0 || dims > MOST_DIMENSIONS) return BAD_ARGUMENT;
    Stretches s = {move + 2, move + 2 + dims, move + 2 + 2 * dims, dims, 1, 0, 0, {0}};
    for (int d = 0; d < dims; d++)
        if (s.shape[d] < 1 || s.source[d] < 1) return BAD_ARGUMENT;
    if (dims && s.source[dims - 1] == 1 && s.target[dims - 1] == 1) s.length = s.shape[--s.dims];
    BY_WIDTH(width, return project_of(&s, move[0], move[1], positions, olds, news, n, to, old, new, room, W));
}

// Stretches of at least `least` consecutive positions of n, which ascend: first entry and the one after the last, in `out` [room][2]. Returns
// how many. A stretch that long has no break between an entry and the one `least` - 1 later, so most entries are never looked at.
API int64_t slime_runs(const int64_t *positions, uint64_t n, uint64_t least, int64_t *out, uint64_t room) {
    uint64_t found = 0, start = 0;
    if (least < 2) return BAD_ARGUMENT;
    while (n - start >= least) {
        uint64_t end = start + least;
        if (positions[end - 1] - positions[start] != (int64_t)(least - 1)) {
            for (start = end - 1; positions[start] == positions[start - 1] + 1;) start--;
            continue;
        }
        for (uint64_t high = n; end < high;) {  // it goes on up to the last entry that is as far away as its number says
            uint64_t middle = end + (high - end) / 2;
            if (positions[middle] - positions[start] == (int64_t)(middle - start)) end = middle + 1;
            else high = middle;
        }
        if (found == room) return NO_ROOM;
        out[2 * found] = (int64_t)start;
        out[2 * found++ + 1] = (int64_t)end;
        start = end;
    }
    return (int64_t)found;
}
