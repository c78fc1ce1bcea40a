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

#include "report.hpp"

namespace simt {

class Shared {
  public:
    Shared(const Now& now, Report& report) : now_(now), report_(report) {}

    void resize(size_t size) {
        size_ = size;
        data_.reset(static_cast<uint8_t*>(std::aligned_alloc(ALIGNMENT, (size / ALIGNMENT + 1) * ALIGNMENT)));
        if (!data_) throw std::bad_alloc();
        notes_.assign(size, Note());
    }
    // For the next block, which finds nothing that it could mistake for its own. (NaN, as floats.)
    void poison() { std::memset(data_.get(), 0xff, size_); }

    uint8_t* data() { return data_.get(); }

    bool read(const char* operation, const void* from, size_t bytes, size_t alignment) {
        if (!inside(operation, from, bytes, alignment)) return false;
        Note* const notes = &notes_[offset(from)];
        const auto thread = static_cast<uint16_t>(now_.thread);
        bool wrong = false;
        for (Note* note = notes; note != notes + bytes; ++note) {
            wrong |= note->copying | (note->written < now_.block) |
                     ((note->written == now_.interval) & (note->writer != thread));
            if (note->read != now_.interval) {
                note->read = now_.interval;
                note->reader = note->other_reader = thread;
            } else if (note->reader != thread) {
                note->other_reader = thread;
            }
        }
        if (wrong) explain_read(operation, from, bytes);
        return true;
    }

    bool write(const char* operation, void* to, size_t bytes, size_t alignment) {
        if (!writable(operation, to, bytes, alignment)) return false;
        note_written(to, bytes, false);
        return true;
    }

    // A copy is a write of the thread that issues it: at once for those who would still read what is overwritten, and
    // when it has been waited for, for those who read it. Between the two nobody may touch the bytes.
    bool begin_copy(const char* operation, void* to, size_t bytes) {
        if (!writable(operation, to, bytes, bytes)) return false;
        note_written(to, bytes, true);
        return true;
    }
    void end_copy(void* to, size_t bytes) { note_written(to, bytes, false); }

  private:
    // Two readers are enough to know whether there is one who is not the writer.
    struct Note {
        uint32_t written = 0;
        uint32_t read = 0;
        uint16_t writer = 0;
        uint16_t reader = 0;
        uint16_t other_reader = 0;
        bool copying = false;
    };
    struct Free {
        void operator()(uint8_t* data) const { std::free(data); }
    };
    static constexpr size_t ALIGNMENT = 128;

    size_t offset(const void* pointer) const {
        return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(data_.get());
    }

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
        const auto thread = static_cast<uint16_t>(now_.thread);
        bool wrong = false;
        for (const Note* note = notes; note != notes + bytes; ++note) {
            wrong |= note->copying | ((note->written == now_.interval) & (note->writer != thread)) |
                     ((note->read == now_.interval) & ((note->reader != thread) | (note->other_reader != thread)));
        }
        if (wrong) explain_write(operation, to, bytes);
        return true;
    }

    void note_written(void* to, size_t bytes, bool copying) {
        Note* const notes = &notes_[offset(to)];
        for (Note* note = notes; note != notes + bytes; ++note) {
            note->written = now_.interval;
            note->writer = now_.thread;
            note->copying = copying;
        }
    }

    void explain_read(const char* operation, const void* from, size_t bytes) {
        for (size_t at = offset(from); at < offset(from) + bytes; ++at) {
            const Note& note = notes_[at];
            if (note.copying) return explain_copying(operation, at, note);
            if (note.written < now_.block) {
                return report_.add("uninitialized", operation, " reads shared ", at, ", which no thread has written");
            }
            if (note.written == now_.interval && note.writer != now_.thread) {
                return report_.add("race", operation, " reads shared ", at, ", which thread ", note.writer, " wrote ",
                                   now_.since());
            }
        }
    }

    void explain_write(const char* operation, const void* to, size_t bytes) {
        for (size_t at = offset(to); at < offset(to) + bytes; ++at) {
            const Note& note = notes_[at];
            if (note.copying) return explain_copying(operation, at, note);
            if (note.written == now_.interval && note.writer != now_.thread) {
                return report_.add("race", operation, " writes shared ", at, ", which thread ", note.writer, " wrote ",
                                   now_.since());
            }
            const int reader = note.reader != now_.thread ? note.reader : note.other_reader;
            if (note.read == now_.interval && reader != now_.thread) {
                return report_.add("race", operation, " writes shared ", at, ", which thread ", reader, " read ",
                                   now_.since());
            }
        }
    }

    void explain_copying(const char* operation, size_t at, const Note& note) {
        report_.add("copy under way", operation, " touches shared ", at, ", to which thread ", note.writer,
                    " copies and has not waited");
    }

    const Now& now_;
    Report& report_;
    std::unique_ptr<uint8_t, Free> data_;
    size_t size_ = 0;
    std::vector<Note> notes_;
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

    Global(const Now& now, Report& report) : now_(now), report_(report) {}

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
    void begin_block(int threads) { fences_.assign(threads, Fence()); }

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
        note_written(*buffer, first, bytes, static_cast<uint16_t>(now_.thread));
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
    void fence() { fences_[now_.thread] = {now_.clock, now_.interval}; }

    // Publishes to those who see this update what was fenced before it, by this thread or before the last barrier; and
    // with a fence goes what all threads wrote before the barrier that precedes it.
    void publish() {
        Published* published = nullptr;
        for (size_t thread = 0; thread < fences_.size(); ++thread) {
            const Fence& fence = fences_[thread];
            const bool before = static_cast<int>(thread) == now_.thread || fence.interval < now_.interval;
            if (!fence.clock || !before) continue;
            if (!published) published = &publications_of_this_block();
            published->of_thread[thread] = fence.clock;
            published->of_all = std::max(published->of_all, fence.interval);
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
        return note.written >= now_.interval && note.writer != now_.thread && note.writer != ATOMICALLY;
    }

    const char* fault_of_read(const Note& note, Path path) const {
        if (!note.initialized) return "uninitialized";
        if (!written_in_launch(note)) return nullptr;
        if (path == Cached) return "not coherent";
        if (written_at_the_same_time(note)) return "race";
        if (note.writing_block != now_.block && !is_published(note)) return "not fenced";
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
        return ", which thread " + std::to_string(note.writer) +
               (note.writing_block == now_.block ? " of this block" : " of another block") + " wrote";
    }

    bool is_published(const Note& note) const {
        if (note.writer == ATOMICALLY) return true;
        for (const Published& published : published_) {
            if (published.block != note.writing_block) continue;
            return note.written < published.of_all || note.written < published.of_thread[note.writer];
        }
        return false;
    }

    Published& publications_of_this_block() {
        if (published_.empty() || published_.back().block != now_.block) {
            published_.push_back({now_.block, 0, std::vector<uint32_t>(fences_.size())});
        }
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
    Report& report_;
    std::vector<Buffer> buffers_;
    size_t last_ = 0;
    std::vector<Fence> fences_;
    std::vector<Published> published_;
};

}  // namespace simt
