// tigon_host_launch: what python/native/'s HostLibrary calls, and the blocks' threads or fibers.
#include <cstdint>
#include <string_view>

#include "host_cuda.h"

namespace host {

#ifdef HOST_FIBERS

namespace {

constexpr size_t kStack = 128 * 1024;

struct Fiber {
    Thread thread;
    ucontext_t context;
    bool done = false;
};

ucontext_t scheduler;
Fiber* running = nullptr;
const std::function<void()>* running_body = nullptr;

void fiber_main() {
    (*running_body)();
    running->done = true;
    swapcontext(&running->context, &scheduler);
}

}  // namespace

void yield() {
    swapcontext(&running->context, &scheduler);
}

void run_block(Block& block, const std::function<void()>& body) {
    static std::vector<char> stacks;
    stacks.resize(block.size.x * kStack);
    std::vector<Fiber> fibers(block.size.x);
    running_body = &body;
    for (unsigned i = 0; i < block.size.x; ++i) {
        fibers[i].thread = {{i, 0, 0}, &block};
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack = {&stacks[i * kStack], 0, kStack};
        makecontext(&fibers[i].context, fiber_main, 0);
    }
    for (size_t live = fibers.size(); live > 0;) {
        for (Fiber& fiber : fibers) {
            if (fiber.done) continue;
            running = &fiber;
            current = &fiber.thread;
            swapcontext(&scheduler, &fiber.context);
            live -= fiber.done;
        }
    }
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

// 0, or 1 if there is no such kernel with that many bytes of arguments.
extern "C" int tigon_host_launch(const char* name, std::int64_t grid_x, std::int64_t grid_y,
                                 std::int64_t threads, std::int64_t shared_bytes,
                                 const char* arguments, size_t bytes) {
    static const tigon::KernelTable table = tigon::all_kernels();
    const tigon::Kernel* kernel = nullptr;
    for (const tigon::Kernel& row : table)
        if (row.name == std::string_view(name) && row.parameter_bytes == bytes) kernel = &row;
    if (!kernel || threads % host::kWarp) return 1;
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
