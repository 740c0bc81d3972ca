#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace llmopt {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until ready() holds, for as long as kSpin. Yields meanwhile: on a busy machine the one waited for may be
// queued on this very core.
template <class Ready>
void spin_until(Ready&& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (!ready()) {
    for (int i = 0; i < 16; ++i) pause_core();
    std::this_thread::yield();
    if (std::chrono::steady_clock::now() > end) return;
  }
}

}  // namespace

struct ThreadPool::Shared {
  std::mutex one_job;  // held for as long as a job runs, should two threads ever call at once
  std::mutex mutex;    // guards task, open and stop
  std::condition_variable wake, done;
  Task task{};
  bool open = false;  // a worker that wakes too late to help finds the job closed
  bool stop = false;
  std::atomic<uint64_t> job{0};  // the number of the latest job
  std::atomic<int64_t> next{0};  // the first item that nobody has taken
  std::atomic<int> active{0};    // workers inside the job
  std::vector<std::thread> workers;

  void take_items(const Task& current) {
    for (int64_t item = next.fetch_add(1); item < current.items; item = next.fetch_add(1)) {
      current.call(current.context, item);
    }
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      spin_until([&] { return job.load(std::memory_order_acquire) != seen; });
      std::unique_lock lock(mutex);
      wake.wait(lock, [&] { return job.load() != seen; });
      seen = job.load();
      if (stop) return;
      if (!open) continue;
      active.fetch_add(1);
      const Task current = task;
      lock.unlock();
      take_items(current);
      lock.lock();
      if (active.fetch_sub(1) == 1) done.notify_one();
    }
  }

  void announce(bool last) {
    {
      std::lock_guard lock(mutex);
      open = !last;
      stop = last;
      next = 0;
      job.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads), owner_(getpid()), shared_(new Shared) {
  for (int i = 1; i < threads; ++i) shared_->workers.emplace_back([this] { shared_->work(); });
}

ThreadPool::~ThreadPool() {
  // In a forked child there is nobody to join, and the locks may be held by threads that are not there.
  if (getpid() != owner_) return;
  shared_->announce(true);
  for (auto& worker : shared_->workers) worker.join();
  delete shared_;
}

void ThreadPool::run_task(Task task) {
  if (threads_ == 1 || task.items <= 1 || getpid() != owner_) {
    for (int64_t item = 0; item < task.items; ++item) task.call(task.context, item);
    return;
  }
  Shared& shared = *shared_;
  std::lock_guard only(shared.one_job);
  shared.task = task;  // no worker reads it: the last job is closed and none is active
  shared.announce(false);
  shared.take_items(task);
  {
    std::lock_guard lock(shared.mutex);
    shared.open = false;
  }
  spin_until([&] { return shared.active.load(std::memory_order_acquire) == 0; });
  std::unique_lock lock(shared.mutex);
  shared.done.wait(lock, [&] { return shared.active.load() == 0; });
}

}  // namespace llmopt
