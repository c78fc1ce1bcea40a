// Threads that switch in user space: a fiber is a stack and the place on it where it goes on.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__) && defined(__ELF__)

// To the compiler a switch is a call, so that only what a call preserves has to be kept, on the stack that is left.
extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** from, void* to);
asm(R"(
    .pushsection .text.simt_switch, "axG", @progbits, simt_switch, comdat
    .weak simt_switch
    .hidden simt_switch
    .type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    stmxcsr (%rsp)
    fnstcw 4(%rsp)
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    ldmxcsr (%rsp)
    fldcw 4(%rsp)
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch, . - simt_switch
    .popsection
)");

namespace simt {

class Fiber {
  public:
    // The next switch to this fiber calls entry, which must not return.
    void start(uint8_t* stack_top, void (*entry)()) {
        const uintptr_t top = reinterpret_cast<uintptr_t>(stack_top) & ~uintptr_t{15};
        auto* word = reinterpret_cast<uint64_t*>(top);
        *--word = 0;  // where entry would return to; it also makes the stack look as after a call
        *--word = reinterpret_cast<uint64_t>(entry);
        for (int i = 0; i < 6; ++i) *--word = 0;
        uint32_t control[2] = {};
        asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(control[0]), "=m"(control[1]));
        std::memcpy(--word, control, sizeof(control));
        stack_ = word;
    }
    static void change(Fiber& from, Fiber& to) { simt_switch(&from.stack_, to.stack_); }

  private:
    void* stack_ = nullptr;
};

}  // namespace simt

#else

#include <ucontext.h>

namespace simt {

// The same, slower: a switch is a system call here.
class Fiber {
  public:
    void start(uint8_t* stack_top, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack_top - SIZE;
        context_.uc_stack.ss_size = SIZE;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    static void change(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

  private:
    static constexpr size_t SIZE = 64 << 10;  // fits below every Stacks::top
    ucontext_t context_;
};

}  // namespace simt

#endif

namespace simt {

// The stacks of a cluster, each above a page that may not be touched. Mapped once for the process, used by one launch
// at a time.
class Stacks {
  public:
    static constexpr int COUNT = 4096;

    static Stacks& get() {
        static Stacks stacks;
        return stacks;
    }
    uint8_t* top(int thread) const {
        // Not all on the same lines of the cache, which whole pages between the tops would mean.
        return memory_ + SIZE * (thread + 1) - 128 * (thread % 32);
    }

  private:
    Stacks() {
        void* memory = mmap(nullptr, SIZE * COUNT, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        memory_ = static_cast<uint8_t*>(memory);
        for (int i = 0; i < COUNT; ++i) mprotect(memory_ + SIZE * i, sysconf(_SC_PAGESIZE), PROT_NONE);
    }

    static constexpr size_t SIZE = 128 << 10;
    uint8_t* memory_ = nullptr;
};

}  // namespace simt
