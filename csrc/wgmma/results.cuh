// From sums to numbers of y, and between the lanes that have them and rows of y in memory.
#pragma once

#include <wgmma/main_loop.cuh>

namespace sparsebert::wgmma {

template <Element ELEMENT, Pattern PATTERN, int TILE>
class Results : protected MainLoop<ELEMENT, PATTERN, TILE> {
  protected:
    using Loop = MainLoop<ELEMENT, PATTERN, TILE>;
    using Loop::args, Loop::maps, Loop::tile, Loop::shared, Loop::thread, Loop::consumer, Loop::warp, Loop::lane;
    using Loop::CHUNK_TOKENS, Loop::INTEGER, Loop::STAGES;
    using typename Loop::Sum;

    SB_DEVICE Results(const Arguments& arguments, const Maps& tensor_maps) : Loop(arguments, tensor_maps) {}

    // Numbers

    // What a lane's features, g and g + 8 of its warp's 16, have in common.
    struct Row {
        float bias;
        float scale;
    };

    SB_DEVICE Row row_of(int feature) const {
        const bool there = feature < args.out_features;
        return {
            there && args.bias ? load_number(args.bias, args.bias_number, feature) : 0.0f,
            INTEGER ? there ? load_global(args.scale + feature) : 0.0f : args.alpha,
        };
    }
    SB_DEVICE float x_scale_of(int token) const {
        return INTEGER && token < args.tokens ? load_global(args.x_scale + token) : 1.0f;
    }
    SB_DEVICE static float before_activation(Sum sum, float x_scale, const Row& row) {
        const float number = static_cast<float>(sum);
        return INTEGER ? add_rn(multiply_rn(multiply_rn(number, x_scale), row.scale), row.bias)
                       : row.scale * number + row.bias;
    }
    // With the activation as a constant: a switch at each number of a loop that is written out would be executed in pieces all
    // over its code, which no instruction cache holds.
    template <typename Do>
    SB_DEVICE void by_activation(const Do& act) const {
        switch (args.activation) {
            case Activation::gelu:
                return act(std::integral_constant<Activation, Activation::gelu>{});
            case Activation::gelu_tanh:
                return act(std::integral_constant<Activation, Activation::gelu_tanh>{});
            case Activation::relu:
                return act(std::integral_constant<Activation, Activation::relu>{});
            default:
                return act(std::integral_constant<Activation, Activation::none>{});
        }
    }
    SB_DEVICE int64_t index_of(int token, int feature) const {
        return static_cast<int64_t>(token) * args.out_features + feature;
    }

    // The threads of a warpgroup that multiplies, and of both.
    SB_DEVICE void sync_consumer() const { sync_named(1 + consumer, 128); }
    SB_DEVICE static void sync_consumers() { sync_named(1 + CONSUMERS, 128 * CONSUMERS); }

    // Shared memory

    // y in 16 bits goes through shared memory, 64 tokens at a time, transposed on the way: a row there has the warpgroup's
    // 64 features of a token, chunk c of token i being at c ^ i % 8. The residual comes by the same places.
    static constexpr int ROW = BLOCK_FEATURES * 2, CHUNK = 16, ROW_CHUNKS = ROW / CHUNK;  // bytes

    SB_DEVICE uint8_t* store_place() const {
        return shared + STAGES * tile.bytes(PATTERN) + consumer * STORE_TOKENS * ROW;
    }
    SB_DEVICE uint8_t* chunk_of(int row, int chunk) const { return store_place() + row * ROW + (chunk ^ row % 8) * CHUNK; }

    // y's type, of 16 bits: of floats that of x, of int8 what the call says. One code for both: it is the longest there is.
    using X = typename Types<ELEMENT>::X;
    SB_DEVICE uint32_t bits_of(float number) const {
        if constexpr (INTEGER) {
            return args.y_number == Number::half ? from_float<Half>(number).bits : from_float<BFloat16>(number).bits;
        } else {
            return from_float<X>(number).bits;
        }
    }
    SB_DEVICE float number_of(uint16_t bits) const {
        if constexpr (INTEGER) {
            return args.y_number == Number::half ? to_float(Half{bits}) : to_float(BFloat16{bits});
        } else {
            return to_float(X{bits});
        }
    }

    // The lanes of a warp hand over what they have of 64 tokens of its 16 features: `fill(chunk, numbers)` makes the four
    // numbers of a chunk of these 64 tokens, in the order of sums; before, they are what lies there, where there is a
    // residual.
    template <typename Fill>
    SB_DEVICE void put(const Fill& fill) const {
#pragma unroll
        for (int part = 0; part < STORE_TOKENS; part += TOKENS_AT_ONCE) {
            uint32_t words[4] = {};
            if (args.residual) load_matrices_transposed(words, own_place(part));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t* const own = words + 2 * half;
                float numbers[4] = {low_of(own[0]), high_of(own[0]), low_of(own[1]), high_of(own[1])};
                fill(part / CHUNK_TOKENS + half, numbers);
                own[0] = bits_of(numbers[0]) | bits_of(numbers[1]) << 16;
                own[1] = bits_of(numbers[2]) | bits_of(numbers[3]) << 16;
            }
            store_matrices_transposed(own_place(part), words);
        }
    }
    // And take them: `take(chunk, numbers)`.
    template <typename Take>
    SB_DEVICE void get(const Take& take) const {
#pragma unroll
        for (int part = 0; part < STORE_TOKENS; part += TOKENS_AT_ONCE) {
            uint32_t words[4];
            load_matrices_transposed(words, own_place(part));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t* const own = words + 2 * half;
                const float numbers[4] = {low_of(own[0]), high_of(own[0]), low_of(own[1]), high_of(own[1])};
                take(part / CHUNK_TOKENS + half, numbers);
            }
        }
    }
    static constexpr int TOKENS_AT_ONCE = 16;
    // Of the row of 8 features that this lane names.
    SB_DEVICE uint8_t* own_place(int part) const {
        return chunk_of(part + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
    }
    SB_DEVICE float low_of(uint32_t word) const { return number_of(static_cast<uint16_t>(word)); }
    SB_DEVICE float high_of(uint32_t word) const { return number_of(static_cast<uint16_t>(word >> 16)); }

    // What this warpgroup stored before has left its place.
    SB_DEVICE void wait_for_place() const {
        if (thread % 128 == 0) wait_stores_read<0>();
        sync_consumer();
    }
    // What was put becomes y, from this token and feature on.
    SB_DEVICE void store_by_copy(int token, int feature) const {
        fence_async_proxy();
        sync_consumer();
        if (thread % 128 == 0) {
            store_tile(maps.y, feature, token, store_place());
            commit_stores();
        }
    }

    // A thread's pieces of a store: 16 bytes of a row, in shared memory and in a matrix of y's shape; `there` numbers of
    // them exist. They move together where all rows begin at multiples of 16 bytes.
    static constexpr int PIECE = CHUNK / 2;
    struct Piece {
        uint16_t* here;
        int64_t index;
        int there;
    };
    SB_DEVICE Piece piece_of(int i, int token, int feature) const {
        const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
        const int own_feature = feature + chunk * PIECE;
        const int left = token + row < args.tokens ? args.out_features - own_feature : 0;
        auto* const here = reinterpret_cast<uint16_t*>(chunk_of(row, chunk));
        return {here, index_of(token + row, own_feature), left < PIECE ? left : PIECE};
    }

    // The residual of 64 tokens comes to where y of them will lie.
    SB_DEVICE void load_residual(int token, int feature) const {
        const auto* const residual = static_cast<const uint16_t*>(args.residual);
#pragma unroll 1
        for (int i = thread % 128; i < STORE_TOKENS * ROW_CHUNKS; i += 128) {
            const auto [here, index, there] = piece_of(i, token, feature);
            Words4 words{};
            if (args.tiled && there > 0) words = load_global(reinterpret_cast<const Words4*>(residual + index));
            store_shared(reinterpret_cast<Words4*>(here), words);
            if (args.tiled) continue;
            for (int j = 0; j < there; ++j) store_shared(here + j, load_global(residual + index + j));
        }
        sync_consumer();
    }

    // What was put becomes rows of y at any address.
    SB_DEVICE void store_rows(int token, int feature) const {
        auto* const y = static_cast<uint16_t*>(args.y);
        sync_consumer();
#pragma unroll 1
        for (int i = thread % 128; i < STORE_TOKENS * ROW_CHUNKS; i += 128) {
            const auto [here, index, there] = piece_of(i, token, feature);
            for (int j = 0; j < there; ++j) store_global(y + index + j, load_shared(here + j));
        }
    }
};

}  // namespace sparsebert::wgmma
