#include "threads.h"

#include <ATen/Parallel.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <future>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace gentron {

namespace {

namespace fs = std::filesystem;
using std::chrono::duration;
using std::chrono::nanoseconds;
using Clock = std::chrono::steady_clock;

constexpr nanoseconds kLook = std::chrono::milliseconds(40);
constexpr int kIdle = 50;  // a look is at least as many times as long as reading the figures
constexpr double kContended = 0.25;  // seconds waited for a CPU, of all threads, a second
// How long threads do not spin once that is found. They wait less then, and where they are many a
// little at every wake: after the longest they spin again, for a look.
constexpr nanoseconds kShortest = std::chrono::milliseconds(500);
constexpr nanoseconds kLongest = std::chrono::seconds(4);

bool is_set(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0';
}

int64_t usable_cpus() {
  // As many bits as the kernel may need: a cpu_set_t ends at 1,024 CPUs.
  for (int count = 1024; count <= 1 << 20; count *= 2) {
    cpu_set_t* set = CPU_ALLOC(count);
    if (set == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(count);
    const bool known = sched_getaffinity(0, size, set) == 0;
    const int usable = known ? CPU_COUNT_S(size, set) : 0;
    CPU_FREE(set);
    if (known) return std::max(usable, 1);
  }
  return std::max(1U, std::thread::hardware_concurrency());
}

// The words of a small file; none where it cannot be read.
std::vector<std::string> words(const fs::path& path) {
  std::ifstream file(path);
  std::vector<std::string> found;
  for (std::string word; file >> word;) found.push_back(word);
  return found;
}

std::optional<double> number(const std::string& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// CPUs' worth of time: quota over period; none where there is no limit ("max" or -1).
std::optional<double> share(const std::string& quota, const std::string& period) {
  const auto part = number(quota), whole = number(period);
  if (!part || !whole || *part <= 0 || *whole <= 0) return std::nullopt;
  return *part / *whole;
}

std::optional<double> quota_of(const fs::path& group) {
  const auto both = words(group / "cpu.max");  // v2
  if (both.size() == 2) return share(both[0], both[1]);
  const auto quota = words(group / "cpu.cfs_quota_us"), period = words(group / "cpu.cfs_period_us");
  if (quota.size() == 1 && period.size() == 1) return share(quota[0], period[0]);
  return std::nullopt;
}

// The smallest quota of a group and of those above it. Inside a container the group's own path may
// not be there; what it sees is then mounted as the top.
double least_quota(const fs::path& mount, fs::path group) {
  double least = std::numeric_limits<double>::infinity();
  for (;; group = group.parent_path()) {
    if (const auto quota = quota_of(mount / group)) least = std::min(least, *quota);
    if (group.empty()) return least;
  }
}

bool has_cpu(const std::string& controllers) {
  return ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

// Seconds that all threads of this process have waited for a CPU so far.
double waited() {
  double nanoseconds = 0;
  std::error_code ignored;
  for (fs::directory_iterator task("/proc/self/task", ignored), end; task != end;) {
    const auto times = words(task->path() / "schedstat");  // ran, waited, turns
    if (times.size() == 3) nanoseconds += number(times[1]).value_or(0);
    task.increment(ignored);
    if (ignored) break;
  }
  return nanoseconds / 1e9;
}

// While there are more of libgomp's threads than CPUs, which it looks up wherever a thread waits,
// they hardly spin there before they sleep; else for milliseconds. A crowd is threads that sleep, to
// make them more. One that spins keeps its CPU from the thread it waits for, where another process
// has taken that one's; from one that sleeps the kernel gives it at once.
class Crowd {
 public:
  explicit Crowd(int threads) {
    holder_ = std::thread([this, threads] {
#pragma omp parallel num_threads(threads)
      asm volatile("" ::: "memory");  // or g++ would leave the team out
      gathered_.set_value();
      end_.get_future().wait();
    });
    gathered_.get_future().wait();
  }
  Crowd(const Crowd&) = delete;
  ~Crowd() {
    end_.set_value();
    holder_.join();  // its team ends with it
  }

 private:
  std::promise<void> gathered_, end_;
  std::thread holder_;
};

// Looks for a while whether other processes take the CPUs from this one's threads.
bool is_contended() {
  const auto start = Clock::now();
  const double before = waited();
  const auto begun = Clock::now();
  std::this_thread::sleep_for(std::max(kLook, kIdle * (begun - start)));
  const double seconds = duration<double>(Clock::now() - begun).count();
  return waited() - before > kContended * seconds;
}

[[noreturn]] void watch(int crowd_size) {
  pthread_setname_np(pthread_self(), "gentron-watch");
  for (;;) {
    if (!is_contended()) continue;
    const Crowd crowd(crowd_size);
    const auto end = Clock::now() + kLongest;
    std::this_thread::sleep_for(kShortest);
    while (is_contended() && Clock::now() < end) {
    }
  }
}

}  // namespace

int64_t available_cores(const fs::path& root) {
  double cores = static_cast<double>(usable_cpus());
  const fs::path mounts = root / "sys/fs/cgroup";
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // number:controllers:/path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const fs::path group = fs::path(line.substr(second + 1)).relative_path();
    if (controllers.empty()) {
      for (const char* name : {"", "unified"}) {  // alone, and beside v1
        cores = std::min(cores, least_quota(mounts / name, group));
      }
    } else if (has_cpu(controllers)) {
      for (const std::string& name : {controllers, std::string("cpu")}) {
        cores = std::min(cores, least_quota(mounts / name, group));
      }
    }
  }
  return std::max<int64_t>(1, std::llround(std::ceil(cores)));
}

void settle_threads(const fs::path& root) {
  if (!is_set("OMP_NUM_THREADS")) {
    const int64_t cores = available_cores(root);
    if (cores < at::get_num_threads()) at::set_num_threads(static_cast<int>(cores));
  }
  if (at::get_num_threads() == 1) return;  // with nothing to wait for
  static std::atomic_flag watched;
  if (is_set("OMP_WAIT_POLICY") || is_set("GOMP_SPINCOUNT") || watched.test_and_set()) return;
  // One more thread than CPUs, beside a team of as many as now compute.
  const int crowd = std::max(2, omp_get_num_procs() - at::get_num_threads() + 2);
  std::thread(watch, crowd).detach();
}

}  // namespace gentron
