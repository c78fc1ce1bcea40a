// The loop of the wgmma kernels: tiles of x and of W arrive and are multiplied. What becomes of the sums is the kernel's.
//
// As in nm24, yᵀ = W xᵀ is computed: features are the rows of the product, tokens its columns. Blocks stay on their
// multiprocessor and take one tile of y after the other. A warpgroup loads: one thread of it starts copies of whole
// tiles of x and W, which arrive swizzled in the next free stage. Two warpgroups multiply what has arrived, straight from
// shared memory, each 64 or 128 features by all tokens of the tile. A stage is free again when the products after its own
// have begun and its own have ended. Of some tiles each warpgroup has its own, in turns: then one finishes a tile while
// the other multiplies the next, for which x is read for fewer features.
//
// At 2:4 the kept values are a matrix of half the width, row-major, which is what a copy takes; the positions, 4 bits for
// each group of 4, are the metadata of the product as they are, and come into registers one stage ahead. So the layout
// that is neutral on disk is run as it is.
//
// Low rank: (x vᵀ) uᵀ is added to the same sums, t = x vᵀ being given: after the stages of x come those of t, whose
// products are dense.
//
// Clusters: blocks side by side along the features share tiles of x, of which each loads its part for all; or blocks
// divide the inputs of one tile.
#pragma once

#include <common/arguments.cuh>
#include <common/elements.cuh>
#include <common/hopper.cuh>
#include <common/products.cuh>
#include <wgmma/problem.h>

namespace sparsebert::wgmma {

struct Arguments : Epilogue {
    const uint8_t* positions;  // [out_features][in_features / 8], 2:4
    int rank;                  // t is [tokens][parts][rank], u [out_features][rank]
    int part_features;         // that take the same part of t
    int blocks;                // of the grid
    int sharing;               // blocks of a cluster that share x
    int splits;                // blocks of a cluster that divide the inputs
    bool tiled;  // y goes by copies of tiles, which take rows at multiples of 16 bytes, of 16-bit floats here
};

// y is only there where it goes by tiles, t and u where there is a low-rank part.
struct Maps {
    TensorMap x, weight, y, t, u;
};

template <Element ELEMENT, Pattern PATTERN, int TILE>
class MainLoop {
  protected:
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
    static constexpr bool TAIL = SPARSE && !INTEGER;           // whether there may be a low-rank part
    static constexpr int TAIL_RANKS = TAIL_BYTES / 2;          // in a stage
    static constexpr int CHUNK_TOKENS = 8;                     // of which a lane has four sums
    static constexpr int CHUNKS = tile.tokens / CHUNK_TOKENS;
    // What a thread has; together no more than 168, what they begin with.
    static constexpr int PRODUCER_REGISTERS = 40;
    static constexpr int CONSUMER_REGISTERS = 232;

    const Arguments& args;
    const Maps& maps;
    uint8_t* const shared = aligned_shared_memory();
    Barrier* const full = reinterpret_cast<Barrier*>(shared + STAGES * tile.bytes(PATTERN) + Tile::STORES);
    Barrier* const empty = full + STAGES;
    Barrier* const turns = empty + STAGES;  // of warpgroups with tiles of their own
    const int thread = thread_index();
    const int warpgroup = thread / 128;
    const int consumer = warpgroup - 1;
    const int warp = thread / 32 % 4;
    const int lane = thread % 32;
    const int blocks_of_cluster = args.sharing * args.splits;
    const int cluster = block_x() / blocks_of_cluster;
    const int place_in_cluster = block_x() % blocks_of_cluster;
    const int split = args.splits > 1 ? place_in_cluster : 0;
    const int share = args.sharing > 1 ? place_in_cluster : 0;
    const int loaders = loaders_of(tile.tokens, args.sharing);
    // Of clusters.
    const int feature_tiles = ceil_div(args.out_features, tile.features() * args.sharing);
    const int token_tiles = ceil_div(args.tokens, tile.tokens);
    // Of this split.
    int first_stage;
    int x_stages;
    int stages;  // with those of t

    SB_DEVICE MainLoop(const Arguments& arguments, const Maps& tensor_maps) : args(arguments), maps(tensor_maps) {
        const int all = ceil_div(args.in_features, INPUTS);
        const int per_split = stages_of_split(all, args.splits);
        first_stage = split * per_split;
        x_stages = all - first_stage < per_split ? all - first_stage : per_split;
        // The last split has the fewest stages of x.
        stages = x_stages + (TAIL && split == args.splits - 1 ? ceil_div(args.rank, TAIL_RANKS) : 0);
    }

    // All that the block has to do. The warpgroups that multiply call `begin()` before the first tile, and for each tile
    // `finish(sums, token, feature)` with the first token and the first feature of this warpgroup.
    template <typename Begin, typename Finish>
    SB_DEVICE void run(const Begin& begin, const Finish& finish) {
        if (thread == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                init_barrier(full + stage, 1);
                init_barrier(empty + stage, tile.warpgroups * 4 * loaders);
            }
            for (int i = 0; i < CONSUMERS; ++i) init_barrier(turns + i, 4);
            fence_barrier_init();
        }
        if (blocks_of_cluster > 1) {
            meet_cluster();
        } else {
            sync_block();
        }
        if (warpgroup == 0) {
            give_registers<PRODUCER_REGISTERS>();
            if (thread == 0) load_all();
            sync_warp();
            if (args.splits > 1) meet_cluster();
        } else {
            take_registers<CONSUMER_REGISTERS>();
            begin();
            multiply_all(finish);
        }
        // Others may still read this block's shared memory, or arrive at its barriers.
        if (blocks_of_cluster > 1) meet_cluster();
    }

    // All threads of all blocks of the cluster.
    SB_DEVICE static void meet_cluster() {
        arrive_cluster();
        wait_cluster();
    }

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
        // Over stages that are for others.
        SB_DEVICE void skip(int count) {
            stage += count;
            parity ^= stage / STAGES % 2;
            stage %= STAGES;
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
        const int column = within / height * args.sharing + share;
        return {(group * GROUP + within % height) * tile.tokens, column * tile.features()};
    }
    SB_DEVICE int clusters() const { return args.blocks / blocks_of_cluster; }
    SB_DEVICE int tiles() const { return feature_tiles * token_tiles; }

    SB_DEVICE uint8_t* x_of(int stage) const { return shared + stage * tile.bytes(PATTERN); }
    SB_DEVICE uint8_t* weight_of(int stage) const { return x_of(stage) + tile.tokens * STAGE_BYTES; }

    // Loads

    // By one thread. Weights are no other kernel's: the first of them are fetched while the kernel before still runs.
    SB_DEVICE void load_all() {
        prefetch_map(maps.x);
        prefetch_map(maps.weight);
        const int own = ceil_div(tiles() - cluster, clusters()) * stages;
        const int ahead = own < STAGES ? own : STAGES;
        for (int i = 0; i < ahead; ++i) load_weight_tile(i, i);
        wait_for_previous_kernels();
        for (int i = 0; i < ahead; ++i) load_x_tile(i, i);
        Ring ring;
        for (int i = ahead; i < own; ++i) {
            wait_barrier(empty + ring.stage, ring.parity);
            load_weight_tile(ring.stage, i);
            load_x_tile(ring.stage, i);
            ring.advance();
        }
    }

    // Of the i-th of this block's stages, of which the barrier is told first what will come.
    SB_DEVICE void load_weight_tile(int stage, int i) const {
        const Place place = place_of(cluster + i / stages * clusters());
        const int within = i % stages;
        if (TAIL && within >= x_stages) {
            arrive_expect(full + stage, (tile.tokens + tile.features()) * TAIL_BYTES);
            load_tile(weight_of(stage), maps.u, (within - x_stages) * TAIL_RANKS, place.feature, full + stage);
        } else {
            arrive_expect(full + stage, tile.bytes(PATTERN));
            const int input = (first_stage + within) * (W_BYTES / int{sizeof(X)});
            load_tile(weight_of(stage), maps.weight, input, place.feature, full + stage);
        }
    }
    SB_DEVICE void load_x_tile(int stage, int i) const {
        const Place place = place_of(cluster + i / stages * clusters());
        const int within = i % stages;
        if (TAIL && within >= x_stages) {
            // Blocks that share tokens are all of one part.
            const int part = (place.feature - share * tile.features()) / args.part_features;
            const int rank = part * args.rank + (within - x_stages) * TAIL_RANKS;
            load_for_cluster(stage, maps.t, rank, place.token, TAIL_BYTES);
        } else {
            load_for_cluster(stage, maps.x, (first_stage + within) * INPUTS, place.token, STAGE_BYTES);
        }
    }
    // The tokens of a tile, of which each loader brings a part to all.
    SB_DEVICE void load_for_cluster(int stage, const TensorMap& map, int inner, int token, int row_bytes) const {
        if (loaders == 1) return load_tile(x_of(stage), map, inner, token, full + stage);
        const int part = tile.tokens / loaders;
        const uint16_t everyone = (1 << loaders) - 1;
        uint8_t* const place = x_of(stage) + share * part * row_bytes;
        load_tile_to_blocks(place, map, inner, token + share * part, full + stage, everyone);
    }

    // Products

    using Sums = Sum[tile.blocks][tile.tokens / 2];
    using Metadata = uint32_t[tile.blocks][METADATA];

    template <typename Finish>
    SB_DEVICE void multiply_all(const Finish& finish) {
        constexpr int TURNS = CONSUMERS / tile.warpgroups;
        const int turn = consumer % TURNS;
        Ring ring;
        ring.skip(turn * stages);
        // They change places without being copied: products under way read one of them.
        Metadata even, odd;
        int index = cluster + turn * clusters();
        int passed = 0;  // turns
        Place place{};
        // Before the tile before it is finished.
        const auto go_to_tile = [&] {
            if (index >= tiles()) return;
            place = own_place_of(index);
            load_metadata(even, place.feature, 0);
        };
        go_to_tile();
        while (index < tiles()) {
            const auto [token, feature] = place;
            Sums sums;
            int last = 0;
            if constexpr (TURNS > 1) {
                if (index != cluster) wait_barrier(turns + turn, passed++ % 2);
            }
            for (int i = 0; i < x_stages; i += 2) {
                multiply_and_go_on(sums, even, odd, feature, i, last, ring);
                if (i + 1 < x_stages) multiply_and_go_on(sums, odd, even, feature, i + 1, last, ring);
            }
            if constexpr (TAIL) {
#pragma unroll 1
                for (int i = x_stages; i < stages; ++i) {
                    wait_barrier(full + ring.stage, ring.parity);
                    multiply_tail(sums, ring.stage, args.rank - (i - x_stages) * TAIL_RANKS);
                    wait_products<1>();
                    release(last);
                    last = ring.stage;
                    ring.advance();
                }
            }
            if constexpr (TURNS > 1) {
                // The other's stages come after these. It may not wait for one that is a whole round ahead: of a barrier only
                // the last phase can be told.
                if (lane == 0) arrive(turns + (turn + 1) % TURNS);
            }
            wait_for_sums(sums);
            release(last);
            ring.skip((TURNS - 1) * stages);
            index += TURNS * clusters();
            go_to_tile();
            finish(sums, token, feature);
        }
        if (thread % 128 == 0) wait_stores_read<0>();
    }

    // Of this warpgroup.
    SB_DEVICE Place own_place_of(int index) const {
        const auto [token, feature] = place_of(index);
        return {token, feature + first_block() * BLOCK_FEATURES};
    }
    SB_DEVICE int first_block() const { return consumer % tile.warpgroups * tile.blocks; }

    // The products of a stage begin; those of the stage before have ended then, and what they read is free.
    SB_DEVICE void multiply_and_go_on(
        Sums& sums, const Metadata& now, Metadata& next, int feature, int i, int& last, Ring& ring
    ) const {
        wait_barrier(full + ring.stage, ring.parity);
        multiply_stage(sums, now, ring.stage, i > 0);
        wait_products<1>();
        if (i > 0) release(last);
        if (i + 1 < x_stages) load_metadata(next, feature, i + 1);
        last = ring.stage;
        ring.advance();
    }

    // The products that read this stage have ended in this warp. All loaders write to it.
    SB_DEVICE void release(int stage) const {
        if (loaders == 1) {
            if (lane == 0) arrive(empty + stage);
        } else if (lane < loaders) {
            release_remote(empty + stage, lane);
        }
    }

    SB_DEVICE static void wait_for_sums(Sum (&sums)[1][tile.tokens / 2]) { wait_products<0>(sums[0]); }
    SB_DEVICE static void wait_for_sums(Sum (&sums)[2][tile.tokens / 2]) { wait_products<0>(sums[0], sums[1]); }

    SB_DEVICE void multiply_stage(Sums& sums, const Metadata& metadata, int stage, bool add) const {
        constexpr Swizzle W_SWIZZLE = SPARSE ? Swizzle::bytes64 : Swizzle::bytes128;
        const uint32_t own = shared_address(weight_of(stage)) + first_block() * BLOCK;
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

    // t uᵀ, of which so many ranks are left. What follows the ranks of a part in t is another's, and in u zeros: then the
    // second product takes the first one's t again, so that an infinity of another part is not multiplied by zero. (A
    // branch around products would have ptxas move their sums, and wait for them first.)
    SB_DEVICE void multiply_tail(Sums& sums, int stage, int ranks) const {
        constexpr int U_BLOCK = BLOCK_FEATURES * TAIL_BYTES;  // of a warpgroup's product in a stage
        const uint32_t own = shared_address(weight_of(stage)) + first_block() * U_BLOCK;
        const uint64_t a = describe_tile(own, 0, 8 * TAIL_BYTES, Swizzle::bytes64);
        const uint64_t b = describe_tile(shared_address(x_of(stage)), 0, 8 * TAIL_BYTES, Swizzle::bytes64);
        const int second = ranks > TAIL_RANKS / 2 ? STEP_BYTES : 0;
        start_products();
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int block = 0; block < tile.blocks; ++block) {
                const uint64_t own_a = move_tile(a, block * U_BLOCK + step * STEP_BYTES);
                multiply_tile<X, tile.tokens>(sums[block], own_a, move_tile(b, step * second), true);
            }
        }
        commit_products();
    }

    // Of the 16 rows of this warp in each product, in the order of multiply_sparse: of 16-bit values a lane has rows g and
    // g + 8, and the four lanes of a row both steps of the stage, of which each product takes two; of int8 it has one row,
    // and half of the inputs of each step.
    SB_DEVICE void load_metadata(Metadata& metadata, int feature, int i) const {
        if constexpr (SPARSE) {
            const int stage = first_stage + i;
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
};

}  // namespace sparsebert::wgmma
