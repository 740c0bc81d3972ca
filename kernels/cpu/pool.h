// A small pool of threads that share the items of one job at a time.
#pragma once

#include <cstdint>
#include <type_traits>

namespace llmopt {

// Items are handed out one by one from a counter, and a job has ended when its items have: a thread whose core was
// taken away delays only the item it holds, and nobody waits for a thread that holds none. Idle threads spin for about
// a tenth of a millisecond and then sleep: long enough to bridge the gap between two stages of a layer, too short to
// take a core from another process. The calling thread works too.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Calls body(item) for each item in 0 .. items-1, from several threads at once, and returns when all are done.
  // The body must not throw. In a forked child, where the threads do not exist, the caller does all of it.
  template <class Body>
  void run(int64_t items, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_task({[](void* context, int64_t item) { (*static_cast<Plain*>(context))(item); }, &body}, items);
  }

 private:
  struct Task {
    void (*call)(void* context, int64_t item);
    void* context;
  };
  struct Shared;

  void run_task(Task task, int64_t items);

  int threads_;
  int64_t owner_;  // the process that started the threads
  Shared* shared_;
};

}  // namespace llmopt
