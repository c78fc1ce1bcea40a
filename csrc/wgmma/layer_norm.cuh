// y = LayerNorm(alpha x Wᵀ + b + r) on Hopper's wgmma, in one launch; if asked, also its rows as int8, a scale each.
//
// The features of a row are spread over a cluster: each of its blocks has 128 of them, of the same 64 tokens. What is
// normalized stays in registers and is not rounded. Lanes, warps and blocks join the means of their features and the
// squares about these, of as many features on each side: nothing cancels where a mean is large. Blocks send theirs to
// each other and join what came in the order of ranks, so that all have the same bits.
//
// What is quantized is y as it is stored. Blocks tell each other the largest magnitude of each row, also where the
// scale is given: it shows whether the row is finite, and in 16 bits a single feature can be infinite.
//
// The residual, and int8's scales of tokens, come while the products of their tile run.
#pragma once

#include <wgmma/layer_norm_call.h>
#include <wgmma/results.cuh>

namespace sparsebert::wgmma {

struct NormArguments {
    TensorMap residual;        // [tokens][out_features], in y's type
    const void* gamma;         // [out_features]
    const void* beta;          // [out_features]
    int8_t* q;                 // [tokens][out_features], or null
    float* q_scale;            // [tokens], of q
    const float* input_scale;  // [], or null: each row has its own
    float eps;
    Number gamma_number;
    Number beta_number;
    bool has_residual;
};

template <Element ELEMENT, Pattern PATTERN>
class LinearLayerNorm : Results<ELEMENT, PATTERN, NORM_TILE> {
    using Loop = Results<ELEMENT, PATTERN, NORM_TILE>;
    using Loop::args, Loop::maps, Loop::tile, Loop::shared, Loop::thread, Loop::consumer, Loop::warp, Loop::lane;
    using Loop::CHUNKS, Loop::CHUNK_TOKENS, Loop::INTEGER, Loop::share;
    using typename Loop::Sum, typename Loop::Sums, typename Loop::Row;

  public:
    SB_DEVICE LinearLayerNorm(const Arguments& arguments, const Maps& tensor_maps, const NormArguments& norm_arguments)
        : Loop(arguments, tensor_maps), norm(norm_arguments) {}

    SB_DEVICE void run() {
        // Others see them with those of the loop.
        if (thread == 0) {
            for (int i = 0; i < 2; ++i) init_barrier(sent + i, args.sharing);
        }
        if (consumer >= 0) {
            load_features();
            if (is_first) {
                if (norm.has_residual) prefetch_map(norm.residual);
                init_barrier(arrived + consumer, 1);
                fence_barrier_init();
            }
        }
        const auto begin = [this] {
            wait_for_previous_kernels();
            fetch();
        };
        Loop::run(begin, [this](Sums& sums, int token, int) { finish(sums[0], token); });
    }

  private:
    static constexpr int LANES = NormShared::LANES;
    static constexpr int SUMS = tile.tokens / 2;  // of a lane, 4 for each chunk of tokens
    static constexpr int WARP_FEATURES = 16;
    static constexpr int PLACE_BYTES = STORE_TOKENS * Loop::ROW;

    // Of tokens 2i and 2i + 1, which are lane i's wherever lanes do not have sums.
    struct alignas(8) Scales {
        float of[2];
    };
    struct alignas(8) Maxima {
        uint32_t of[2];
    };
    // Of some features: their mean, and the sum of squares about it; in the end, what to multiply by.
    struct alignas(16) Moments {
        float mean[2];
        float spread[2];
    };

    struct Feature {
        Row row;
        float gamma;
        float beta;
    };

    const NormArguments& norm;
    uint8_t* const own = shared + tile.shared_bytes(PATTERN);
    Maxima* const maxima = reinterpret_cast<Maxima*>(own + NormShared::MAXIMA);
    Barrier* const sent = reinterpret_cast<Barrier*>(own + NormShared::BARRIERS);
    Barrier* const arrived = sent + 2;
    const bool is_first = thread % 128 == 0;   // of its warpgroup
    const int own_warp = 4 * consumer + warp;  // of those that multiply
    const int first_feature = share * tile.features() + consumer * BLOCK_FEATURES;
    Feature features[2];  // g and g + 8 of the warp's 16: those of all tiles, which differ in tokens alone
    Scales x_scales{};
    int index = Loop::cluster;  // of the tile that was fetched last
    int residuals = 0;          // that have arrived
    int exchanges = 0;

    SB_DEVICE void load_features() {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int feature = first_feature + WARP_FEATURES * warp + lane / 4 + 8 * row;
            features[row] = {this->row_of(feature), load_number(norm.gamma, norm.gamma_number, feature),
                             load_number(norm.beta, norm.beta_number, feature)};
        }
    }

    // What a tile takes beside its sums. No warp of this warpgroup still reads the place that y and the residual share.
    SB_DEVICE void fetch() {
        // y has left it, too; the others know after the barriers that follow.
        if (is_first) wait_stores_read<0>();
        if (index >= this->tiles()) return;
        const int token = this->place_of(index).token;
        if constexpr (INTEGER) {
#pragma unroll
            for (int i = 0; i < 2; ++i) x_scales.of[i] = this->x_scale_of(token + 2 * lane + i);
        }
        if (norm.has_residual && is_first) {
            arrive_expect(arrived + consumer, PLACE_BYTES);
            load_tile(this->store_place(), norm.residual, first_feature, token, arrived + consumer);
        }
    }

    SB_DEVICE void finish(const Sum (&sums)[SUMS], int token) {
        float z[SUMS];
        scale(sums, z);
        if (norm.has_residual) {
            wait_barrier(arrived + consumer, residuals++ % 2);
            this->get([&](int chunk, const float (&residual)[4]) {
                for (int i = 0; i < 4; ++i) z[4 * chunk + i] += residual[i];
            });
        }
        normalize(z);
        // Its arguments have no residual, which it would add.
        this->put([&](int chunk, float (&numbers)[4]) {
            for (int i = 0; i < 4; ++i) numbers[i] = z[4 * chunk + i];
        });
        fence_async_proxy();
        // Both warpgroups: what warps told each other has been read, and the next tile may overwrite it.
        this->sync_consumers();
        if (is_first) {
            store_tile(maps.y, first_feature, token, this->store_place());
            commit_stores();
        }
        if (norm.q) quantize(token);
        index += this->clusters();
        fetch();
    }

    SB_DEVICE void scale(const Sum (&sums)[SUMS], float (&z)[SUMS]) const {
        auto* const scales = reinterpret_cast<Scales*>(own_tokens());
        if constexpr (INTEGER) {
            store_shared(scales + lane, x_scales);
            sync_warp();
        }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const Scales x_scale = INTEGER ? load_shared(scales + pair_of(chunk)) : Scales{};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Sum sum = sums[4 * chunk + i];
                z[4 * chunk + i] = Loop::before_activation(sum, x_scale.of[i % 2], features[i / 2].row);
            }
        }
    }

    // The pair of tokens that a lane has sums of.
    SB_DEVICE int pair_of(int chunk) const { return CHUNK_TOKENS / 2 * chunk + lane % 4; }
    SB_DEVICE uint8_t* own_tokens() const { return own + NormShared::TOKENS + own_warp * NormShared::OF_WARP; }

    // Statistics

    SB_DEVICE void normalize(float (&z)[SUMS]) {
        auto* const parts = reinterpret_cast<Moments*>(own + NormShared::PARTS);
        store_shared(parts + own_warp * LANES + lane, moments_of_warp(z));
        this->sync_consumers();
        const auto of_block = [&] { return join(parts + lane, NormShared::WARPS, WARP_FEATURES); };
        const Moments* const of_blocks = exchange<Moments>(of_block);
        Moments of_row = join(of_blocks + lane, args.sharing, tile.features());
#pragma unroll
        for (float& spread : of_row.spread) {
            const float variance = spread * part_of(args.out_features);
            spread = divide_rn(1.0f, sqrtf(variance + norm.eps));
        }
        auto* const tokens = reinterpret_cast<Moments*>(own_tokens());
        store_shared(tokens + lane, of_row);
        sync_warp();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const Moments of_chunk = load_shared(tokens + pair_of(chunk));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& value = z[4 * chunk + i];
                const Feature& feature = features[i / 2];
                value = (value - of_chunk.mean[i % 2]) * of_chunk.spread[i % 2] * feature.gamma + feature.beta;
            }
        }
    }

    // Of the warp's 16 features. Lanes that have the same 16 tokens share them out: in each of three steps a lane keeps
    // half of what it has and gives the other half away.
    SB_DEVICE Moments moments_of_warp(const float (&z)[SUMS]) const {
        float mean[SUMS / 2], spread[SUMS / 2];
#pragma unroll
        for (int i = 0; i < SUMS / 2; ++i) {
            const float low = z[i / 2 * 4 + i % 2], high = z[i / 2 * 4 + 2 + i % 2];
            mean[i] = 0.5f * (low + high);
            spread[i] = 0.5f * (low - high) * (low - high);
        }
#pragma unroll
        for (int step = 0; step < 3; ++step) {
            const int kept = SUMS / 4 >> step, bit = 16 >> step;
            const bool keeps_upper = lane & bit;
#pragma unroll
            for (int i = 0; i < SUMS / 4; ++i) {
                if (i >= kept) continue;
                const float mean_there = shuffle_xor(keeps_upper ? mean[i] : mean[i + kept], bit);
                const float spread_there = shuffle_xor(keeps_upper ? spread[i] : spread[i + kept], bit);
                const float mean_here = keeps_upper ? mean[i + kept] : mean[i];
                const float spread_here = keeps_upper ? spread[i + kept] : spread[i];
                const float apart = mean_there - mean_here;
                mean[i] = 0.5f * (mean_here + mean_there);
                // Each has 2 << step features.
                spread[i] = spread_here + spread_there + static_cast<float>(1 << step) * (apart * apart);
            }
        }
        return {{mean[0], mean[1]}, {spread[0], spread[1]}};
    }

    SB_DEVICE static float part_of(int count) { return divide_rn(1.0f, static_cast<float>(count)); }

    // `count` parts, LANES apart, of as many features each. What is added up is how far their means are from the first:
    // a row of equal numbers has exactly that mean.
    SB_DEVICE static Moments join(const Moments* part, int count, int features) {
        constexpr int MOST = NormShared::WARPS;
        float mean[MOST][2] = {}, spread[MOST][2] = {};
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (i >= count) continue;
            const Moments one = load_shared(part + i * LANES);
#pragma unroll
            for (int token = 0; token < 2; ++token) {
                mean[i][token] = one.mean[token];
                spread[i][token] = one.spread[token];
            }
        }
        Moments all{};
#pragma unroll
        for (int token = 0; token < 2; ++token) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 1; i < MOST; ++i) sum += i < count ? mean[i][token] - mean[0][token] : 0.0f;
            all.mean[token] = mean[0][token] + sum * part_of(count);
#pragma unroll
            for (int i = 0; i < MOST; ++i) {
                const float apart = mean[i][token] - all.mean[token];
                const float squares = spread[i][token] + static_cast<float>(features) * (apart * apart);
                all.spread[token] += i < count ? squares : 0.0f;
            }
        }
        return all;
    }

    // What a lane's `part()` is of this block goes to all blocks, and theirs come here: block after block, LANES apart.
    //
    // Exchanges take turns at two places, each with its barrier. Who sends to a place again has waited for the exchange
    // between. To that one every block sent when all its warps had met since they read this place, and since they had
    // arrived at its barrier: nothing is overwritten that is still read, and no phase takes an arrival of a later one.
    template <typename Part, typename Value>
    SB_DEVICE const Part* exchange(const Value& part) {
        const int turn = exchanges % 2, parity = exchanges / 2 % 2;
        ++exchanges;
        auto* const parts = reinterpret_cast<Part*>(own + NormShared::EXCHANGES + turn * NormShared::OF_EXCHANGE);
        // A warp sends to the block whose rank is its number.
        if (own_warp < args.sharing) {
            store_remote(remote_address(parts + share * LANES + lane, own_warp), part());
            sync_warp();
            if (lane == 0) arrive_remote(sent + turn, own_warp);
        }
        wait_barrier_of_cluster(sent + turn, parity);
        return parts;
    }

    // int8

    // A thread takes 16 bytes of y in each of some rows; the eight of a row have all of the warpgroup's features.
    static constexpr int ROWS_AT_ONCE = 128 / Loop::ROW_CHUNKS, PIECES = STORE_TOKENS / ROWS_AT_ONCE;

    SB_DEVICE void quantize(int token) {
        const int chunk = thread % Loop::ROW_CHUNKS, first_row = thread % 128 / Loop::ROW_CHUNKS;
        auto* const of_rows = reinterpret_cast<uint32_t*>(maxima + consumer * LANES);
        Words4 pieces[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int row = first_row + i * ROWS_AT_ONCE;
            pieces[i] = load_shared(reinterpret_cast<const Words4*>(this->chunk_of(row, chunk)));
            uint32_t largest = largest_of(pieces[i]);
#pragma unroll
            for (int bit = 1; bit < Loop::ROW_CHUNKS; bit *= 2) largest = max(largest, shuffle_xor(largest, bit));
            if (chunk == 0) store_shared(of_rows + row, largest);
        }
        this->sync_consumers();
        const uint32_t* const words = exchange<uint32_t>([&] {
            const Maxima some = load_shared(maxima + lane), others = load_shared(maxima + LANES + lane);
            return max(some.of[0], others.of[0]) | max(some.of[1], others.of[1]) << 16;
        });
        Maxima largest{};
#pragma unroll 1
        for (int block = 0; block < args.sharing; ++block) {
            const uint32_t word = load_shared(words + block * LANES + lane);
            largest = {{max(largest.of[0], word & 0xffff), max(largest.of[1], word >> 16)}};
        }
        Scales inverses;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto [scale, inverse] = steps_of(this->low_of(largest.of[i]));
            inverses.of[i] = inverse;
            const int own_token = token + 2 * lane + i;
            const bool writes = share == 0 && own_warp == 0 && own_token < args.tokens;
            if (writes) store_global(norm.q_scale + own_token, scale);
        }
        store_shared(reinterpret_cast<Scales*>(own_tokens()) + lane, inverses);
        sync_warp();
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int row = first_row + i * ROWS_AT_ONCE;
            const float inverse = load_shared(reinterpret_cast<const float*>(own_tokens()) + row);
            const Quantized numbers = quantized(pieces[i], inverse);
            const int64_t place = this->index_of(token + row, first_feature + chunk * 8);
            if (token + row < args.tokens) store_vector(reinterpret_cast<uint32_t*>(norm.q + place), numbers.word);
        }
        // The next tile's scales go where the inverses are.
        sync_warp();
    }

    // Magnitudes are in the order of their bits, infinity and then NaN above all others.
    SB_DEVICE static uint32_t largest_of(const Words4& piece) {
        uint32_t largest = 0;
#pragma unroll
        for (const uint32_t word : piece.word) largest = max(largest, max(word & 0x7fff, word >> 16 & 0x7fff));
        return largest;
    }

    // As formats/int8.py has it, to the bit.
    struct Steps {
        float scale;
        float inverse;
    };
    SB_DEVICE Steps steps_of(float largest) const {
        if (norm.input_scale) {
            const float scale = load_global(norm.input_scale);
            // What was not finite shows.
            return {add_rn(multiply_rn(largest, 0.0f), scale), divide_rn(1.0f, scale)};
        }
        constexpr float TINY = 0x1p-118f, LIMIT = 127.0f;
        if (largest < TINY) return {1.0f, 0.0f};
        return {divide_rn(largest, LIMIT), divide_rn(LIMIT, largest)};
    }

    struct Quantized {
        uint32_t word[2];
    };
    SB_DEVICE Quantized quantized(const Words4& piece, float inverse) const {
        Quantized packed{};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t word = piece.word[i / 2];
            const float number = i % 2 ? this->high_of(word) : this->low_of(word);
            const float whole = fminf(fmaxf(rintf(multiply_rn(number, inverse)), -127.0f), 127.0f);
            packed.word[i / 4] |= (static_cast<uint32_t>(static_cast<int>(whole)) & 0xff) << i % 4 * 8;
        }
        return packed;
    }
};

template <Element ELEMENT, Pattern PATTERN>
SB_LONE_KERNEL(THREADS)
wgmma_layer_norm_kernel(const SB_PARAMETERS Arguments args, const SB_PARAMETERS Maps maps,
                        const SB_PARAMETERS NormArguments norm) {
    if constexpr (ON_HOPPER) {
        LinearLayerNorm<ELEMENT, PATTERN>(args, maps, norm).run();
    } else {
        stop_kernel();
    }
}

}  // namespace sparsebert::wgmma
