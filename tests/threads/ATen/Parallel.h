// Stands in for PyTorch's header of this name: std::threads, whose beginning and end ThreadSanitizer sees. libgomp's
// barriers are not compiled for it, and what they put in order would be reported as races.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int number_of_threads = 1;
inline int get_num_threads() { return number_of_threads; }

// Calls body(begin, end) as PyTorch does: in as many stretches as there are threads, each of them at least `grain` long.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const auto divided = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t parts = number_of_threads;
  if (grain > 0 && divided(end - begin, grain) < parts) parts = divided(end - begin, grain);
  const int64_t length = divided(end - begin, parts);
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += length) {
    threads.emplace_back([&body, from, to = from + length < end ? from + length : end] { body(from, to); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
