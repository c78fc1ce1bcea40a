// y = activation(alpha x Wᵀ + b) + r on Hopper's wgmma, W dense, or 2:4 as a checkpoint holds it.
//
// int8: the sums are int32 and exact, y = activation((sums s_x) s_w + b), rounded to y's type, or to int8 by a scale.
//
// Where blocks divide the inputs of a tile, each adds up a part of its tokens, from the shared memory of all in the order of
// the splits, and finishes them: the same bits in every run.
#pragma once

#include <wgmma/results.cuh>

namespace sparsebert::wgmma {

template <Element ELEMENT, Pattern PATTERN, int TILE>
class Linear : Results<ELEMENT, PATTERN, TILE> {
    using Loop = Results<ELEMENT, PATTERN, TILE>;
    using Loop::args, Loop::maps, Loop::tile, Loop::shared, Loop::thread, Loop::consumer, Loop::warp, Loop::lane;
    using Loop::CHUNKS, Loop::CHUNK_TOKENS, Loop::INTEGER, Loop::split;
    using typename Loop::Sum, typename Loop::Sums, typename Loop::Row;

  public:
    SB_DEVICE Linear(const Arguments& arguments, const Maps& tensor_maps) : Loop(arguments, tensor_maps) {}

    SB_DEVICE void run() {
        const auto finish_tile = [this](Sums& sums, int token, int feature) {
            if constexpr (tile.splits()) {
                if (args.splits > 1) return exchange(sums, token, feature);
            }
#pragma unroll
            for (int block = 0; block < tile.blocks; ++block)
                finish(sums[block], token, feature + block * BLOCK_FEATURES);
        };
        Loop::run([] {}, finish_tile);
    }

  private:
    static constexpr int THREADS_OF_BOTH = 128 * CONSUMERS;

    // A lane's sums of 8 tokens, of rows g, g, g + 8, g + 8, as they lie in shared memory. (Not words: from those the
    // compiler infers that sums are words everywhere, and converts them before and after each product.)
    struct alignas(16) Chunk {
        Sum sums[4];
    };
    SB_DEVICE static Chunk chunk_at(const Sum* sums) { return {{sums[0], sums[1], sums[2], sums[3]}}; }

    // Leaves the sums in this block's shared memory, where stages were, and finishes the tokens that are this split's.
    SB_DEVICE void exchange(Sums& sums, int token, int feature) const {
        Chunk* const own = reinterpret_cast<Chunk*>(shared) + thread % THREADS_OF_BOTH;
        // Products of the other warpgroup read the stages as well.
        this->sync_consumers();
#pragma unroll
        for (int block = 0; block < tile.blocks; ++block) {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk)
                store_shared(own + (block * CHUNKS + chunk) * THREADS_OF_BOTH, chunk_at(sums[block] + 4 * chunk));
        }
        this->meet_cluster();
        for (int block = 0; block < tile.blocks; ++block)
            store_split(own + block * CHUNKS * THREADS_OF_BOTH, token, feature + block * BLOCK_FEATURES);
    }

    // From the place of a thread's sums of 64 features.
    SB_DEVICE void store_split(const Chunk* place, int token, int feature) const {
        const int per_split = CHUNKS / args.splits, first_feature = feature + 16 * warp + lane / 4;
        const Row rows[2] = {this->row_of(first_feature), this->row_of(first_feature + 8)};
#pragma unroll 1
        for (int chunk = split * per_split; chunk < (split + 1) * per_split; ++chunk) {
            Chunk total{};
#pragma unroll 1
            for (int other = 0; other < args.splits; ++other) {
                const Chunk part = load_remote<Chunk>(remote_address(place + chunk * THREADS_OF_BOTH, other));
                for (int i = 0; i < 4; ++i) total.sums[i] += part.sums[i];
            }
            store_chunk(total, rows, token + chunk * CHUNK_TOKENS, first_feature);
        }
    }

    SB_DEVICE void finish(Sum (&sums)[tile.tokens / 2], int token, int feature) const {
        if (feature >= args.out_features) return;
        if (size_of(args.y_number) == 2) {
            this->by_activation([&](auto activation) { store_halves<activation.value>(sums, token, feature); });
        } else if constexpr (INTEGER) {
            store_numbers(sums, token, feature);
        }
    }

    // y in 16 bits.
    template <Activation ACTIVATION>
    SB_DEVICE void store_halves(Sum (&sums)[tile.tokens / 2], int token, int feature) const {
        const int first_feature = feature + 16 * warp + lane / 4;
        const Row rows[2] = {this->row_of(first_feature), this->row_of(first_feature + 8)};
#pragma unroll
        for (int first = 0; first < tile.tokens; first += STORE_TOKENS) {
            if (token + first >= args.tokens) break;
            this->wait_for_place();
            if (args.residual) this->load_residual(token + first, feature);
            this->put([&](int chunk, float (&numbers)[4]) {
                const int column = first + CHUNK_TOKENS * chunk, own_token = token + column + lane % 4 * 2;
                const float x_scales[2] = {this->x_scale_of(own_token), this->x_scale_of(own_token + 1)};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float sum = this->before_activation(sums[column / 2 + i], x_scales[i % 2], rows[i / 2]);
                    const float value = activate(sum, ACTIVATION);
                    numbers[i] = args.residual ? value + numbers[i] : value;
                }
            });
            if (args.tiled) {
                this->store_by_copy(token + first, feature);
            } else {
                this->store_rows(token + first, feature);
            }
        }
    }

    // Other types number by number. Each thread leaves its sums in shared memory and takes them up again, 32 tokens at a time:
    // registers cannot be counted through by a loop, and written out they are too much code.
    SB_DEVICE void store_numbers(Sum (&sums)[tile.tokens / 2], int token, int feature) const {
        constexpr int AT_ONCE = STORE_TOKENS * BLOCK_FEATURES * 2 / int{sizeof(Chunk)} / 128;
        Chunk* const own = reinterpret_cast<Chunk*>(this->store_place()) + thread % 128;
        const int first_feature = feature + 16 * warp + lane / 4;
        const Row rows[2] = {this->row_of(first_feature), this->row_of(first_feature + 8)};
#pragma unroll
        for (int first = 0; first < CHUNKS; first += AT_ONCE) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) store_shared(own + i * 128, chunk_at(sums + 4 * (first + i)));
#pragma unroll 1
            for (int i = 0; i < AT_ONCE; ++i)
                store_chunk(load_shared(own + i * 128), rows, token + (first + i) * CHUNK_TOKENS, first_feature);
        }
    }

    // The eight lanes of a token fill 32 bytes of floats.
    SB_DEVICE void store_chunk(const Chunk& chunk, const Row (&rows)[2], int token, int feature) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            store_number(chunk.sums[i], rows[i / 2], token + lane % 4 * 2 + i % 2, feature + i / 2 * 8);
    }

    SB_DEVICE void store_number(Sum sum, const Row& row, int token, int feature) const {
        if (feature >= args.out_features || token >= args.tokens) return;
        const float x_scale = this->x_scale_of(token);
        const float value = activate(this->before_activation(sum, x_scale, row), args.activation);
        const int64_t index = this->index_of(token, feature);
        if (size_of(args.y_number) == 2) {
            const auto* const residual = static_cast<const uint16_t*>(args.residual);
            const float more = residual ? value + this->number_of(load_global(residual + index)) : value;
            store_global(static_cast<uint16_t*>(args.y) + index, static_cast<uint16_t>(this->bits_of(more)));
        } else if (args.y_number == Number::float32) {
            store_global(static_cast<float*>(args.y) + index, value);
        } else {
            const float output_scale = load_global(args.output_scale);
            const float rounded = rintf(multiply_rn(value, divide_rn(1.0f, output_scale)));
            store_global(static_cast<int8_t*>(args.y) + index, static_cast<int8_t>(fminf(fmaxf(rounded, -127.0f), 127.0f)));
            // What was not finite stays so.
            if (feature == 0) store_global(args.y_scale + token, add_rn(multiply_rn(x_scale, 0.0f), output_scale));
        }
    }
};

template <Element ELEMENT, Pattern PATTERN, int TILE>
SB_LONE_KERNEL(THREADS)
wgmma_linear_kernel(const SB_PARAMETERS Arguments args, const SB_PARAMETERS Maps maps) {
    if constexpr (ON_HOPPER) {
        Linear<ELEMENT, PATTERN, TILE>(args, maps).run();
    } else {
        stop_kernel();
    }
}

}  // namespace sparsebert::wgmma
