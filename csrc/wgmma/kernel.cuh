// y = activation(alpha x Wᵀ + b) on Hopper's wgmma, W dense, or 2:4 as a checkpoint holds it.
//
// As in nm24, yᵀ = W xᵀ is computed: features are the rows of the product, tokens its columns. Blocks stay on their
// multiprocessor and take one tile of y after the other. A warpgroup loads: one thread of it starts copies of whole
// tiles of x and W, which arrive swizzled in the next free stage. Two warpgroups multiply what has arrived, straight from
// shared memory, each 64 or 128 features by all tokens of the tile. A stage is free again when the products after its own
// have begun and its own have ended.
//
// At 2:4 the kept values are a matrix of half the width, row-major, which is what a copy takes; the positions, 4 bits for
// each group of 4, are the metadata of the product as they are, and come into registers one stage ahead. So the layout
// that is neutral on disk is run as it is.
//
// int8: the sums are int32 and exact, y = activation((sums s_x) s_w + b), rounded to y's type, or to int8 by a scale.
#pragma once

#include <common/activations.cuh>
#include <common/elements.cuh>
#include <common/hopper.cuh>
#include <common/products.cuh>
#include <wgmma/problem.h>

namespace sparsebert::wgmma {

struct Arguments {
    const uint8_t* positions;   // [out_features][in_features / 8], 2:4
    const void* bias;           // [out_features], or null
    const float* x_scale;       // [tokens], int8
    const float* scale;         // [out_features], int8
    const float* output_scale;  // [], of an int8 y
    void* y;                    // [tokens][out_features]
    float* y_scale;             // [tokens], of an int8 y
    int tokens;
    int in_features;
    int out_features;
    int blocks;  // of the grid
    float alpha;
    Activation activation;
    Number y_number;
    Number bias_number;
    bool tiled;  // y goes by copies of tiles, which take rows at multiples of 16 bytes, of 16-bit floats here
};

template <Element ELEMENT, Pattern PATTERN, int TILE>
class Linear {
    static constexpr Tile tile = TILES[TILE];
    static constexpr bool INTEGER = ELEMENT == Element::int8;
    static constexpr bool SPARSE = PATTERN == Pattern::nm24;
    using X = typename Types<ELEMENT>::X;
    using Sum = typename Types<ELEMENT>::Sum;

    static constexpr int STAGES = tile.stages(PATTERN);
    static constexpr int INPUTS = stage_inputs(ELEMENT);
    static constexpr int W_BYTES = weight_bytes(PATTERN);      // of a row, in a stage
    static constexpr int STEP_BYTES = 32;                      // of a row of the weight, in a product
    static constexpr int STEPS = W_BYTES / STEP_BYTES;
    static constexpr int X_STEP_BYTES = STAGE_BYTES / STEPS;
    static constexpr int BLOCK = BLOCK_FEATURES * W_BYTES;     // bytes of a warpgroup's product in a stage
    static constexpr int GROUP = 8;                            // tiles along tokens that run side by side
    static constexpr int METADATA = INTEGER ? STEPS : 1;       // words of a lane and product of 64 features, in a stage
    static constexpr uint32_t NO_METADATA = 0x44444444;        // of zeros: any legal one will do
    // What a thread has; together no more than 168, what they begin with.
    static constexpr int PRODUCER_REGISTERS = 40;
    static constexpr int CONSUMER_REGISTERS = 232;

    const Arguments& args;
    const TensorMap& x;
    const TensorMap& weight;
    const TensorMap& y;
    uint8_t* const shared = aligned_shared_memory();
    Barrier* const full = reinterpret_cast<Barrier*>(shared + STAGES * tile.bytes(PATTERN) + Tile::STORES);
    Barrier* const empty = full + STAGES;
    const int thread = thread_index();
    const int warpgroup = thread / 128;
    const int consumer = warpgroup - 1;
    const int warp = thread / 32 % 4;
    const int lane = thread % 32;
    const int feature_tiles = ceil_div(args.out_features, tile.features());
    const int token_tiles = ceil_div(args.tokens, tile.tokens);
    const int input_stages = ceil_div(args.in_features, INPUTS);

  public:
    SB_DEVICE Linear(const Arguments& arguments, const TensorMap& x_map, const TensorMap& weight_map, const TensorMap& y_map)
        : args(arguments), x(x_map), weight(weight_map), y(y_map) {}

    SB_DEVICE void run() {
        if (thread == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                init_barrier(full + stage, 1);
                init_barrier(empty + stage, CONSUMERS * 4);
            }
            fence_barrier_init();
        }
        sync_block();
        if (warpgroup == 0) {
            give_registers<PRODUCER_REGISTERS>();
            if (thread == 0) load_all();
        } else {
            take_registers<CONSUMER_REGISTERS>();
            multiply_all();
        }
    }

  private:
    // A place in the ring of stages.
    struct Ring {
        int stage = 0;
        int parity = 0;

        SB_DEVICE void advance() {
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
    };

    // First token and feature of a tile.
    struct Place {
        int token;
        int feature;
    };

    // Tiles in the order of blocks: a few along the tokens, then along the features, so that what runs at the same time
    // shares both weights and activations in the L2.
    SB_DEVICE Place place_of(int index) const {
        const int group = index / (GROUP * feature_tiles);
        const int within = index % (GROUP * feature_tiles);
        const int left = token_tiles - group * GROUP;
        const int height = left < GROUP ? left : GROUP;
        return {(group * GROUP + within % height) * tile.tokens, within / height * tile.features()};
    }

    SB_DEVICE uint8_t* x_of(int stage) const { return shared + stage * tile.bytes(PATTERN); }
    SB_DEVICE uint8_t* weight_of(int stage) const { return x_of(stage) + tile.tokens * STAGE_BYTES; }

    // Loads

    // By one thread. Weights are no other kernel's: the first of them are fetched while the kernel before still runs.
    SB_DEVICE void load_all() {
        prefetch_map(x);
        prefetch_map(weight);
        const int tiles = feature_tiles * token_tiles;
        const int own_tiles = (tiles - block_x() + args.blocks - 1) / args.blocks;
        const int own = own_tiles * input_stages;
        const int ahead = own < STAGES ? own : STAGES;
        for (int i = 0; i < ahead; ++i) {
            arrive_expect(full + i, tile.bytes(PATTERN));
            load_weight_tile(i, i);
        }
        wait_for_previous_kernels();
        for (int i = 0; i < ahead; ++i) load_x_tile(i, i);
        Ring ring;
        for (int i = ahead; i < own; ++i) {
            wait_barrier(empty + ring.stage, ring.parity);
            arrive_expect(full + ring.stage, tile.bytes(PATTERN));
            load_weight_tile(ring.stage, i);
            load_x_tile(ring.stage, i);
            ring.advance();
        }
    }

    // Of the i-th of this block's stages.
    SB_DEVICE void load_weight_tile(int stage, int i) const {
        const Place place = place_of(block_x() + i / input_stages * args.blocks);
        const int input = i % input_stages * (W_BYTES / int{sizeof(X)});
        load_tile(weight_of(stage), weight, input, place.feature, full + stage);
    }
    SB_DEVICE void load_x_tile(int stage, int i) const {
        const Place place = place_of(block_x() + i / input_stages * args.blocks);
        load_tile(x_of(stage), x, i % input_stages * INPUTS, place.token, full + stage);
    }

    // Products

    using Sums = Sum[tile.blocks][tile.tokens / 2];
    using Metadata = uint32_t[tile.blocks][METADATA];

    SB_DEVICE void multiply_all() {
        Ring ring;
        for (int index = block_x(); index < feature_tiles * token_tiles; index += args.blocks) {
            const Place place = place_of(index);
            const int feature = place.feature + consumer * tile.blocks * BLOCK_FEATURES;
            Sums sums;
            // They change places without being copied: products under way read one of them.
            Metadata even, odd;
            load_metadata(even, feature, 0);
            int last = 0;
            for (int i = 0; i < input_stages; i += 2) {
                multiply_and_go_on(sums, even, odd, feature, i, last, ring);
                if (i + 1 < input_stages) multiply_and_go_on(sums, odd, even, feature, i + 1, last, ring);
            }
            wait_for_sums(sums);
            release(last);
#pragma unroll
            for (int block = 0; block < tile.blocks; ++block)
                finish(sums[block], place.token, feature + block * BLOCK_FEATURES);
        }
        if (thread % 128 == 0) wait_stores_read<0>();
    }

    // The products of a stage begin; those of the stage before have ended then, and what they read is free.
    SB_DEVICE void multiply_and_go_on(
        Sums& sums, const Metadata& now, Metadata& next, int feature, int i, int& last, Ring& ring
    ) const {
        wait_barrier(full + ring.stage, ring.parity);
        multiply_stage(sums, now, ring.stage, i > 0);
        wait_products<1>();
        if (i > 0) release(last);
        if (i + 1 < input_stages) load_metadata(next, feature, i + 1);
        last = ring.stage;
        ring.advance();
    }

    // The products that read this stage have ended in this warp.
    SB_DEVICE void release(int stage) const {
        if (lane == 0) arrive(empty + stage);
    }

    SB_DEVICE static void wait_for_sums(Sum (&sums)[1][tile.tokens / 2]) { wait_products<0>(sums[0]); }
    SB_DEVICE static void wait_for_sums(Sum (&sums)[2][tile.tokens / 2]) { wait_products<0>(sums[0], sums[1]); }

    SB_DEVICE void multiply_stage(Sums& sums, const Metadata& metadata, int stage, bool add) const {
        constexpr Swizzle W_SWIZZLE = SPARSE ? Swizzle::bytes64 : Swizzle::bytes128;
        const uint32_t own = shared_address(weight_of(stage)) + consumer * tile.blocks * BLOCK;
        const uint64_t a = describe_tile(own, 0, 8 * W_BYTES, W_SWIZZLE);
        const uint64_t b = describe_tile(shared_address(x_of(stage)), 0, 8 * STAGE_BYTES, Swizzle::bytes128);
        start_products();
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int block = 0; block < tile.blocks; ++block) {
                const uint64_t own_a = move_tile(a, block * BLOCK + step * STEP_BYTES);
                const uint64_t own_b = move_tile(b, step * X_STEP_BYTES);
                const bool adds = add || step > 0;
                if constexpr (!SPARSE) {
                    multiply_tile<X, tile.tokens>(sums[block], own_a, own_b, adds);
                } else if constexpr (INTEGER) {
                    multiply_sparse_tile<X, tile.tokens, 0>(sums[block], own_a, own_b, metadata[block][step], adds);
                } else if (step == 0) {
                    multiply_sparse_tile<X, tile.tokens, 0>(sums[block], own_a, own_b, metadata[block][0], adds);
                } else {
                    multiply_sparse_tile<X, tile.tokens, 1>(sums[block], own_a, own_b, metadata[block][0], adds);
                }
            }
        }
        commit_products();
    }

    // Of the 16 rows of this warp in each product, in the order of multiply_sparse: of 16-bit values a lane has rows g and
    // g + 8, and the four lanes of a row both steps of the stage, of which each product takes two; of int8 it has one row,
    // and half of the inputs of each step.
    SB_DEVICE void load_metadata(Metadata& metadata, int feature, int stage) const {
        if constexpr (SPARSE) {
            const int g = lane / 4, q = lane % 4;
#pragma unroll
            for (int block = 0; block < tile.blocks; ++block) {
                const int first = feature + block * BLOCK_FEATURES + 16 * warp + g;
                if constexpr (INTEGER) {
#pragma unroll
                    for (int step = 0; step < STEPS; ++step)
                        metadata[block][step] =
                            positions<uint32_t>(first + 8 * (q % 2), stage * INPUTS + step * (INPUTS / STEPS) + 32 * (q / 2));
                } else {
                    const int input = stage * INPUTS + 16 * q;
                    const uint32_t low = positions<uint16_t>(first, input), high = positions<uint16_t>(first + 8, input);
                    metadata[block][0] = low | high << 16;
                }
            }
        }
    }

    // Those of a row from an input on, as many as the word holds, two bits for each of 2 of 4.
    template <typename Word>
    SB_DEVICE Word positions(int feature, int input) const {
        if (feature >= args.out_features || input >= args.in_features) return static_cast<Word>(NO_METADATA);
        const int64_t row = static_cast<int64_t>(feature) * (args.in_features / 8);
        return load_global(reinterpret_cast<const Word*>(args.positions + row + input / 8));
    }

    // The result

    SB_DEVICE void finish(Sum (&sums)[tile.tokens / 2], int token, int feature) const {
        if (feature >= args.out_features) return;
        switch (args.y_number) {
            case Number::half:
                return finish_as<Half>(sums, token, feature);
            case Number::bfloat16:
                return finish_as<BFloat16>(sums, token, feature);
            case Number::float32:
                return store_numbers<float>(sums, token, feature);
            case Number::int8:
                if constexpr (INTEGER) return store_numbers<int8_t>(sums, token, feature);
        }
    }

    template <typename Y>
    SB_DEVICE void finish_as(Sum (&sums)[tile.tokens / 2], int token, int feature) const {
        args.tiled ? store_tiles<Y>(sums, token, feature) : store_numbers<Y>(sums, token, feature);
    }

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
    SB_DEVICE float result(Sum sum, float x_scale, const Row& row) const {
        const float number = static_cast<float>(sum);
        const float scaled = INTEGER ? add_rn(multiply_rn(multiply_rn(number, x_scale), row.scale), row.bias)
                                     : row.scale * number + row.bias;
        return activate(scaled, args.activation);
    }

    // Through shared memory, 64 tokens at a time, transposed on the way: then rows of y leave in pieces of 128 bytes.
    template <typename Y>
    SB_DEVICE void store_tiles(Sum (&sums)[tile.tokens / 2], int token, int feature) const {
        constexpr int ROW = BLOCK_FEATURES * 2, CHUNK = 16, AT_ONCE = 16;  // bytes; tokens of one instruction
        uint8_t* const place = shared + STAGES * tile.bytes(PATTERN) + consumer * STORE_TOKENS * ROW;
        const bool leads = thread % 128 == 0;
        const int g = lane / 4, q = lane % 4;
        const Row rows[2] = {row_of(feature + 16 * warp + g), row_of(feature + 16 * warp + g + 8)};
        // Of the row that this lane names.
        const int own_token = lane / 16 * 8 + lane % 8;
        const int own_chunk = 2 * warp + lane / 8 % 2;
#pragma unroll
        for (int first = 0; first < tile.tokens; first += STORE_TOKENS) {
            if (token + first >= args.tokens) break;
            // The store before has read what lies here.
            if (leads) wait_stores_read<0>();
            sync_named(1 + consumer, 128);
#pragma unroll
            for (int part = 0; part < STORE_TOKENS; part += AT_ONCE) {
                uint32_t fragment[4];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int column = first + part + 8 * half;
                    const Sum* const own = sums + column / 2;
                    const float scales[2] = {x_scale_of(token + column + 2 * q), x_scale_of(token + column + 2 * q + 1)};
#pragma unroll
                    for (int row = 0; row < 2; ++row) {
                        const float low = result(own[2 * row], scales[0], rows[row]);
                        const float high = result(own[2 * row + 1], scales[1], rows[row]);
                        fragment[2 * half + row] = uint32_t{from_float<Y>(low).bits} | uint32_t{from_float<Y>(high).bits} << 16;
                    }
                }
                const int row = part + own_token;
                store_matrices_transposed(place + row * ROW + (own_chunk ^ row % 8) * CHUNK, fragment);
            }
            fence_async_proxy();
            sync_named(1 + consumer, 128);
            if (leads) {
                store_tile(y, feature, token + first, place);
                commit_stores();
            }
        }
    }

    // Number by number, of any type and at any address.
    template <typename Y>
    SB_DEVICE void store_numbers(Sum (&sums)[tile.tokens / 2], int token, int feature) const {
        const int g = lane / 4, q = lane % 4;
        const float output_scale = sizeof(Y) == 1 ? load_global(args.output_scale) : 1.0f;
        const float inverse = divide_rn(1.0f, output_scale);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int own_feature = feature + 16 * warp + g + 8 * row;
            const Row own = row_of(own_feature);
#pragma unroll
            for (int i = 0; i < tile.tokens / 4; ++i) {
                const int own_token = token + i / 2 * 8 + 2 * q + i % 2;
                if (own_feature >= args.out_features || own_token >= args.tokens) continue;
                const float x_scale = x_scale_of(own_token);
                const float value = result(sums[i / 2 * 4 + 2 * row + i % 2], x_scale, own);
                const int64_t index = static_cast<int64_t>(own_token) * args.out_features + own_feature;
                if constexpr (sizeof(Y) == 1) {
                    const float q8 = fminf(fmaxf(rintf(multiply_rn(value, inverse)), -127.0f), 127.0f);
                    store_global(static_cast<int8_t*>(args.y) + index, static_cast<int8_t>(q8));
                    // What was not finite stays so.
                    if (own_feature == 0)
                        store_global(args.y_scale + own_token, add_rn(multiply_rn(x_scale, 0.0f), output_scale));
                } else {
                    store_global(static_cast<Y*>(args.y) + index, from_float<Y>(value));
                }
            }
        }
    }
};

template <Element ELEMENT, Pattern PATTERN, int TILE>
SB_LONE_KERNEL(THREADS)
wgmma_linear_kernel(
    const SB_PARAMETERS Arguments args, const SB_PARAMETERS TensorMap x, const SB_PARAMETERS TensorMap weight,
    const SB_PARAMETERS TensorMap y
) {
    Linear<ELEMENT, PATTERN, TILE>(args, x, weight, y).run();
}

}  // namespace sparsebert::wgmma
