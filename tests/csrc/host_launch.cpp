// tigon_host_launch: what python/native/'s HostLibrary calls, and the blocks' threads or fibers.
#include <cstdint>
#include <string_view>

#include "host_cuda.h"

namespace host {

#ifdef HOST_FIBERS

namespace {

constexpr size_t kStack = 128 * 1024;

// Kept from block to block, and run one after the other in a circle. setcontext only starts a
// fiber, on its own stack; afterwards they take turns by _setjmp and _longjmp, which ask nothing of
// the operating system: ten times as fast as swapcontext.
struct Fiber {
    Thread thread;
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool done;
};

Fiber fibers[1024];
Fiber* running;
Fiber* end;
unsigned live;
jmp_buf all_done;
const std::function<void()>* running_body;

void fiber_main() {
    for (;;) {
        (*running_body)();
        running->done = true;
        --live;
        yield();
    }
}

[[noreturn]] void go_on(Fiber* fiber) {
    running = fiber;
    current = &fiber->thread;
    if (!fiber->stack) {
        fiber->stack.reset(new char[kStack]);
        ucontext_t context;
        getcontext(&context);
        // Stacks that end at the same place of a page would meet in the same lines of the cache.
        const size_t shift = fiber->thread.index.x % 128 * 320;
        context.uc_stack = {fiber->stack.get(), 0, kStack - shift};
        makecontext(&context, fiber_main, 0);
        setcontext(&context);
    }
    _longjmp(fiber->place, 1);
}

}  // namespace

void yield() {
    if (_setjmp(running->place)) return;
    if (live == 0) _longjmp(all_done, 1);
    Fiber* next = running;
    do next = next + 1 < end ? next + 1 : fibers;
    while (next->done);
    go_on(next);
}

void run_block(Block& block, const std::function<void()>& body) {
    live = block.size.x;
    end = fibers + live;
    for (unsigned i = 0; i < live; ++i) {
        fibers[i].thread = {{i, 0, 0}, &block};
        fibers[i].done = false;
    }
    running_body = &body;
    if (!_setjmp(all_done)) go_on(fibers);
}

#else

void run_block(Block& block, const std::function<void()>& body) {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < block.size.x; ++i)
        threads.emplace_back([&block, &body, i] {
            Thread self{{i, 0, 0}, &block};
            current = &self;
            body();
        });
    for (std::thread& thread : threads) thread.join();
}

#endif

}  // namespace host

// 0, or 1 if there is no such kernel with that many bytes of arguments, or no such block.
extern "C" int tigon_host_launch(const char* name, std::int64_t grid_x, std::int64_t grid_y,
                                 std::int64_t threads, std::int64_t shared_bytes,
                                 const char* arguments, size_t bytes) {
    static const tigon::KernelTable table = tigon::all_kernels();
    const tigon::Kernel* kernel = nullptr;
    for (const tigon::Kernel& row : table)
        if (row.name == std::string_view(name) && row.parameter_bytes == bytes) kernel = &row;
    if (!kernel || threads % host::kWarp || threads > 1024) return 1;
    const auto& packed = *static_cast<const host::Packed*>(kernel->function);

    const size_t quads = (shared_bytes + sizeof(float4) - 1) / sizeof(float4);
    for (unsigned y = 0; y < grid_y; ++y) {
        for (unsigned x = 0; x < grid_x; ++x) {
            host::Block block{{x, y, 0}, dim3(threads), host::Barrier(threads), {}, nullptr};
            for (int w = 0; w < threads / host::kWarp; ++w)
                block.warps.push_back(std::make_unique<host::Warp>());
            block.shared.reset(new float4[quads]);
            std::memset(block.shared.get(), 0xff, quads * sizeof(float4));
            host::run_block(block, [&] { packed(arguments); });
        }
    }
    return 0;
}
