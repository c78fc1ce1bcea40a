// Shared and global memory, with a note beside each byte of who touched it when.
//
// The functions return whether the bytes exist and may be touched. What else is wrong is reported, and the kernel goes
// on: the launch fails at the end of the block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "causality.hpp"
#include "report.hpp"

namespace simt {

class Shared {
  public:
    Shared(const Now& now, const Causality& causality, Report& report)
        : now_(now), causality_(causality), report_(report) {}

    void resize(size_t size) {
        size_ = size;
        data_.reset(static_cast<uint8_t*>(std::aligned_alloc(ALIGNMENT, (size / ALIGNMENT + 1) * ALIGNMENT)));
        if (!data_) throw std::bad_alloc();
        notes_.assign(size, Note());
    }
    // For the next block, which finds nothing that it could mistake for its own. (NaN, as floats.)
    void begin_block() {
        born_ = now_.block;
        std::memset(data_.get(), 0xff, size_);
        if (causality_.exact()) notes_.assign(size_, Note());
        readers_.assign(1, Reader());
        free_ = 0;
    }
    // Of what was read since the last barrier, the warps are known. Their lanes count as readers, all of them.
    void become_exact() {
        for (Note& note : notes_) {
            const uint32_t warps = note.others;
            note.others = 0;
            if (note.read < now_.interval) continue;
            for (int thread = 0; thread < 32 * 32; ++thread) {
                if (warps >> thread / 32 & 1 && note.reader != note.other_reader) {
                    note_read(note, static_cast<uint16_t>(thread), note.read);
                }
            }
        }
    }

    uint8_t* data() { return data_.get(); }
    size_t offset(const void* pointer) const {
        return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(data_.get());
    }

    bool read(const char* operation, const void* from, size_t bytes, size_t alignment) {
        if (!inside(operation, from, bytes, alignment)) return false;
        Note* const notes = &notes_[offset(from)];
        if (causality_.exact()) return read_exactly(operation, notes, bytes), true;
        const auto thread = static_cast<uint16_t>(now_.thread);
        const uint32_t warp = 1u << thread / 32;
        bool wrong = false;
        for (Note* note = notes; note != notes + bytes; ++note) {
            wrong |= note->is_busy() | (note->written < born_) |
                     ((note->written == now_.interval) & (note->writer != thread));
            if (note->read != now_.interval) {
                note->read = now_.interval;
                note->reader = note->other_reader = thread;
                note->others = warp;
            } else if (note->reader != thread) {
                note->other_reader = thread;
                note->others |= warp;
            }
        }
        if (wrong) explain_read(operation, notes, bytes);
        return true;
    }

    bool write(const char* operation, void* to, size_t bytes, size_t alignment) {
        if (!writable(operation, to, bytes, alignment)) return false;
        note_written(to, bytes, State::idle);
        return true;
    }

    // A copy is a write of the thread that issues it: at once for those who would still read what is overwritten, and
    // when it has been waited for, for those who read it. Between the two nobody may touch the bytes.
    bool begin_copy(const char* operation, void* to, size_t bytes) {
        if (!writable(operation, to, bytes, bytes)) return false;
        note_written(to, bytes, State::copying);
        return true;
    }
    void end_copy(void* to, size_t bytes) { note_written(to, bytes, State::idle); }

    // The same through the async proxy. The bytes are written by an agent, of whom those know that its barrier tells.
    bool begin_bulk(const char* operation, void* to, size_t bytes, size_t alignment) {
        if (!writable(operation, to, bytes, alignment)) return false;
        check_proxy(operation, "writes", to, bytes);
        note_written(to, bytes, State::arriving);
        return true;
    }
    void end_bulk(void* to, size_t bytes, int agent) {
        Note* const notes = &notes_[offset(to)];
        for (Note* note = notes; note != notes + bytes; ++note) {
            note->written = now_.clock;
            note->writer = static_cast<uint16_t>(agent);
            note->state = State::idle;
        }
    }

    // What the async proxy reads between the two, nobody may write.
    bool begin_reading(const char* operation, const void* from, size_t bytes, size_t alignment) {
        if (!inside(operation, from, bytes, alignment)) return false;
        Note* const notes = &notes_[offset(from)];
        if (!std::all_of(notes, notes + bytes, [&](const Note& note) { return may_read(note); })) {
            explain_read(operation, notes, bytes);
        }
        check_proxy(operation, "reads", from, bytes);
        for (Note* note = notes; note != notes + bytes; ++note) ++note->readings;
        return true;
    }
    void end_reading(const void* from, size_t bytes, int actor) {
        Note* const notes = &notes_[offset(from)];
        for (Note* note = notes; note != notes + bytes; ++note) {
            --note->readings;
            note_read(*note, static_cast<uint16_t>(actor), now_.clock);
        }
    }

    // From now on the bytes belong to a barrier, and to nobody else.
    bool reserve(const char* operation, void* at, size_t bytes) {
        if (!writable(operation, at, bytes, bytes)) return false;
        note_written(at, bytes, State::barrier);
        return true;
    }

  private:
    enum class State : uint8_t { idle, copying, arriving, barrier };
    struct Note {
        uint32_t written = 0;
        uint32_t read = 0;
        // Two readers are enough to know whether there is one who is not the writer, as long as one barrier orders
        // all of them; beside them stand the warps that read. Otherwise each reader counts: others is a place in
        // readers_, and other_reader is not used.
        uint32_t others = 0;
        uint16_t writer = 0;
        uint16_t reader = 0;
        uint16_t other_reader = 0;
        State state = State::idle;
        uint8_t readings = 0;  // under way, by the async proxy

        bool is_busy() const { return state != State::idle; }
    };
    // Zero ends a list.
    struct Reader {
        uint32_t read = 0;
        uint32_t next = 0;
        uint16_t actor = 0;
    };
    struct Free {
        void operator()(uint8_t* data) const { std::free(data); }
    };
    static constexpr size_t ALIGNMENT = 1024;

    bool inside(const char* operation, const void* pointer, size_t bytes, size_t alignment) {
        const size_t at = offset(pointer);
        if (at > size_ || bytes > size_ - at) {
            report_.add("out of range", operation, " of ", bytes, " bytes at shared ", static_cast<ptrdiff_t>(at),
                        ", of ", size_, " bytes");
            return false;
        }
        if (at % alignment) {
            report_.add("misaligned", operation, " at shared ", at, " must be at a multiple of ", alignment);
        }
        return true;
    }

    bool writable(const char* operation, void* to, size_t bytes, size_t alignment) {
        if (!inside(operation, to, bytes, alignment)) return false;
        const Note* const notes = &notes_[offset(to)];
        if (causality_.exact()) return write_exactly(operation, notes, bytes), true;
        const auto thread = static_cast<uint16_t>(now_.thread);
        bool wrong = false;
        for (const Note* note = notes; note != notes + bytes; ++note) {
            wrong |= note->is_busy() | ((note->written == now_.interval) & (note->writer != thread)) |
                     ((note->read == now_.interval) & ((note->reader != thread) | (note->other_reader != thread)));
        }
        if (wrong) explain_write(operation, notes, bytes);
        return true;
    }

    void note_written(void* to, size_t bytes, State state) {
        Note* const notes = &notes_[offset(to)];
        const uint32_t time = causality_.exact() ? now_.clock : now_.interval;
        for (Note* note = notes; note != notes + bytes; ++note) {
            note->written = time;
            note->writer = static_cast<uint16_t>(now_.self());
            note->state = state;
        }
        if (causality_.exact()) forget_readers(notes, bytes);
    }

    void read_exactly(const char* operation, Note* notes, size_t bytes) {
        bool wrong = false;
        for (Note* note = notes; note != notes + bytes; ++note) {
            wrong |= !may_read(*note);
            note_read(*note, static_cast<uint16_t>(now_.self()), now_.clock);
        }
        if (wrong) explain_read(operation, notes, bytes);
    }

    bool may_read(const Note& note) const {
        return !note.is_busy() && note.written >= born_ && causality_.seen(note.writer, note.written);
    }

    void write_exactly(const char* operation, const Note* notes, size_t bytes) {
        const auto fits = [&](const Note& note) {
            return !note.is_busy() && !note.readings && !is_written_before(note) && unordered_reader(note) < 0;
        };
        if (!std::all_of(notes, notes + bytes, fits)) explain_write(operation, notes, bytes);
    }

    // Who read what would now be written, and is not known to have done so; or -1.
    int unordered_reader(const Note& note) const {
        if (!causality_.exact()) {
            const int reader = note.reader != now_.thread ? note.reader : note.other_reader;
            return note.read == now_.interval && reader != now_.thread ? reader : -1;
        }
        if (note.read < born_) return -1;
        if (!causality_.seen_reading(note.reader, note.read)) return note.reader;
        for (uint32_t i = note.others; i; i = readers_[i].next) {
            if (!causality_.seen_reading(readers_[i].actor, readers_[i].read)) return readers_[i].actor;
        }
        return -1;
    }

    // Readers that the present one knows of are told of by it.
    void note_read(Note& note, uint16_t actor, uint32_t time) {
        const bool own = actor == now_.self();
        const bool known = own && !note.others && causality_.seen(note.reader, note.read);
        if (note.reader == actor || note.read < born_ || known) {
            note.reader = actor;
            note.read = time;
            return;
        }
        uint32_t place = 0;
        for (uint32_t i = note.others; i; i = readers_[i].next) {
            if (readers_[i].actor == actor) {
                readers_[i].read = time;
                return;
            }
            if (own && causality_.seen(readers_[i].actor, readers_[i].read)) place = i;
        }
        if (!place) {
            place = new_reader();
            readers_[place].next = note.others;
            note.others = place;
        }
        readers_[place].actor = actor;
        readers_[place].read = time;
    }

    uint32_t new_reader() {
        if (const uint32_t reader = free_) {
            free_ = readers_[reader].next;
            return reader;
        }
        readers_.push_back(Reader());
        return static_cast<uint32_t>(readers_.size() - 1);
    }

    // Whoever comes after the write comes after those whom the write came after.
    void forget_readers(Note* notes, size_t bytes) {
        for (Note* note = notes; note != notes + bytes; ++note) {
            note->read = 0;
            while (const uint32_t reader = note->others) {
                note->others = readers_[reader].next;
                readers_[reader].next = free_;
                free_ = reader;
            }
        }
    }

    // The async proxy sees what threads wrote once they have fenced it and told.
    void check_proxy(const char* operation, const char* does, const void* pointer, size_t bytes) {
        const Note* const notes = &notes_[offset(pointer)];
        for (const Note* note = notes; note != notes + bytes; ++note) {
            if (note->written < born_ || causality_.is_agent(note->writer)) continue;
            if (causality_.fenced(note->writer, note->written)) continue;
            return report_.add("proxy", operation, " ", does, " shared ", note - notes_.data(), ", which ",
                               causality_.name(note->writer), " wrote without fence_async_proxy before it told of it");
        }
    }

    void explain_read(const char* operation, const Note* notes, size_t bytes) {
        for (const Note* note = notes; note != notes + bytes; ++note) {
            if (note->is_busy()) return explain_busy(operation, *note);
            if (note->written < born_) {
                return report_.add("uninitialized", operation, " reads shared ", note - notes_.data(),
                                   ", which no thread has written");
            }
            if (is_written_meanwhile(*note)) return explain_race(operation, "reads", *note, note->writer, "wrote");
        }
    }

    void explain_write(const char* operation, const Note* notes, size_t bytes) {
        for (const Note* note = notes; note != notes + bytes; ++note) {
            if (note->is_busy()) return explain_busy(operation, *note);
            if (note->readings) {
                return report_.add("read under way", operation, " writes shared ", note - notes_.data(),
                                   ", which a store or product that is not waited for still reads");
            }
            if (is_written_before(*note)) return explain_race(operation, "writes", *note, note->writer, "wrote");
            const int reader = unordered_reader(*note);
            if (reader >= 0) return explain_race(operation, "writes", *note, reader, "read");
        }
    }

    bool is_written_meanwhile(const Note& note) const {
        if (causality_.exact()) return note.written >= born_ && !causality_.seen(note.writer, note.written);
        return note.written == now_.interval && note.writer != now_.thread;
    }

    // And would now be written again.
    bool is_written_before(const Note& note) const {
        if (!causality_.exact() || !causality_.is_agent(note.writer)) return is_written_meanwhile(note);
        return note.written >= born_ && !causality_.seen_reading(note.writer, note.written);
    }

    void explain_race(const char* operation, const char* does, const Note& note, int other, const char* did) {
        report_.add("race", operation, " ", does, " shared ", &note - notes_.data(), ", which ",
                    causality_.name(other), " ", did, " ", causality_.exact() ? "at the same time" : now_.since());
    }

    void explain_busy(const char* operation, const Note& note) {
        const ptrdiff_t at = &note - notes_.data();
        if (note.state == State::barrier) {
            return report_.add("barrier", operation, " touches shared ", at, ", which belongs to a barrier");
        }
        report_.add("copy under way", operation, " touches shared ", at, ", to which ", causality_.name(note.writer),
                    " copies and has not waited");
    }

    const Now& now_;
    const Causality& causality_;
    Report& report_;
    std::unique_ptr<uint8_t, Free> data_;
    size_t size_ = 0;
    uint32_t born_ = 0;  // the block
    std::vector<Note> notes_;
    std::vector<Reader> readers_;
    uint32_t free_ = 0;
};

// What a launch may do with a buffer.
struct Use {
    bool writable;
    bool initialized;
    bool written_once;  // in one launch
};
inline constexpr Use Input{false, true, false};
inline constexpr Use Output{true, false, true};
inline constexpr Use Scratch{true, false, false};
// Counters, and what is updated in place.
inline constexpr Use InOut{true, true, false};

class Global {
  public:
    // Whether a load goes past the caches that do not see what is written during the launch.
    enum Path { Cached, Coherent };

    Global(const Now& now, const Causality& causality, Report& report)
        : now_(now), causality_(causality), report_(report) {}

    void add(const std::string& name, const void* data, size_t size, Use use) {
        for (const Buffer& buffer : buffers_) {
            if (buffer.name == name) throw std::invalid_argument("two buffers are named " + name);
        }
        auto* bytes = static_cast<uint8_t*>(const_cast<void*>(data));
        if (!use.initialized) std::memset(bytes, 0xff, size);
        buffers_.push_back({name, bytes, size, use, std::vector<Note>(use.writable ? size : 0)});
        for (Note& note : buffers_.back().notes) note.initialized = use.initialized;
    }

    // The first byte of a buffer that no launch has written, or -1.
    ptrdiff_t first_unwritten(const std::string& name) const {
        for (const Buffer& buffer : buffers_) {
            if (buffer.name != name) continue;
            if (!buffer.use.writable) return buffer.size ? 0 : -1;
            for (size_t at = 0; at < buffer.size; ++at) {
                if (!buffer.notes[at].written) return static_cast<ptrdiff_t>(at);
            }
            return -1;
        }
        throw std::invalid_argument("no buffer is named " + name);
    }

    void begin_launch() { published_.clear(); }
    void begin_cluster(int threads, int blocks) {
        threads_ = threads;
        fences_.assign(threads * blocks, Fence());
    }

    bool read(const char* operation, const void* from, size_t bytes, size_t alignment, Path path) {
        Buffer* const buffer = find(operation, from, bytes, alignment);
        if (!buffer) return false;
        if (!buffer->use.writable) return true;
        const size_t first = buffer->offset(from);
        for (size_t at = first; at < first + bytes; ++at) {
            Note& note = buffer->notes[at];
            if (const char* fault = fault_of_read(note, path)) {
                report_.add(fault, operation, " reads ", buffer->name, " + ", at, written_by(note));
                break;
            }
        }
        if (path == Cached) {
            for (size_t at = first; at < first + bytes; ++at) buffer->notes[at].reading_block = now_.block;
        }
        return true;
    }

    bool write(const char* operation, void* to, size_t bytes, size_t alignment) {
        Buffer* const buffer = find(operation, to, bytes, alignment);
        if (!buffer) return false;
        const size_t first = buffer->offset(to);
        if (!buffer->use.writable) {
            report_.add("read only", operation, " writes ", buffer->name, " + ", first);
            return false;
        }
        for (size_t at = first; at < first + bytes; ++at) {
            const Note& note = buffer->notes[at];
            if (const char* fault = fault_of_write(note, buffer->use)) {
                report_.add(fault, operation, " writes ", buffer->name, " + ", at, written_by(note));
                break;
            }
        }
        note_written(*buffer, first, bytes, static_cast<uint16_t>(now_.self()));
        return true;
    }

    bool update(const char* operation, void* at, size_t bytes) {
        Buffer* const buffer = find(operation, at, bytes, bytes);
        if (!buffer) return false;
        const size_t first = buffer->offset(at);
        if (!buffer->use.writable) {
            report_.add("read only", operation, " writes ", buffer->name, " + ", first);
            return false;
        }
        if (!buffer->notes[first].initialized) {
            report_.add("uninitialized", operation, " reads ", buffer->name, " + ", first);
        }
        note_written(*buffer, first, bytes, ATOMICALLY);
        return true;
    }

    // The clock has just stepped for it.
    void fence() {
        fences_[now_.self()] = {now_.clock, now_.interval, {}};
        if (causality_.exact()) fences_[now_.self()].seen = causality_.mine().seen;
    }

    // Publishes to those who see this update what was fenced before it, by this thread or by one that it knows to have
    // done so; and with a fence goes what its thread knew of: what all wrote before the last barrier, at least.
    void publish() {
        Published* published = nullptr;
        for (int thread = 0; thread < threads_; ++thread) {
            const Fence& fence = fences_[now_.first + thread];
            const bool before = thread == now_.thread || fence.interval < now_.interval ||
                                causality_.seen(now_.first + thread, fence.clock);
            if (!fence.clock || !before) continue;
            if (!published) published = &publications_of_this_block();
            published->of_thread[thread] = fence.clock;
            published->of_all = std::max(published->of_all, fence.interval);
            for (int other = 0; other < threads_; ++other) {
                if (static_cast<size_t>(now_.first + other) >= fence.seen.size()) break;
                uint32_t& time = published->of_thread[other];
                time = std::max(time, fence.seen[now_.first + other]);
            }
        }
    }

  private:
    static constexpr uint16_t ATOMICALLY = std::numeric_limits<uint16_t>::max();
    struct Note {
        uint32_t written = 0;  // on the clock
        uint32_t writing_block = 0;
        uint32_t reading_block = 0;  // by a cached load
        uint16_t writer = 0;
        bool initialized = false;
    };
    struct Buffer {
        std::string name;
        uint8_t* data;
        size_t size;
        Use use;
        std::vector<Note> notes;  // none of what cannot be written

        size_t offset(const void* pointer) const {
            return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(data);
        }
        bool holds(const void* pointer, size_t bytes) const {
            const size_t at = offset(pointer);
            return at <= size && bytes <= size - at;
        }
        size_t distance(const void* pointer) const {
            const auto at = static_cast<ptrdiff_t>(offset(pointer));
            return at < 0 ? -at : std::max<ptrdiff_t>(0, at - static_cast<ptrdiff_t>(size));
        }
    };
    struct Fence {
        uint32_t clock = 0;
        uint32_t interval = 0;
        std::vector<uint32_t> seen;
    };
    // What a block has published: writes before these times.
    struct Published {
        uint32_t block;
        uint32_t of_all;
        std::vector<uint32_t> of_thread;
    };

    Buffer* find(const char* operation, const void* pointer, size_t bytes, size_t alignment) {
        Buffer* buffer = last_ < buffers_.size() ? &buffers_[last_] : nullptr;
        if (!buffer || !buffer->holds(pointer, bytes)) {
            buffer = nullptr;
            for (Buffer& other : buffers_) {
                if (!other.holds(pointer, bytes)) continue;
                buffer = &other;
                last_ = &other - buffers_.data();
                break;
            }
        }
        if (!buffer) {
            explain_range(operation, pointer, bytes);
        } else if (reinterpret_cast<uintptr_t>(pointer) % alignment) {
            report_.add("misaligned", operation, " at ", buffer->name, " + ", buffer->offset(pointer),
                        " must be at a multiple of ", alignment);
        }
        return buffer;
    }

    void explain_range(const char* operation, const void* pointer, size_t bytes) {
        const auto nearest = std::min_element(buffers_.begin(), buffers_.end(), [&](const Buffer& a, const Buffer& b) {
            return a.distance(pointer) < b.distance(pointer);
        });
        if (nearest == buffers_.end()) {
            return report_.add("out of range", operation, " of ", bytes, " bytes, and there are no buffers");
        }
        const auto at = static_cast<ptrdiff_t>(nearest->offset(pointer));
        report_.add("out of range", operation, " of ", bytes, " bytes at ", nearest->name, at < 0 ? " - " : " + ",
                    std::abs(at), ", of ", nearest->size, " bytes");
    }

    bool written_in_launch(const Note& note) const { return note.written > now_.launch; }
    bool written_at_the_same_time(const Note& note) const {
        return note.written >= now_.interval && note.writer != ATOMICALLY && !is_known(note);
    }
    bool is_known(const Note& note) const {
        return note.written > now_.cluster && note.writer != ATOMICALLY && causality_.seen(note.writer, note.written);
    }

    const char* fault_of_read(const Note& note, Path path) const {
        if (!note.initialized) return "uninitialized";
        if (!written_in_launch(note)) return nullptr;
        if (path == Cached) return "not coherent";
        if (written_at_the_same_time(note)) return "race";
        if (note.writing_block != now_.block && !is_known(note) && !is_published(note)) return "not fenced";
        return nullptr;
    }

    const char* fault_of_write(const Note& note, Use use) const {
        if (use.written_once && written_in_launch(note)) return "written twice";
        if (written_at_the_same_time(note)) return "race";
        // It is by chance that the other block came first.
        if (note.reading_block > now_.launch && note.reading_block != now_.block) return "read by another block";
        return nullptr;
    }

    // For a message: who wrote the byte last, if that was in this launch.
    std::string written_by(const Note& note) const {
        if (!written_in_launch(note)) return "";
        if (note.writer == ATOMICALLY) return ", which was updated atomically";
        return ", which thread " + std::to_string(note.writer % threads_) +
               (note.writing_block == now_.block ? " of this block" : " of another block") + " wrote";
    }

    bool is_published(const Note& note) const {
        if (note.writer == ATOMICALLY) return true;
        for (const Published& published : published_) {
            if (published.block != note.writing_block) continue;
            return note.written < published.of_all || note.written < published.of_thread[note.writer % threads_];
        }
        return false;
    }

    Published& publications_of_this_block() {
        for (auto published = published_.rbegin(); published != published_.rend(); ++published) {
            if (published->block == now_.block) return *published;
        }
        published_.push_back({now_.block, 0, std::vector<uint32_t>(threads_)});
        return published_.back();
    }

    void note_written(Buffer& buffer, size_t first, size_t bytes, uint16_t writer) {
        for (size_t at = first; at < first + bytes; ++at) {
            Note& note = buffer.notes[at];
            note.written = now_.clock;
            note.writing_block = now_.block;
            note.writer = writer;
            note.initialized = true;
        }
    }

    const Now& now_;
    const Causality& causality_;
    Report& report_;
    int threads_ = 1;  // of a block
    std::vector<Buffer> buffers_;
    size_t last_ = 0;
    std::vector<Fence> fences_;
    std::vector<Published> published_;
};

}  // namespace simt
