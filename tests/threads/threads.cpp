// The passes and how they are divided among threads, under ThreadSanitizer: csrc/cpu/kernels.cpp and parallel.cpp as they
// are, with std::threads in the place of PyTorch's (ATen/Parallel.h). Without an argument, every pass over every kind of
// tensors, from one thread to many, has to give the bits that one thread gives. With `--races` two
// threads are made to write to the same memory, and ThreadSanitizer has to report it each time, or its silence would say
// nothing; TSAN_OPTIONS=exitcode=0 keeps that from being a failure.
#include <ATen/Parallel.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "cpu/adaptive.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "step/solve.h"

namespace {

using namespace sofim;

struct Kind {
  const char* name;
  Type w, g, m;
  bool lost, master = false;  // lost bits are kept; they are the lower halves of float32 weights
};
const Kind kKinds[] = {
    {"float32", Type::float32, Type::float32, Type::float32, false},
    {"float32, bfloat16 moment", Type::float32, Type::float32, Type::bfloat16, false},
    {"float64", Type::float64, Type::float64, Type::float64, false},
    {"bfloat16", Type::bfloat16, Type::bfloat16, Type::float32, true},
    {"bfloat16, bfloat16 moment", Type::bfloat16, Type::bfloat16, Type::bfloat16, true},
    {"bfloat16, master bits", Type::bfloat16, Type::bfloat16, Type::float32, true, true},
    {"bfloat16, float32 gradient", Type::bfloat16, Type::float32, Type::float32, false},
    {"float16", Type::float16, Type::float16, Type::float32, true},
    {"float16, float32 gradient, bfloat16 moment", Type::float16, Type::float32, Type::bfloat16, true},
};

struct Call {
  const char* name;
  Kernel Kernels::*pass;
  Mode mode;
  int width;
};

Mode mode_of(bool weights, bool cross, bool gradient, bool scaled, bool backwards) {
  Mode mode;
  mode.weights = weights;
  mode.cross = cross;
  mode.gradient = gradient;
  mode.scaled = scaled;
  mode.gain = scaled ? 0.5 : 1.0;
  mode.backwards = backwards;
  return mode;
}

std::vector<Call> calls() {
  std::vector<Call> result;
  for (const bool weights : {false, true}) {
    for (const bool cross : {false, true}) {
      const Mode mode = mode_of(weights, cross, cross, false, false);
      result.push_back({"accumulate", &Kernels::accumulate, mode, sums_of_accumulate(mode)});
    }
    const Mode dots = mode_of(weights, false, false, false, false);
    result.push_back({"dots", &Kernels::dots, dots, sums_of_dots(dots)});
    result.push_back({"apply", &Kernels::apply, mode_of(false, false, weights, false, true), 0});
    for (const bool gradient : {false, true}) {
      result.push_back({"commit", &Kernels::commit, mode_of(weights, false, gradient, gradient, true), 0});
    }
  }
  return result;
}

size_t bytes_of(Type type) { return type == Type::float64 ? 8 : is_narrow(type) ? 2 : 4; }

// Bits of a number from 2^-3 to 2^2, of either sign.
void fill(std::vector<char>& bytes, Type type, uint32_t& state) {
  const auto random = [&state] { return state = mixed(state + kWeyl); };
  const size_t size = bytes_of(type);
  for (size_t i = 0; i + size <= bytes.size(); i += size) {
    const uint64_t sign = random() & 1, fraction = random(), step = random() % 5;
    uint64_t bits = 0;
    switch (type) {
      case Type::float32:
        bits = sign << 31 | (124 + step) << 23 | (fraction & 0x7FFFFF);
        break;
      case Type::float64:
        bits = sign << 63 | (1020 + step) << 52 | fraction << 20;
        break;
      case Type::bfloat16:
        bits = sign << 15 | (124 + step) << 7 | (fraction & 0x7F);
        break;
      case Type::float16:
        bits = sign << 15 | (12 + step) << 10 | (fraction & 0x3FF);
        break;
      case Type::codes:
        bits = sign << 7 | (4 + step) << 3 | (fraction & 7);
        break;
    }
    memcpy(&bytes[i], &bits, size);
  }
}

// Tensors with everything that a step has, and room for sums.
struct Tensors {
  std::vector<std::vector<char>> memory;
  std::vector<Row> records;
  std::vector<double> sums;
  Tiling tiling;

  Tensors(const Kind& kind, const std::vector<int64_t>& sizes) {
    uint32_t state = 1;
    memory.reserve(4 * sizes.size());
    const auto values = [&](Type type, int64_t size) {
      memory.emplace_back(size * bytes_of(type) + 1);  // not empty: a pointer that is not null
      fill(memory.back(), type, state);
      return static_cast<void*>(memory.back().data());
    };
    for (const int64_t size : sizes) {
      Row record{};
      record.w = values(kind.w, size);
      record.g = values(kind.g, size);
      record.m = values(kind.m, size);
      record.lost = kind.lost ? values(kind.w, size) : nullptr;
      record.master = kind.master;
      record.numel = size;
      record.w_type = kind.w;
      record.g_type = kind.g;
      record.m_type = kind.m;
      record.key = tensor_key(records.size(), 1);
      record.decay = {0.9, 0.1, 0.01};
      record.update = {0.99, -0.1, -0.05};
      records.push_back(record);
      tiling.add(size);
    }
    sums.assign(tiling.tiles() * kSums, 0.0);
  }

  void run(const Call& call, bool far) {
    Mode mode = call.mode;
    mode.prefetch = far;
    sweep(kernels().*call.pass, records.data(), tiling, mode, sums.data(), call.width);
  }

  bool operator==(const Tensors& other) const {
    return memory == other.memory && !memcmp(sums.data(), other.sums.data(), sums.size() * sizeof(double));
  }
};

// Tensors with running means, for a step whose diagonal adapts.
struct AdaptiveTensors : Tensors {
  struct Shape {
    int64_t rows, columns, inner;
  };
  std::vector<VarianceRow> variances;
  std::vector<Mix> mixes;

  // Of each shape one tensor with means over rows and columns, one over rows, one over all, and one of elements.
  AdaptiveTensors(const Kind& kind, const std::vector<Shape>& shapes) : Tensors(kind, sizes_of(shapes)) {
    memory.reserve(memory.size() + 2 * records.size());
    const Type type = kind.w == Type::float64 ? Type::float64 : Type::float32;
    const auto means = [&](int64_t count) {
      memory.emplace_back(count * bytes_of(type) + 1);  // zeros
      return static_cast<void*>(memory.back().data());
    };
    for (size_t i = 0; i < records.size(); ++i) {
      const Shape& shape = shapes[i / 4];
      VarianceRow row;
      row.columns = row.inner = records[i].numel;
      row.by_element = i % 4 == 3;
      if (i % 4 >= 2) row.whole = means(row.by_element ? records[i].numel : 1);
      if (i % 4 < 2) {
        row.count = shape.rows;
        row.columns = shape.columns;
        row.inner = shape.inner;
        row.rows = means(shape.rows);
      }
      if (i % 4 == 0) row.cols = means(shape.columns);
      variances.push_back(row);
      mixes.push_back({0.9, 1e-8, 10.0});
    }
  }

  static std::vector<int64_t> sizes_of(const std::vector<Shape>& shapes) {
    std::vector<int64_t> sizes;
    for (const Shape& shape : shapes) sizes.insert(sizes.end(), 4, shape.rows * shape.columns);
    return sizes;
  }

  // Two steps: with a guard and a term of rank one, and with neither.
  void step() {
    Mode mode;
    mode.cross = mode.gradient = true;
    AdaptiveSweeps sweeps;
    sweeps.begin(records.data(), variances.data(), tiling, mixes.data());
    sums.assign(1, sweeps.squares());
    sweeps.set_gain(0.5);
    for (const ScaledProducts& p : sweeps.enter(mode)) sums.insert(sums.end(), {p.mm, p.mg, p.trace});
    sweeps.apply(mode);
    sweeps.begin(records.data(), variances.data(), tiling, mixes.data());
    mode.updates = true;
    sweeps.enter(mode);
  }
};

// The last one has several tiles for its sums of squares; it is for one kind of tensors alone, as it takes seconds.
const std::vector<AdaptiveTensors::Shape> kShapes = {{1, 1, 1},   {3, 11, 11},  {0, 0, 0},
                                                     {17, 1, 1},  {20, 70, 35}, {90, 91, 1}};
const std::vector<AdaptiveTensors::Shape> kLargeShapes = {{3, 44000, 44000}};

const std::vector<int64_t> kSizes = {1, 33, 8191, kTile + 5, 0, 17, 20000, 2048, 2};

int compared() {
  int wrong = 0, tried = 0;
  for (const Kind& kind : kKinds) {
    for (const Call& call : calls()) {
      at::number_of_threads = 1;
      Tensors alone(kind, kSizes);
      alone.run(call, false);
      for (const int threads : {2, 3, 16}) {
        at::number_of_threads = threads;
        Tensors together(kind, kSizes);
        together.run(call, threads == 3);
        ++tried;
        if (together == alone) continue;
        ++wrong;
        printf("%s: %s with %d threads gives other bits than with one\n", kind.name, call.name, threads);
      }
    }
  }
  for (size_t i = 0; i <= std::size(kKinds); ++i) {
    const Kind& kind = kKinds[i % std::size(kKinds)];
    const auto& shapes = i < std::size(kKinds) ? kShapes : kLargeShapes;
    at::number_of_threads = 1;
    AdaptiveTensors alone(kind, shapes);
    alone.step();
    for (const int threads : {2, 5}) {
      at::number_of_threads = threads;
      AdaptiveTensors together(kind, shapes);
      together.step();
      ++tried;
      if (together == alone) continue;
      ++wrong;
      printf("%s: a diagonal that adapts has other bits with %d threads than with one\n", kind.name, threads);
    }
  }
  // Two optimizers at once, as threads of Python's may have them.
  at::number_of_threads = 2;
  Tensors left(kKinds[0], kSizes), right(kKinds[0], kSizes);
  std::thread other([&] {
    for (const Call& call : calls()) right.run(call, true);
  });
  for (const Call& call : calls()) left.run(call, true);
  other.join();
  if (!(left == right)) ++wrong;
  printf("%d comparisons, %d of them wrong\n", tried + 1, wrong);
  return wrong ? 1 : 0;
}

std::atomic<int> reports{0};

struct Race {
  const char* name;
  Kernel Kernels::*pass;
  Mode mode;
  int width;
  bool same_memory;  // of two tensors; else the sums of all tiles
  bool writes_w;
};

int raced() {
  const Race races[] = {
      {"sums", &Kernels::dots, mode_of(false, false, false, false, false), 0, false, false},
      {"accumulate", &Kernels::accumulate, mode_of(false, false, false, false, false), 1, true, false},
      {"apply", &Kernels::apply, mode_of(false, false, false, false, true), 0, true, true},
      {"commit", &Kernels::commit, mode_of(false, false, false, false, true), 0, true, true},
  };
  int tried = 0, missed = 0;
  at::number_of_threads = 2;
  for (const Race& race : races) {
    for (const Kind& kind : kKinds) {
      // Where only moments and gradients are read, the code is that of another kind, whose races were reported there.
      if (kind.master && !race.writes_w) continue;
      Tensors tensors(kind, {kTile, kTile});
      if (race.same_memory) tensors.records[1] = tensors.records[0];
      const int before = reports;
      tensors.run({race.name, race.pass, race.mode, race.width}, false);
      ++tried;
      if (reports > before) continue;
      ++missed;
      printf("%s: the race in %s was not reported\n", kind.name, race.name);
    }
  }
  printf("%d races, %d of them not reported\n", tried, missed);
  return missed ? 1 : 0;
}

}  // namespace

// ThreadSanitizer looks for these two, and calls the second one for each report. Memory is used again, and may be
// reported again; a place in the program need not be.
extern "C" const char* __tsan_default_options() { return "suppress_equal_addresses=0"; }
extern "C" void __tsan_on_report(void*) { ++reports; }

int main(int count, char** arguments) {
  use_kernels(&kernels());
  if (count == 1) return compared();
  if (count > 2 || std::string(arguments[1]) != "--races") return 2;
  return raced();
}
