// The threads of a command: how many, and how long they spin where they wait for one another.
#pragma once

#include <cstdint>
#include <filesystem>

namespace gentron {

// The CPUs that this process may keep busy: those it may run on, and no more than the CPU quotas of
// its cgroup (v2 or v1) and of those above it, rounded up. root: where proc/ and sys/ lie.
int64_t available_cores(const std::filesystem::path& root = "/");

// For a program of ours, once and before it computes; a library leaves its process alone.
//
// Computes in at most available_cores(root) threads, unless OMP_NUM_THREADS is set. Then, unless
// OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, has a thread look whether other processes take the CPUs
// from this one; while they do, OpenMP's threads sleep where they wait instead of spinning.
void settle_threads(const std::filesystem::path& root = "/");

}  // namespace gentron
