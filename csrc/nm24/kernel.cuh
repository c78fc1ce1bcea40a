// y = activation(alpha x Wᵀ + b) + r with a 2:4 weight W, on the sparse tensor cores through mma.sp.
//
// Only the left operand of the instruction can be sparse, so yᵀ = W xᵀ is computed: features are the rows of the
// product, tokens its columns, and x, row-major, is the operand that the instruction wants. Weights lie in the order of
// the instruction's fragments (sparsebert/formats/mma_sp.py), so they go from global memory into registers, 16 bytes a
// lane and coalesced, one stage ahead; shared memory is left to x, which arrives by cp.async several stages ahead.
//
// int8: the sums are int32 and exact, y = activation((sums s_x) s_w + b), rounded to y's type, or to int8 by a scale.
// Low rank: (x vᵀ) uᵀ is added to the same sums, t = x vᵀ being given: after the stages of x come those of t, whose
// products are dense.
#pragma once

#include <common/arguments.cuh>
#include <common/elements.cuh>
#include <nm24/problem.h>

namespace sparsebert::nm24 {

struct Arguments : Epilogue {
    const void* x;           // [tokens][in_features], x_stride elements apart
    int64_t x_stride;
    const Words4* values;    // [feature blocks][input blocks][2][4][32], one Words4 a lane
    const Words4* metadata;  // [feature blocks][input blocks][1 or 2][32], a word for each 16 features
    const int32_t* columns;  // [in_features]: which columns of x the weight has, or null: all; not int8
    const void* t;           // [tokens][rank], rank a multiple of 16
    const Words4* u;         // [feature blocks][rank / 16][4][32]
    Words4* partial;         // [tiles][parts][splits][tokens of a tile][features of a part], four bytes each
    uint32_t* arrivals;      // [tiles][parts], zeros before and after
    int rank;
    int splits;
};

// How x is read: rows that begin at multiples of 16 bytes in copies of 16, others, and columns of rows, piece by piece. A
// kernel for each, for the second would take registers from the first.
enum class Access { wide, narrow };

template <Element ELEMENT, int TILE, Access ACCESS>
class Linear {
    static constexpr Tile tile = TILES[TILE];
    static constexpr bool INTEGER = ELEMENT == Element::int8;
    using X = typename Types<ELEMENT>::X;
    using Sum = typename Types<ELEMENT>::Sum;

    static constexpr int M_TILES = BLOCK_FEATURES / 16;               // of 16 features, a warp's
    static constexpr int N_TILES = tile.tokens / tile.warps_n / 8;    // of 8 tokens, a warp's
    static constexpr int STEPS = 2;                                   // mma.sp along a block of inputs
    static constexpr int CHUNK = 16;                                  // bytes of a row of x that are moved together
    static constexpr int CHUNKS = BLOCK_BYTES / CHUNK;                // of a block of inputs
    static constexpr int INPUTS = block_inputs(ELEMENT);              // of a block
    static constexpr int METADATA = INTEGER ? STEPS : 1;              // Words4 of a lane and block
    // Sets of registers for the weights of a block: for two there is room where a warp has few tokens, whose products
    // would not hide the time of a load otherwise.
    static constexpr bool TWO_SETS = N_TILES <= 4;
    static constexpr int GROUP = 8;                                   // tiles along tokens that run side by side
    static constexpr int WIDTH = 8;                                   // features that a thread finishes together

    // A lane's part of a block of the weight.
    struct Weight {
        Words4 values[STEPS][M_TILES];
        Words4 metadata[METADATA];
    };

    const Arguments& args;
    uint8_t* const shared;
    const int thread = thread_index();
    const int lane = thread % 32;
    const int warp_m = thread / 32 % tile.warps_m;
    const int warp_n = thread / 32 / tile.warps_m % tile.warps_n;
    const int warp_k = thread / 32 / (tile.warps_m * tile.warps_n);
    const int feature_blocks = ceil_div(args.out_features, BLOCK_FEATURES);
    const int input_blocks = ceil_div(args.in_features, INPUTS);

    int feature_tile;
    int token_tile;
    int feature_block;  // of this warp
    int first_stage;    // of this split
    int own_x_stages;
    int own_stages;  // with those of t
    Sum sums[M_TILES][N_TILES][4];

  public:
    SB_DEVICE explicit Linear(const Arguments& arguments) : args(arguments), shared(shared_memory()) {
        place();
        feature_block = feature_tile * tile.warps_m + warp_m;
        const int x_stages = ceil_div(input_blocks, tile.warps_k);
        const int per_split = ceil_div(x_stages, args.splits);
        first_stage = block_y() * per_split;
        own_x_stages = x_stages - first_stage;
        own_x_stages = own_x_stages < 0 ? 0 : own_x_stages < per_split ? own_x_stages : per_split;
        own_stages = own_x_stages + (block_y() == 0 ? ceil_div(args.rank, tile.warps_k * INPUTS) : 0);
    }

    SB_DEVICE void run() {
        multiply();
#pragma unroll 1
        for (int part = 0; part < tile.parts(); ++part) {
            gather_sums(part);
            if (args.splits == 1 || add_up_splits(part)) finish(part);
        }
    }

  private:
    // Tiles in the order of blocks: a few along the tokens, then along the features, so that what runs at the same time
    // shares both weights and activations in the L2.
    SB_DEVICE void place() {
        const int feature_tiles = ceil_div(args.out_features, tile.features());
        const int token_tiles = ceil_div(args.tokens, tile.tokens);
        const int group = block_x() / (GROUP * feature_tiles);
        const int within = block_x() % (GROUP * feature_tiles);
        const int left = token_tiles - group * GROUP;
        const int height = left < GROUP ? left : GROUP;
        token_tile = group * GROUP + within % height;
        feature_tile = within / height;
    }

    // The product

    SB_DEVICE void multiply() {
#pragma unroll
        for (auto& row : sums)
            for (auto& fragment : row)
                for (Sum& sum : fragment) sum = 0;
#pragma unroll
        for (int stage = 0; stage < tile.stages - 1; ++stage) {
            if (stage < own_stages) copy_stage(stage);
            commit_copies();
        }
        if constexpr (TWO_SETS) {
            // They change places without being copied.
            Weight even, odd;
            load_block(0, even);
            for (int stage = 0; stage < own_x_stages; stage += 2) {
                next_stage(stage);
                load_block(stage + 1, odd);
                multiply_block(stage, even);
                if (stage + 1 < own_x_stages) {
                    next_stage(stage + 1);
                    load_block(stage + 2, even);
                    multiply_block(stage + 1, odd);
                }
            }
        } else {
            // What a step has used is loaded again at once, one step ahead of its next use.
            Weight weight;
            load_block(0, weight);
            for (int stage = 0; stage < own_x_stages; ++stage) {
                next_stage(stage);
                const bool used = has_weight(stage);
                Words4 metadata[METADATA];
#pragma unroll
                for (int i = 0; i < METADATA; ++i) metadata[i] = weight.metadata[i];
                load_metadata(stage + 1, weight);
                if (used) multiply_step<0>(stage, weight.values[0], metadata);
                load_values<0>(stage + 1, weight);
                if (used) multiply_step<1>(stage, weight.values[1], metadata);
                load_values<1>(stage + 1, weight);
            }
        }
        if constexpr (!INTEGER) {
            for (int stage = own_x_stages; stage < own_stages; ++stage) {
                next_stage(stage);
                multiply_tail(stage);
            }
        }
    }

    // Waits for a stage, and starts the copy into the place that all warps have left by then.
    SB_DEVICE void next_stage(int stage) {
        wait_copies<tile.stages - 2>();
        sync_block();
        const int ahead = stage + tile.stages - 1;
        if (ahead < own_stages) copy_stage(ahead);
        commit_copies();
    }

    SB_DEVICE uint8_t* place_of(int stage) { return shared + stage % tile.stages * tile.stage_bytes(); }

    // A stage is [tokens][warps_k][8 chunks of 16 bytes], in which chunk c of token i is at c ^ i % 8: then the eight
    // rows that ldmatrix takes together lie in different banks. A thread copies the same chunk of several tokens.
    SB_DEVICE void copy_stage(int stage) {
        const bool of_x = stage < own_x_stages;
        const X* from = static_cast<const X*>(of_x ? args.x : args.t);
        const int64_t stride = of_x ? args.x_stride : args.rank;
        const int inputs = of_x ? args.in_features : args.rank;
        const int first = (of_x ? first_stage + stage : stage - own_x_stages) * tile.warps_k * INPUTS;
        const int input = first + thread % ROW * PER_CHUNK;
        const int left = inputs - input;
        const int count = left < 0 ? 0 : left < PER_CHUNK ? left : PER_CHUNK;
        const int first_row = thread / ROW;
        const int first_token = token_tile * tile.tokens + first_row;
        const X* row_start = from + first_token * stride;
        constexpr int ROUNDS = tile.tokens / AT_ONCE;
        if constexpr (ACCESS == Access::wide) {
#pragma unroll(TWO_SETS ? ROUNDS : 2)
            for (int i = 0; i < ROUNDS; ++i) {
                const int valid = first_token + i * AT_ONCE < args.tokens ? count : 0;
                // What is not there is not read; its address is one that may be formed.
                const X* chunk = valid ? row_start + i * AT_ONCE * stride + input : from;
                copy_async<CHUNK>(place_of_chunk(stage, first_row + i * AT_ONCE), chunk, valid * int{sizeof(X)});
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < ROUNDS; ++i) {
                const int valid = first_token + i * AT_ONCE < args.tokens ? count : 0;
                const X* row = valid ? row_start + i * AT_ONCE * stride : from;
                uint8_t* to = place_of_chunk(stage, first_row + i * AT_ONCE);
                const bool gathered = !INTEGER && of_x && args.columns;
                if (!gathered) copy_chunk(to, valid ? row + input : row, valid * int{sizeof(X)});
                if constexpr (!INTEGER) {
                    if (gathered) gather_chunk(to, row, input, valid);
                }
            }
        }
    }

    static constexpr int ROW = tile.warps_k * CHUNKS;          // chunks of a token
    static constexpr int AT_ONCE = tile.threads() / ROW;       // tokens
    static constexpr int PER_CHUNK = CHUNK / sizeof(X);        // elements
    static_assert(tile.threads() % ROW == 0 && tile.tokens % AT_ONCE == 0, "a thread's chunk is always the same");

    SB_DEVICE uint8_t* place_of_chunk(int stage, int row) {
        return place_of(stage) + row * (ROW * CHUNK) + (thread % ROW ^ row % CHUNKS) * CHUNK;
    }

    SB_DEVICE static void copy_chunk(uint8_t* to, const X* from, int valid) {
#pragma unroll
        for (int i = 0; i < CHUNK; i += 4) {
            const int left = valid - i;
            const int part = left < 0 ? 0 : left < 4 ? left : 4;
            copy_async<4>(to + i, reinterpret_cast<const uint8_t*>(from) + (part ? i : 0), part);
        }
    }

    // Columns of x that the weight was compacted to: no copy of consecutive bytes, so through registers. (int8: the rows
    // are quantized from what was gathered before.)
    SB_DEVICE void gather_chunk(uint8_t* to, const X* row, int input, int valid) {
#pragma unroll 1
        for (int i = 0; i < PER_CHUNK; ++i) {
            const X element = i < valid ? load_global(row + load_global(args.columns + input + i)) : X{};
            store_shared(reinterpret_cast<X*>(to) + i, element);
        }
    }

    // The warp's block of inputs in one of its stages.
    SB_DEVICE int block_of(int stage) { return (first_stage + stage) * tile.warps_k + warp_k; }

    SB_DEVICE bool has_weight(int stage) {
        // One warp along the inputs has a block in each stage.
        return stage < own_x_stages && feature_block < feature_blocks &&
               (tile.warps_k == 1 || block_of(stage) < input_blocks);
    }

    // Where two warps want the same weights, the second finds them in the L1.
    SB_DEVICE static Words4 load_part(const Words4* from) {
        if constexpr (tile.warps_n > 1) {
            return load_global(from);
        } else {
            return load_weight(from);
        }
    }

    SB_DEVICE void load_block(int stage, Weight& weight) {
        load_metadata(stage, weight);
        load_values<0>(stage, weight);
        load_values<1>(stage, weight);
    }

    SB_DEVICE int64_t place_of_block(int stage) {
        return static_cast<int64_t>(feature_block) * input_blocks + block_of(stage);
    }

    SB_DEVICE void load_metadata(int stage, Weight& weight) {
        if (!has_weight(stage)) return;
        const Words4* from = args.metadata + place_of_block(stage) * (METADATA * 32) + lane;
#pragma unroll
        for (int i = 0; i < METADATA; ++i) weight.metadata[i] = load_part(from + i * 32);
    }

    template <int STEP>
    SB_DEVICE void load_values(int stage, Weight& weight) {
        if (!has_weight(stage)) return;
        const Words4* from = args.values + (place_of_block(stage) * STEPS + STEP) * (M_TILES * 32) + lane;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) weight.values[STEP][m] = load_part(from + m * 32);
    }

    // Two fragments' worth of inputs of 8 tokens, 64 bytes of each, from the warp's part of a stage.
    SB_DEVICE void load_tokens(uint32_t (&fragment)[4], int stage, int n, int half) {
        const int token = (warp_n * N_TILES + n) * 8 + lane % 8;
        const int chunk = half * 4 + lane / 8;
        load_matrices(
            fragment,
            place_of(stage) + (token * tile.warps_k + warp_k) * BLOCK_BYTES + (chunk ^ token % CHUNKS) * CHUNK
        );
    }

    SB_DEVICE void multiply_block(int stage, const Weight& weight) {
        if (!has_weight(stage)) return;
        multiply_step<0>(stage, weight.values[0], weight.metadata);
        multiply_step<1>(stage, weight.values[1], weight.metadata);
    }

    template <int STEP>
    SB_DEVICE void multiply_step(int stage, const Words4 (&values)[M_TILES], const Words4 (&metadata)[METADATA]) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            uint32_t tokens[4];
            load_tokens(tokens, stage, n, STEP);
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                if constexpr (INTEGER) {
                    multiply_sparse(sums[m][n], values[m], tokens, metadata[STEP].word[m]);
                } else {
                    // One word of metadata serves both steps: each reads other lanes.
                    multiply_sparse<X, STEP>(sums[m][n], values[m], tokens, metadata[0].word[m]);
                }
            }
        }
    }

    SB_DEVICE void multiply_tail(int stage) {
        if (feature_block >= feature_blocks) return;
        const int rank_steps = args.rank / RANK_STEP;
        const int first = ((stage - own_x_stages) * tile.warps_k + warp_k) * (INPUTS / RANK_STEP);
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int step = first + 2 * half + part;
                if (step >= rank_steps) return;
                const int64_t block = static_cast<int64_t>(feature_block) * rank_steps + step;
                const Words4* u = args.u + block * (M_TILES * 32) + lane;
                Words4 weight[M_TILES];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) weight[m] = load_part(u + m * 32);
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
                    uint32_t tokens[4];
                    load_tokens(tokens, stage, n, half);
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m)
                        multiply_dense<X>(sums[m][n], weight[m], tokens[2 * part], tokens[2 * part + 1]);
                }
            }
        }
    }

    // The sums

    SB_DEVICE Sum* sum_at(int token, int feature) {
        return reinterpret_cast<Sum*>(shared) + token * tile.sums_pitch() + feature;
    }

    // Transposes the sums of a part to [tokens][features] in shared memory, where the warps that shared the inputs add
    // theirs one after the other, always in the same order.
    SB_DEVICE void gather_sums(int part) {
        constexpr int WARPS = tile.warps_m / tile.parts();
        for (int turn = 0; turn < tile.warps_k; ++turn) {
            sync_block();
            if (turn != warp_k || warp_m / WARPS != part) continue;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int token = (warp_n * N_TILES + n) * 8 + lane % 4 * 2 + i % 2;
                        const int feature = warp_m % WARPS * BLOCK_FEATURES + m * 16 + lane / 4 + i / 2 * 8;
                        Sum* to = sum_at(token, feature);
                        store_shared(to, turn ? load_shared(to) + sums[m][n][i] : sums[m][n][i]);
                    }
        }
        sync_block();
    }

    // Leaves this split's sums of a part in the workspace. The block that arrives last adds all of them in the order of
    // the splits, its own among them, and alone returns true.
    SB_DEVICE bool add_up_splits(int part) {
        constexpr int COUNT = tile.tokens * QUADS;
        const int place = block_x() * tile.parts() + part;
        Words4* all = args.partial + static_cast<int64_t>(place) * args.splits * COUNT;
        for (int i = thread; i < COUNT; i += tile.threads())
            store_global(all + block_y() * COUNT + i, load_shared(quad_at(i)));
        fence_device();
        sync_block();
        // Where the first sum was: nobody needs the sums any more, the last block reads its own back.
        auto* arrived = reinterpret_cast<uint32_t*>(shared);
        if (thread == 0) store_shared(arrived, atomic_add(args.arrivals + place, 1));
        sync_block();
        const bool last = load_shared(arrived) == static_cast<uint32_t>(args.splits) - 1;
        sync_block();
        if (!last) return false;
        fence_device();
        for (int i = thread; i < COUNT; i += tile.threads()) {
            Words4 total = load_from_l2(all + i);
            for (int other = 1; other < args.splits; ++other) add(total, load_from_l2(all + other * COUNT + i));
            store_shared(quad_at(i), total);
        }
        // For the next call.
        if (thread == 0) store_global(args.arrivals + place, uint32_t{0});
        sync_block();
        return true;
    }

    static constexpr int QUADS = tile.part_features() / 4;

    SB_DEVICE Words4* quad_at(int i) {
        return reinterpret_cast<Words4*>(sum_at(i / QUADS, i % QUADS * 4));
    }

    SB_DEVICE static void add(Words4& total, const Words4& other) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            total.word[i] = bits_from(sum_from(total.word[i]) + sum_from(other.word[i]));
    }

    SB_DEVICE static Sum sum_from(uint32_t word) {
        if constexpr (INTEGER) {
            return static_cast<int32_t>(word);
        } else {
            return float_of_bits(word);
        }
    }
    SB_DEVICE static uint32_t bits_from(Sum sum) {
        if constexpr (INTEGER) {
            return static_cast<uint32_t>(sum);
        } else {
            return bits_of_float(sum);
        }
    }

    // The result

    // Each thread has 8 features, whose bias and scales it reads once, of some of the tokens.
    SB_DEVICE void finish(int part) {
        constexpr int ACROSS = tile.part_features() / WIDTH;
        constexpr int ROWS = tile.threads() / ACROSS;
        const int first = thread % ACROSS * WIDTH;
        const int feature = feature_tile * tile.features() + part * tile.part_features() + first;
        if (feature >= args.out_features) return;
        const int left = args.out_features - feature;
        const int count = left < WIDTH ? left : WIDTH;
        float bias[WIDTH], scale[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            bias[i] = args.bias && i < count ? load_number(args.bias, args.bias_number, feature + i) : 0.0f;
            scale[i] = INTEGER && i < count ? load_global(args.scale + feature + i) : args.alpha;
        }
        const float output_scale = INTEGER && args.output_scale ? load_global(args.output_scale) : 1.0f;
        const float inverse = divide_rn(1.0f, output_scale);
        for (int row = thread / ACROSS; row < tile.tokens; row += ROWS) {
            const int token = token_tile * tile.tokens + row;
            if (token >= args.tokens) return;
            float y[WIDTH];
            const auto* from = reinterpret_cast<const Words4*>(sum_at(row, first));
#pragma unroll
            for (int half = 0; half < WIDTH / 4; ++half) {
                const Words4 words = load_shared(from + half);
#pragma unroll
                for (int i = 0; i < 4; ++i) y[half * 4 + i] = static_cast<float>(sum_from(words.word[i]));
            }
            const float x_scale = INTEGER ? load_global(args.x_scale + token) : 1.0f;
            const int64_t index = static_cast<int64_t>(token) * args.out_features + feature;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                if constexpr (INTEGER) {
                    y[i] = add_rn(multiply_rn(multiply_rn(y[i], x_scale), scale[i]), bias[i]);
                } else {
                    y[i] = scale[i] * y[i] + bias[i];
                }
                y[i] = activate(y[i], args.activation);
                if (args.residual && i < count) y[i] += load_number(args.residual, args.y_number, index + i);
            }
            store(y, index, count, inverse);
            if (INTEGER && args.y_number == Number::int8 && feature == 0) {
                // What was not finite stays so.
                store_global(args.y_scale + token, add_rn(multiply_rn(x_scale, 0.0f), output_scale));
            }
        }
    }

    SB_DEVICE void store(const float (&y)[WIDTH], int64_t index, int count, float inverse) {
        switch (args.y_number) {
            case Number::half:
                return store_as<Half>(y, index, count);
            case Number::bfloat16:
                return store_as<BFloat16>(y, index, count);
            case Number::float32:
                return store_as<float>(y, index, count);
            case Number::int8:
                if constexpr (INTEGER) {
                    float q[WIDTH];
#pragma unroll
                    for (int i = 0; i < WIDTH; ++i)
                        q[i] = fminf(fmaxf(rintf(multiply_rn(y[i], inverse)), -127.0f), 127.0f);
                    return store_as<int8_t>(q, index, count);
                }
        }
    }

    // Eight results as wide as their addresses allow: a row of y begins at any multiple of its element.
    template <typename Y>
    SB_DEVICE void store_as(const float (&y)[WIDTH], int64_t index, int count) {
        Y* to = static_cast<Y*>(args.y) + index;
        constexpr int PER_VECTOR = 16 / sizeof(Y) < WIDTH ? 16 / sizeof(Y) : WIDTH;
        if (count == WIDTH && args.out_features % WIDTH == 0) {
#pragma unroll
            for (int i = 0; i < WIDTH; i += PER_VECTOR) {
                alignas(16) Y vector[PER_VECTOR];
#pragma unroll
                for (int j = 0; j < PER_VECTOR; ++j) vector[j] = convert<Y>(y[i + j]);
                store_vector(to + i, vector);
            }
        } else {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
                if (i < count) store_global(to + i, convert<Y>(y[i]));
        }
    }

    template <typename Y>
    SB_DEVICE static Y convert(float y) {
        if constexpr (sizeof(Y) == 1) {
            return static_cast<int8_t>(y);
        } else {
            return from_float<Y>(y);
        }
    }
};

template <Element ELEMENT, int TILE, Access ACCESS>
SB_KERNEL(TILES[TILE].threads()) nm24_linear_kernel(const SB_PARAMETERS Arguments args) {
    Linear<ELEMENT, TILE, ACCESS>(args).run();
}

}  // namespace sparsebert::nm24
