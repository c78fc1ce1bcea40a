// Products of four warps, which run on their own: their operands are read, and their sums are there, when they are
// waited for. The maps from lanes to elements are those of the PTX ISA for wgmma, with g = lane / 4 and q = lane % 4.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "bulk.hpp"
#include "causality.hpp"
#include "collectives.hpp"
#include "memory.hpp"
#include "numbers.hpp"
#include "report.hpp"

namespace simt {

// Of one instruction.
struct ProductShape {
    enum Element { float16, brain16, int8 } element;
    bool sparse;
    int n;
    int selector;

    int element_bytes() const { return element == int8 ? 1 : 2; }
    int slots() const { return A_BYTES / element_bytes(); }  // of a row of A: kept values
    int k() const { return slots() * (sparse ? 2 : 1); }
    int b_bytes() const { return k() * element_bytes(); }
    int sums() const { return n / 2; }  // of a lane
    static constexpr int ROWS = 64;
    static constexpr int A_BYTES = 32;  // of a row
};

// What a lane says. a_registers is null where A is in shared memory.
struct TileProduct {
    const ProductShape* shape;
    void* d;
    const uint32_t* a_registers;
    uint64_t a;
    uint64_t b;
    uint32_t metadata;
    bool add;
};

// An operand in shared memory, as its descriptor says: rows along k.
class TileAddress {
  public:
    explicit TileAddress(uint64_t descriptor)
        : start_((descriptor & 0x3fff) << 4),
          leading_((descriptor >> 16 & 0x3fff) << 4),
          stride_((descriptor >> 32 & 0x3fff) << 4),
          base_(descriptor >> 49 & 7),
          width_(WIDTHS[descriptor >> 62]) {}

    // Why it cannot be an operand of so many rows and bytes, or nothing.
    std::string fault(int rows, int bytes) const {
        if (base_) return "its base offset is " + std::to_string(base_) + ", expected 0";
        if (width_ == 16) return "";
        const size_t pattern = 8 * width_, within = start_ % pattern;
        const std::string begins = "it begins at shared " + std::to_string(start_);
        if (within >= width_) {
            return begins + ", expected within the first " + std::to_string(width_) + " of " + std::to_string(pattern) +
                   " bytes, where the pattern begins";
        }
        if (within + bytes > width_) {
            return begins + " and takes " + std::to_string(bytes) + " bytes of rows of " + std::to_string(width_);
        }
        if (rows > 8 && stride_ % pattern) {
            return "its stride is " + std::to_string(stride_) + ", expected a multiple of " + std::to_string(pattern);
        }
        return "";
    }

    // Of the 16-byte chunk of a row.
    size_t of(int row, int chunk) const {
        const size_t group = row / 8 * stride_;
        if (width_ == 16) return start_ + group + chunk * leading_ + row % 8 * 16;
        return swizzled(start_ + group + row % 8 * width_ + chunk * 16, static_cast<Swizzle>(width_));
    }

  private:
    static constexpr size_t WIDTHS[4] = {16, 128, 64, 32};
    size_t start_, leading_, stride_, base_, width_;
};

class Warpgroup {
  public:
    Warpgroup(const Now& now, Causality& causality, Report& report, Shared& shared)
        : now_(now), causality_(causality), report_(report), shared_(shared) {}

    void begin_block() {
        agent_ = -1;
        fenced_ = false;
        uncommitted_.clear();
        groups_.clear();
        sums_.clear();
        registers_.clear();
    }

    // What was done to the registers before is seen by the products that follow.
    void fence() {
        fenced_ = true;
        for (auto& [key, registers] : registers_) {
            if (!registers.pending) registers.look();
        }
    }

    void start(Lanes& lanes) {
        Product product;
        product.shape = lanes.of<TileProduct>(0).shape;
        for (int lane = 0; lane < LANES; ++lane) product.lanes[lane] = lanes.of<TileProduct>(lane);
        if (!agrees(product) || !has_good_descriptors(product)) return;
        if (product.shape->sparse) place_all(lanes, product);
        check_registers(product);
        read_shared(product);
        begin_sums(product);
        if (agent_ < 0) agent_ = causality_.add_agent("a product of threads " + std::to_string(lanes.first_thread) +
                                                      " to " + std::to_string(lanes.first_thread + LANES - 1));
        uncommitted_.push_back(std::move(product));
    }

    void commit() {
        groups_.push_back(std::move(uncommitted_));
        uncommitted_.clear();
    }

    // One operation of four warps has ended for all of them.
    void wait(Lanes& lanes, size_t pending) {
        while (groups_.size() > pending) {
            for (Product& product : groups_.front()) finish(lanes, product);
            groups_.pop_front();
        }
        fenced_ = false;
        if (agent_ >= 0) causality_.tell(lanes.now.first + lanes.first_thread, LANES, agent_);
    }

    size_t unfinished() const {
        size_t count = uncommitted_.size();
        for (const auto& group : groups_) count += group.size();
        return count;
    }

  private:
    static constexpr int LANES = 128;
    static constexpr int WARPS = 4;
    struct Product {
        const ProductShape* shape;
        TileProduct lanes[LANES];
        std::vector<uint32_t> a;     // what the lanes' registers held
        std::vector<uint8_t> where;  // the place of each kept value along k
    };
    // Of all lanes, that the products of this block have used; told by the first lane's.
    struct Registers {
        const void* of_lane[LANES];
        size_t bytes = 0;  // of a lane
        int pending = 0;   // products that use them
        std::vector<uint8_t> seen;

        void look() {
            seen.resize(LANES * bytes);
            for (int lane = 0; lane < LANES; ++lane) std::memcpy(&seen[lane * bytes], of_lane[lane], bytes);
        }
        int changed_lane() const {
            for (int lane = 0; lane < LANES; ++lane) {
                if (std::memcmp(&seen[lane * bytes], of_lane[lane], bytes)) return lane;
            }
            return -1;
        }
    };

    // Mistakes of all four warps together are the first thread's.
    template <typename... Parts>
    void mistake(const char* kind, const Product& product, const Parts&... parts) {
        report_.add(kind, name(product), parts...);
    }
    static const char* name(const Product& product) {
        return product.shape->sparse ? "multiply_sparse_tile" : "multiply_tile";
    }

    bool agrees(const Product& product) {
        const TileProduct& first = product.lanes[0];
        for (const TileProduct& lane : product.lanes) {
            const bool same_a = first.a_registers || lane.a == first.a;
            if (same_a && lane.b == first.b && lane.add == first.add) continue;
            mistake("divergence", product, " has another descriptor, or adds otherwise, in thread ",
                    now_.thread + (&lane - product.lanes));
            return false;
        }
        return true;
    }

    bool has_good_descriptors(const Product& product) {
        const ProductShape& shape = *product.shape;
        std::string fault;
        if (!product.lanes[0].a_registers) {
            fault = TileAddress(product.lanes[0].a).fault(ProductShape::ROWS, ProductShape::A_BYTES);
            if (!fault.empty()) mistake("descriptor", product, " of A: ", fault);
        }
        const std::string of_b = TileAddress(product.lanes[0].b).fault(shape.n, shape.b_bytes());
        if (!of_b.empty()) mistake("descriptor", product, " of B: ", of_b);
        return fault.empty() && of_b.empty();
    }

    // Registers

    // Whoever has waited may have used the registers, and so may anybody before the first product.
    void check_registers(Product& product) {
        if (!fenced_) {
            mistake("registers", product, " without start_products since the last wait_products");
            fenced_ = true;
        }
        if (!product.lanes[0].a_registers) return;
        Registers& a = registers_of(product, false);
        report_if_changed(product, a, "A's registers");
        a.look();
        ++a.pending;
        product.a.resize(LANES * 4);
        std::memcpy(product.a.data(), a.seen.data(), a.seen.size());
    }

    Registers& registers_of(const Product& product, bool sums) {
        const auto pointer = [&](const TileProduct& lane) -> const void* { return sums ? lane.d : lane.a_registers; };
        Registers& registers = registers_[pointer(product.lanes[0])];
        const size_t bytes = 4 * (sums ? product.shape->sums() : 4);
        if (registers.bytes != bytes) registers = Registers();
        registers.bytes = bytes;
        for (int lane = 0; lane < LANES; ++lane) registers.of_lane[lane] = pointer(product.lanes[lane]);
        return registers;
    }

    void report_if_changed(const Product& product, const Registers& registers, const char* whose) {
        if (registers.seen.empty()) return;
        const int lane = registers.changed_lane();
        if (lane < 0) return;
        mistake("registers", product, ": ", whose, " were written by thread ", now_.thread + lane,
                registers.pending ? " before wait_products" : " after start_products");
    }

    // The sums of lanes, as 32-bit words, begin as the lanes' registers, which then hold nothing of use.
    void begin_sums(const Product& product) {
        Registers& registers = registers_of(product, true);
        report_if_changed(product, registers, "sums");
        if (!registers.pending) {
            std::vector<uint32_t>& sums = sums_[product.lanes[0].d];
            sums.resize(LANES * product.shape->sums());
            for (int lane = 0; lane < LANES; ++lane) {
                std::memcpy(&sums[lane * product.shape->sums()], product.lanes[lane].d, registers.bytes);
            }
            const uint32_t poison = product.shape->element == ProductShape::int8 ? 0x80000000u : 0xffffffffu;
            const std::vector<uint32_t> poisons(product.shape->sums(), poison);
            for (const TileProduct& lane : product.lanes) std::memcpy(lane.d, poisons.data(), registers.bytes);
            registers.look();
        }
        ++registers.pending;
    }

    // Shared memory

    template <typename Function>
    void for_each_chunk(const Product& product, Function function) {
        const auto visit = [&](uint64_t descriptor, int rows, int bytes) {
            const TileAddress tile(descriptor);
            for (int row = 0; row < rows; ++row) {
                for (int chunk = 0; chunk < bytes / 16; ++chunk) function(shared_.data() + tile.of(row, chunk));
            }
        };
        if (!product.lanes[0].a_registers) visit(product.lanes[0].a, ProductShape::ROWS, ProductShape::A_BYTES);
        visit(product.lanes[0].b, product.shape->n, product.shape->b_bytes());
    }

    // Each of the warps has to know that the operands are there.
    void read_shared(const Product& product) {
        const Knowledge common = causality_.common(now_.self(), LANES, WARPS);
        causality_.judge_by(&common);
        for_each_chunk(product, [&](uint8_t* chunk) { shared_.begin_reading(name(product), chunk, 16, 16); });
        causality_.judge_by(nullptr);
    }

    // The end

    void finish(Lanes& lanes, Product& product) {
        lanes.act_as(0);
        const ProductShape& shape = *product.shape;
        if (product.lanes[0].a_registers) {
            Registers& a = registers_of(product, false);
            report_if_changed(product, a, "A's registers");
            --a.pending;
        }
        if (shape.element == ProductShape::int8) {
            multiply<float, int32_t>(product, [](const uint8_t* from) { return static_cast<int8_t>(*from); });
        } else if (shape.element == ProductShape::float16) {
            multiply<double, float>(product, [](const uint8_t* from) { return half_to_float(from[0] | from[1] << 8); });
        } else {
            multiply<double, float>(product,
                                    [](const uint8_t* from) { return bfloat16_to_float(from[0] | from[1] << 8); });
        }
        for_each_chunk(product, [&](uint8_t* chunk) { shared_.end_reading(chunk, 16, agent_); });
        Registers& registers = registers_of(product, true);
        report_if_changed(product, registers, "sums");
        if (--registers.pending) return;
        const auto sums = sums_.find(product.lanes[0].d);
        for (int lane = 0; lane < LANES; ++lane) {
            std::memcpy(product.lanes[lane].d, &sums->second[lane * shape.sums()], registers.bytes);
        }
        registers.look();
        sums_.erase(sums);
    }

    // Products of 16-bit floats are exact in double, and those of an instruction are added there and rounded to float
    // once; of int8, 32 of them are exact in float already.
    template <typename Number, typename Sum, typename Decode>
    void multiply(const Product& product, Decode decode) {
        const ProductShape& shape = *product.shape;
        const int n = shape.n, size = shape.element_bytes(), slots = shape.slots();
        const std::vector<uint8_t> a_bytes = bytes_of_a(product);
        std::vector<Number> b(static_cast<size_t>(shape.k()) * n);
        const TileAddress tile(product.lanes[0].b);
        for (int column = 0; column < n; ++column) {
            for (int k = 0; k < shape.k(); ++k) {
                const int at = k * size;
                b[k * n + column] = decode(shared_.data() + tile.of(column, at / 16) + at % 16);
            }
        }
        auto* const sums = reinterpret_cast<Sum*>(sums_.at(product.lanes[0].d).data());
        std::vector<Number> row_sums(n);
        for (int row = 0; row < ProductShape::ROWS; ++row) {
            std::fill(row_sums.begin(), row_sums.end(), Number{0});
            for (int slot = 0; slot < slots; ++slot) {
                const Number value = decode(&a_bytes[row * ProductShape::A_BYTES + slot * size]);
                const Number* const from = &b[(shape.sparse ? product.where[row * slots + slot] : slot) * n];
                for (int column = 0; column < n; ++column) row_sums[column] += value * from[column];
            }
            for (int column = 0; column < n; ++column) {
                const int lane = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
                const int i = column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
                Sum& sum = sums[lane * shape.sums() + i];
                if (!product.lanes[0].add) sum = 0;
                add(sum, row_sums[column]);
            }
        }
    }

    std::vector<uint8_t> bytes_of_a(const Product& product) {
        std::vector<uint8_t> bytes(ProductShape::ROWS * ProductShape::A_BYTES);
        if (!product.lanes[0].a_registers) {
            const TileAddress tile(product.lanes[0].a);
            for (size_t at = 0; at < bytes.size(); at += 16) {
                std::memcpy(&bytes[at], shared_.data() + tile.of(at / 32, at % 32 / 16), 16);
            }
            return bytes;
        }
        for (int lane = 0; lane < LANES; ++lane) {
            const int row = lane / 32 * 16 + lane % 32 / 4, q = lane % 4;
            for (int i = 0; i < 4; ++i) {
                std::memcpy(&bytes[(row + 8 * (i % 2)) * 32 + 16 * (i / 2) + 4 * q], &product.a[4 * lane + i], 4);
            }
        }
        return bytes;
    }

    void place_all(Lanes& lanes, Product& product) {
        const ProductShape& shape = *product.shape;
        product.where.resize(ProductShape::ROWS * shape.slots());
        for (int row = 0; row < ProductShape::ROWS; ++row) {
            for (int group = 0; group < shape.k() / 4; ++group) {
                const int quad = row / 16 * 32 + 4 * (row % 8), upper = row % 16 / 8;
                int lane, shift;
                if (shape.element == ProductShape::int8) {
                    lane = quad + upper + 2 * (group / 8);
                    shift = 4 * (group % 8);
                } else {
                    lane = quad + 2 * shape.selector + group / 4;
                    shift = 16 * upper + 4 * (group % 4);
                }
                place(lanes, lane, row, group, product.lanes[lane].metadata >> shift & 15,
                      &product.where[row * shape.slots() + 2 * group]);
            }
        }
        lanes.act_as(0);
    }

    const Now& now_;
    Causality& causality_;
    Report& report_;
    Shared& shared_;
    int agent_ = -1;  // who reads for the products
    bool fenced_ = false;
    std::vector<Product> uncommitted_;
    std::deque<std::vector<Product>> groups_;
    std::map<const void*, std::vector<uint32_t>> sums_;  // by the first lane's registers
    std::map<const void*, Registers> registers_;
};

inline void run_start_products(Lanes& lanes) { lanes.warpgroup->fence(); }
inline constexpr Collective start_products{"start_products", run_start_products, 128};
inline void run_commit_products(Lanes& lanes) { lanes.warpgroup->commit(); }
inline constexpr Collective commit_products{"commit_products", run_commit_products, 128};
inline void run_wait_products(Lanes& lanes) { lanes.warpgroup->wait(lanes, lanes.of<int>(0)); }
template <int PENDING>
inline constexpr Collective wait_products{"wait_products", run_wait_products, 128};

inline void run_tile_product(Lanes& lanes) {
    lanes.act_as(0);
    lanes.warpgroup->start(lanes);
}
// One for each instruction: that is what the warps have to agree on.
template <ProductShape::Element ELEMENT, bool SPARSE, int N, int SELECTOR, bool A_IN_REGISTERS>
struct TileInstruction {
    static constexpr ProductShape shape{ELEMENT, SPARSE, N, SELECTOR};
    static constexpr Collective collective{SPARSE ? "multiply_sparse_tile" : "multiply_tile", run_tile_product, 128};
};

}  // namespace simt
