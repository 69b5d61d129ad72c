#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Run a kernel by its name; the parameters are three tensor maps and a problem, as cuLaunchKernel takes them.
bool run_kernel(const std::string& name, int ctas, int threads, size_t shared_bytes, uint64_t seed, void** parameters);
