#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

namespace llmopt {
namespace {

constexpr auto kSpin = std::chrono::microseconds(100);
constexpr int kPausesBetweenLooks = 256;  // at the clock, and at whether another thread wants this core

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until ready() holds, but no longer than kSpin; says whether it does. Yields now and then: on a busy machine the
// one waited for may be queued on this very core.
template <class Ready>
bool spin_until(Ready&& ready) {
  for (int i = 0; i < kPausesBetweenLooks; ++i) {
    if (ready()) return true;
    pause_core();
  }
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (std::chrono::steady_clock::now() < end) {
    std::this_thread::yield();
    for (int i = 0; i < kPausesBetweenLooks; ++i) {
      if (ready()) return true;
      pause_core();
    }
  }
  return false;
}

// What is left of the current job, in one word, so that one comparison claims an item of this job and of no other.
struct Ticket {
  static constexpr int kBits = 24;
  static constexpr int64_t kMost = (1 << kBits) - 1;

  uint64_t word;

  static Ticket of(uint64_t job, uint64_t items) { return {job << (2 * kBits) | items << kBits}; }
  uint64_t job() const { return word >> (2 * kBits); }
  int64_t items() const { return static_cast<int64_t>(word >> kBits) & kMost; }
  int64_t next() const { return static_cast<int64_t>(word) & kMost; }
  bool has_items() const { return next() < items(); }
};

}  // namespace

struct ThreadPool::Shared {
  std::mutex one_job;  // held for as long as a job runs, should two threads ever call at once
  Task task{};         // of the current job; read by those who hold an item of it
  std::vector<std::thread> workers;
  // Each on a cache line of its own: all threads write the first two.
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> done{0};  // items of the current job that have ended
  alignas(64) std::atomic<int> sleepers{0};  // workers that may be asleep
  std::atomic<uint32_t> wakes{0};            // how often they were woken
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stop{false};

  // Takes items of whatever job there is until none is left.
  void take_items() {
    Ticket seen{ticket.load()};
    while (seen.has_items()) {
      // The job cannot end, nor its task change, before an item that was claimed here is done.
      if (!ticket.compare_exchange_weak(seen.word, seen.word + 1)) continue;
      const Task current = task;
      const int64_t items = seen.items();
      current.call(current.context, seen.next());
      if (done.fetch_add(1) + 1 == items && caller_sleeps.load()) done.notify_one();
      seen.word = ticket.load();
    }
  }

  void work() {
    const auto awaited = [this] { return stop.load() || Ticket{ticket.load()}.has_items(); };
    while (!stop.load()) {
      if (!spin_until(awaited)) {
        sleepers.fetch_add(1);
        const uint32_t before = wakes.load();
        if (!awaited()) wakes.wait(before);
        sleepers.fetch_sub(1);
      }
      take_items();
    }
  }

  void wake() {
    if (sleepers.load() == 0) return;
    wakes.fetch_add(1);
    wakes.notify_all();
  }

  void wait_for(int64_t items) {
    if (spin_until([&] { return done.load() == items; })) return;
    caller_sleeps.store(true);
    for (int64_t now = done.load(); now != items; now = done.load()) done.wait(now);
    caller_sleeps.store(false);
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads), owner_(getpid()), shared_(new Shared) {
  for (int i = 1; i < threads; ++i) shared_->workers.emplace_back([this] { shared_->work(); });
}

ThreadPool::~ThreadPool() {
  // In a forked child there is nobody to join, and the locks may be held by threads that are not there.
  if (getpid() != owner_) return;
  shared_->stop.store(true);
  shared_->wake();
  for (auto& worker : shared_->workers) worker.join();
  delete shared_;
}

void ThreadPool::run_task(Task task, int64_t items) {
  if (threads_ == 1 || items <= 1 || items > Ticket::kMost || getpid() != owner_) {
    for (int64_t item = 0; item < items; ++item) task.call(task.context, item);
    return;
  }
  Shared& shared = *shared_;
  std::lock_guard only(shared.one_job);
  shared.task = task;
  shared.done.store(0);
  shared.ticket.store(Ticket::of(Ticket{shared.ticket.load()}.job() + 1, static_cast<uint64_t>(items)).word);
  shared.wake();
  shared.take_items();
  shared.wait_for(items);
}

}  // namespace llmopt
