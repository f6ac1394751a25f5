// Stands in for CUDA's own <cuda_runtime.h>, so that g++ compiles fused_cuda.cu as C++ and its kernels run on the CPU.
//
// One block runs at a time, each of its threads as a fiber. A warp runs as far as it can before the next one starts, in forward,
// reverse or random order: a missing barrier between two warps shows that a fair round robin would hide. Reported as faults: barriers
// that some threads of a block never reach, and shuffles whose lanes disagree on the mask or have exited. Not modelled: memory fences,
// ordering between blocks, streams, speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaError_t = int;
using cudaStream_t = void*;
enum : int { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace cuda_on_cpu {

enum Order { kForward, kReverse, kRandom };
inline Order order = kForward;
inline unsigned seed = 0;
inline std::string last_fault;
inline long launches = 0;  // since the program began

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;
enum State { kReady, kAtBarrier, kAtShuffle, kDone };

// Leaves the running stack, with its registers on top of it, for the one that `to` points to; `*left` says where to come back. As
// swapcontext, but without its two system calls, which would take most of the time.
extern "C" void cuda_on_cpu_switch(void** left, void* to);
#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif
asm(R"(
.pushsection .text
.weak cuda_on_cpu_switch
cuda_on_cpu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.popsection
)");

struct Fiber {
  std::unique_ptr<char[]> stack;
  void* top;
  State state;
  unsigned thread, mask, offset;
  uint64_t value;  // given to a shuffle, then taken from it
};

struct Block {
  std::vector<Fiber> fibers;
  void* scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::string fault;
};
inline Block* block = nullptr;

[[noreturn]] inline void fail(const char* what) { throw std::runtime_error(what); }

inline void fiber_entry() {
  try {
    (*block->body)();
  } catch (const std::exception& error) {
    block->fault = error.what();
  }
  block->current->state = kDone;
  cuda_on_cpu_switch(&block->current->top, block->scheduler);
}

inline void wait(State state) {
  Fiber& self = *block->current;
  self.state = state;
  cuda_on_cpu_switch(&self.top, block->scheduler);
}

// Completes the shuffle of a warp if all lanes of its mask have come to it.
inline bool step_warp(Fiber* lanes, int count) {
  const auto waiting = std::find_if(lanes, lanes + count, [](const Fiber& f) { return f.state == kAtShuffle; });
  if (waiting == lanes + count) return false;
  const unsigned mask = waiting->mask;
  for (int lane = 0; lane < count; ++lane) {
    const Fiber& fiber = lanes[lane];
    const bool named = mask >> lane & 1;
    if (named && fiber.state == kDone) fail("shuffle: a lane named in the mask has exited");
    if (fiber.state == kAtShuffle && (!named || fiber.mask != mask)) fail("shuffle: lanes disagree on the mask");
    if (named && fiber.state != kAtShuffle) return false;
  }
  std::vector<uint64_t> taken(count);
  for (int lane = 0; lane < count; ++lane) {
    const int from = lane + static_cast<int>(lanes[lane].offset);  // beyond the warp, a lane keeps its own
    taken[lane] = lanes[from < count ? from : lane].value;
  }
  for (int lane = 0; lane < count; ++lane) {
    lanes[lane].value = taken[lane];
    lanes[lane].state = kReady;
  }
  return true;
}

inline void run_block(Block& b, std::mt19937& random) {
  const int count = static_cast<int>(b.fibers.size()), warps = (count + kWarp - 1) / kWarp;
  std::vector<int> warp_order(warps), lane_order(kWarp);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  std::iota(lane_order.begin(), lane_order.end(), 0);
  for (std::vector<int>* o : {&warp_order, &lane_order}) {
    if (order == kReverse) std::reverse(o->begin(), o->end());
  }
  for (;;) {
    for (std::vector<int>* o : {&warp_order, &lane_order}) {
      if (order == kRandom) std::shuffle(o->begin(), o->end(), random);
    }
    for (int warp : warp_order) {
      const int first = warp * kWarp, lanes = std::min(kWarp, count - first);
      do {
        for (int lane : lane_order) {
          if (lane >= lanes || b.fibers[first + lane].state != kReady) continue;
          b.current = &b.fibers[first + lane];
          threadIdx = {b.current->thread, 0, 0};
          cuda_on_cpu_switch(&b.scheduler, b.current->top);
          if (!b.fault.empty()) fail(b.fault.c_str());
        }
      } while (step_warp(&b.fibers[first], lanes));
    }
    const auto in = [&](State s) { return std::count_if(b.fibers.begin(), b.fibers.end(), [s](const Fiber& f) { return f.state == s; }); };
    if (in(kDone) == count) return;
    if (in(kAtBarrier) != count) fail("__syncthreads() or a shuffle that some threads never reach");
    for (Fiber& fiber : b.fibers) fiber.state = kReady;
  }
}

inline void start(Fiber& fiber, unsigned thread) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  fiber.state = kReady;
  fiber.thread = thread;
  // As if it had left at its entry: six registers, the address to return to, and the stack's alignment at a function's begin.
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) / 16 * 16) - 8;
  std::fill_n(top, 6, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_entry);
  fiber.top = top;
}

inline void launch(dim3 grid, dim3 threads, const std::function<void()>& body) {
  const unsigned count = threads.x;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535) fail("invalid launch configuration");
  ++launches;
  Block b;
  b.fibers.resize(count);
  b.body = &body;
  block = &b;
  blockDim = threads;
  gridDim = grid;
  std::mt19937 random(++seed);
  std::vector<unsigned> blocks(grid.x * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (order == kReverse) std::reverse(blocks.begin(), blocks.end());
  if (order == kRandom) std::shuffle(blocks.begin(), blocks.end(), random);
  for (unsigned id : blocks) {
    blockIdx = {id % grid.x, id / grid.x, 0};
    for (unsigned i = 0; i < count; ++i) start(b.fibers[i], i);
    run_block(b, random);
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::kAtBarrier); }

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  cuda_on_cpu::Fiber& self = *cuda_on_cpu::block->current;
  self.mask = mask;
  self.offset = offset;
  std::memcpy(&self.value, &value, sizeof(T));
  cuda_on_cpu::wait(cuda_on_cpu::kAtShuffle);
  std::memcpy(&value, &self.value, sizeof(T));
  return value;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  try {
    cuda_on_cpu::launch(config->gridDim, config->blockDim, [&] { kernel(static_cast<Parameters>(arguments)...); });
    return cudaSuccess;
  } catch (const std::exception& error) {
    cuda_on_cpu::last_fault = error.what();
    return cudaErrorLaunchFailure;
  }
}
