// Runs CUDA kernels on the CPU, as far as csrc/cuda needs it, to test them where there is no GPU.
//
// A block's threads are fibers of one thread of the operating system: they change places where they wait for each
// other, in an order that varies from one wait to the next. The blocks of a launch run one after the other, in an order
// that varies likewise; those of a cooperative launch run at the same time, each on a thread of its own. A kernel that
// forgets a barrier, depends on an order, or has threads wait at different places is found out. What the memory of a
// GPU may do besides (stale caches, reordered writes) is not.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // a block stays on its thread
#define __isGlobal(pointer) true
#define __builtin_assume(x) static_cast<void>(x)
#define CUDART_VERSION 13000

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
  dim3() = default;
};

namespace emulator {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kMultiprocessors = 3;  // with room for one block each
constexpr size_t kStack = 128 << 10;

inline std::atomic<long> launches{0};
inline std::atomic<bool> idle{false};  // kernels are launched and do nothing, to time the host alone

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

// Where the blocks of a cooperative launch meet.
class Meeting {
 public:
  explicit Meeting(unsigned all) : all_(all) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned turn = turn_;
    if (++here_ == all_) {
      here_ = 0;
      ++turn_;
      come_.notify_all();
    } else {
      come_.wait(lock, [&] { return turn != turn_; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable come_;
  unsigned all_, here_ = 0, turn_ = 0;
};

enum class Wait { none, warp, block, grid, done };

struct Fiber {
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::none;
  int turn = 0;  // of its warp's exchanges
};

// What runs blocks on one thread of the operating system.
class Runner {
 public:
  unsigned thread = 0, block = 0, blocks = 0;
  Meeting* meeting = nullptr;

  static Runner& here() {
    // Plain pointers, as this is asked for more often than anything else.
    static thread_local Runner* runner = nullptr;
    if (runner == nullptr) {
      static thread_local std::unique_ptr<Runner> owner;
      owner = std::make_unique<Runner>();
      runner = owner.get();
    }
    return *runner;
  }

  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    if (!fibers_[0].stack) start();
    for (Fiber& fiber : fibers_) fiber.wait = Wait::none;
    for (;;) {
      const Wait wait = together(order(kThreads / kWarp), [this](int warp) { return advance(warp); });
      if (wait == Wait::done) return;
      if (wait == Wait::grid) {
        if (meeting == nullptr) fail("a grid waits that was not launched to");
        meeting->wait();
      }
    }
  }

  void wait(Wait why) {
    Fiber& fiber = fibers_[thread];
    fiber.wait = why;
    if (_setjmp(fiber.at) == 0) _longjmp(scheduler_, 1);
  }

  // What the other lane of the warp gives.
  template <class T>
  T exchanged(T value, unsigned lane) {
    Fiber& fiber = fibers_[thread];
    unsigned char(*places)[8] = exchange_[thread / kWarp][fiber.turn];
    fiber.turn ^= 1;
    static_assert(sizeof value <= 8, "one word at a time");
    std::memcpy(places[thread % kWarp], &value, sizeof value);
    wait(Wait::warp);
    std::memcpy(&value, places[lane % kWarp], sizeof value);
    return value;
  }

  // Lets other blocks overtake this one now and then.
  void dawdle() {
    if (meeting != nullptr && random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }

  // 0, 1, ... in a new order.
  std::vector<int> order(int count) {
    std::vector<int> result(count);
    std::iota(result.begin(), result.end(), 0);
    for (int i = count - 1; i > 0; --i) std::swap(result[i], result[random() % (i + 1)]);
    return result;
  }

 private:
  unsigned random() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>(state_ >> 33);
  }

  // Lets each of several go on until it waits; all have to wait for the same.
  template <class F>
  Wait together(const std::vector<int>& some, F go_on) {
    Wait wait = Wait::none;
    for (const int each : some) {
      const Wait its = go_on(each);
      if (wait != Wait::none && its != wait) fail("threads wait at different places");
      wait = its;
    }
    return wait;
  }

  Wait advance(int warp) {
    Wait wait;
    do {
      const bool backwards = random() & 1;
      wait = Wait::none;
      for (int i = 0; i < kWarp; ++i) {
        const Wait its = resume(warp * kWarp + (backwards ? kWarp - 1 - i : i));
        if (wait != Wait::none && its != wait) fail("threads of a warp wait at different places");
        wait = its;
      }
    } while (wait == Wait::warp);
    return wait;
  }

  // Lets a thread go on until it waits.
  __attribute__((noinline)) Wait resume(int which) {
    thread = static_cast<unsigned>(which);
    if (_setjmp(scheduler_) == 0) _longjmp(fibers_[thread].at, 1);
    return fibers_[thread].wait;
  }

  static void body() {
    Runner& runner = here();
    for (;;) {
      runner.wait(Wait::done);  // for a block
      (*runner.kernel_)();
    }
  }

  void start() {
    for (int i = 0; i < kThreads; ++i) {
      fibers_[i].stack.reset(new char[kStack]);
      start(i);
    }
  }

  __attribute__((noinline)) void start(int which) {
    thread = static_cast<unsigned>(which);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fibers_[thread].stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
    if (_setjmp(scheduler_) == 0) setcontext(&context);
  }

  Fiber fibers_[kThreads];
  jmp_buf scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  unsigned char exchange_[kThreads / kWarp][2][kWarp][8];
  unsigned long long state_ = 1;
};

struct Index {
  unsigned Runner::*member;
  struct Value {
    unsigned Runner::*member;
    operator unsigned() const { return Runner::here().*member; }
  } x{member};
};
inline const Index thread_index{&Runner::thread}, block_index{&Runner::block}, grid_size{&Runner::blocks};

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define gridDim emulator::grid_size

// Inside of kernels

inline void __syncthreads() { emulator::Runner::here().wait(emulator::Wait::block); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != 0xFFFFFFFFu) emulator::fail("a part of a warp exchanges values");
  emulator::Runner& runner = emulator::Runner::here();
  return runner.exchanged(value, runner.thread % emulator::kWarp ^ static_cast<unsigned>(lanes));
}

template <class T>
T __ldcg(const T* from) {
  return *from;
}

inline unsigned atomicInc(unsigned* at, unsigned most) {
  unsigned old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &old, old >= most ? 0 : old + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  emulator::Runner::here().dawdle();
  return old;
}

using std::isfinite;

// The host's side

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCooperativeLaunchTooLarge = 720, cudaErrorNotSupported = 801 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch };
using cudaStream_t = void*;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge ? "too many blocks in cooperative launch" : "some error";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::kMultiprocessors : 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** pointers, size_t, cudaStream_t) {
  static_assert(sizeof(Arguments) <= 32764, "the arguments of a kernel are larger than CUDA takes");
  if (block.x != emulator::kThreads) return cudaErrorInvalidValue;
  const Arguments arguments = *static_cast<const Arguments*>(pointers[0]);
  ++emulator::launches;
  if (emulator::idle) return cudaSuccess;
  emulator::Runner& runner = emulator::Runner::here();
  runner.blocks = grid.x;
  runner.meeting = nullptr;
  for (const int each : runner.order(static_cast<int>(grid.x))) {
    runner.block = static_cast<unsigned>(each);
    runner.run([&] { kernel(arguments); });
  }
  return cudaSuccess;
}

template <class Arguments>
cudaError_t cudaLaunchCooperativeKernel(
    void (*kernel)(Arguments), dim3 grid, dim3 block, void** pointers, size_t, cudaStream_t) {
  static_assert(sizeof(Arguments) <= 32764, "the arguments of a kernel are larger than CUDA takes");
  if (block.x != emulator::kThreads) return cudaErrorInvalidValue;
  const bool refuses = std::getenv("SOFIM_EMULATED_REFUSES") != nullptr;  // as a GPU that others hold a part of
  if (refuses || grid.x > emulator::kMultiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  const Arguments arguments = *static_cast<const Arguments*>(pointers[0]);
  ++emulator::launches;
  if (emulator::idle) return cudaSuccess;
  emulator::Meeting meeting(grid.x);
  const auto one = [&](unsigned index) {
    emulator::Runner& runner = emulator::Runner::here();
    runner.blocks = grid.x;
    runner.block = index;
    runner.meeting = &meeting;
    runner.run([&] { kernel(arguments); });
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < grid.x; ++i) others.emplace_back(one, i);
  one(0);
  for (std::thread& other : others) other.join();
  return cudaSuccess;
}
