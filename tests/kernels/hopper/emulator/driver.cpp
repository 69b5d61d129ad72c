// As much of libcuda as the launcher calls, with one emulated GPU. Arguments are held to what the driver's manual asks
// of them; kernels run on the emulated machine.
#include <map>
#include <mutex>
#include <string>

#include "kernels.h"
#include "tensor_map.h"

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidContext = 201, kInvalidImage = 200, kNotFound = 500,
              kLaunchFailed = 719;
constexpr int kMaxSharedAttribute = 8;

struct Function {
    std::string name;
    int shared_bytes = 48 * 1024;
};

std::mutex lock;
std::map<std::string, int> calls, failures;
std::map<std::string, Function> functions;
std::map<int, int> attributes = {{75, 9}, {76, 0}, {16, 3}};
int driver_version = 13000;
uint64_t seed = 0;
std::string launch_log;
int context_marker;
thread_local void* context = nullptr;
thread_local int pushed = 0;

// Count a call; the failure asked for, if any.
int called(const char* name) {
    const std::lock_guard<std::mutex> guard(lock);
    ++calls[name];
    const auto found = failures.find(name);
    return found == failures.end() ? kSuccess : found->second;
}

}  // namespace

extern "C" {

// For the tests.
void emulator_reset() {
    calls.clear();
    failures.clear();
    functions.clear();
    attributes = {{75, 9}, {76, 0}, {16, 3}};
    driver_version = 13000;
    context = nullptr;
    pushed = 0;
}
void emulator_fail(const char* name, int code) { failures[name] = code; }
void emulator_seed(uint64_t value) { seed = value; }
void emulator_driver_version(int value) { driver_version = value; }
void emulator_attribute(int attribute, int value) { attributes[attribute] = value; }
int emulator_calls(const char* name) { return calls[name]; }
int emulator_pushed() { return pushed; }
const char* emulator_error() { return machine::error.c_str(); }
const char* emulator_launch() { return launch_log.c_str(); }

int cuInit(unsigned flags) {
    if (const int code = called("cuInit")) return code;
    return flags == 0 ? kSuccess : kInvalidValue;
}

int cuDriverGetVersion(int* version) {
    *version = driver_version;
    return called("cuDriverGetVersion");
}

int cuGetErrorString(int code, const char** text) {
    static const std::map<int, const char*> texts = {{kInvalidValue, "invalid argument"},
                                                     {209, "no kernel image is available for execution on the device"},
                                                     {2, "out of memory"},
                                                     {kLaunchFailed, "unspecified launch failure"}};
    const auto found = texts.find(code);
    if (found == texts.end()) return kInvalidValue;
    *text = found->second;
    return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
    if (const int code = called("cuDeviceGet")) return code;
    *device = ordinal;
    return ordinal == 0 ? kSuccess : 101;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    if (const int code = called("cuDeviceGetAttribute")) return code;
    if (attributes.count(attribute) == 0) return kInvalidValue;
    *value = attributes[attribute];
    return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** to, int) {
    *to = &context_marker;
    return called("cuDevicePrimaryCtxRetain");
}

int cuCtxGetCurrent(void** to) {
    *to = context;
    return called("cuCtxGetCurrent");
}

int cuCtxPushCurrent_v2(void* to) {
    if (const int code = called("cuCtxPushCurrent")) return code;
    context = to;
    ++pushed;
    return kSuccess;
}

int cuCtxPopCurrent_v2(void** from) {
    if (const int code = called("cuCtxPopCurrent")) return code;
    if (pushed == 0) return kInvalidContext;
    *from = context;
    context = nullptr;
    --pushed;
    return kSuccess;
}

int cuModuleLoadData(void** module, const void* image) {
    if (const int code = called("cuModuleLoadData")) return code;
    if (context == nullptr) return kInvalidContext;
    if (memcmp(image,
               "\x7f"
               "ELF",
               4) != 0)
        return kInvalidImage;
    *module = &functions;
    return kSuccess;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
    if (const int code = called("cuModuleGetFunction")) return code;
    const std::string wanted = name;
    if (wanted != "block_sparse_bf16" && wanted != "block_sparse_fp16") return kNotFound;
    functions[wanted].name = wanted;
    *function = &functions[wanted];
    return kSuccess;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (const int code = called("cuFuncSetAttribute")) return code;
    if (attribute != kMaxSharedAttribute || value > 227 * 1024) return kInvalidValue;
    static_cast<Function*>(function)->shared_bytes = value;
    return kSuccess;
}

int cuTensorMapEncodeTiled(void* to, int type, uint32_t rank, void* base, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                           int swizzle, int promotion, int fill) {
    if (const int code = called("cuTensorMapEncodeTiled")) return code;
    const bool known = (type == 6 || type == 9) && rank == 4 && interleave == 0 && swizzle == 3 && promotion >= 0 &&
                       promotion <= 3 && fill == 0;
    if (!known || reinterpret_cast<uintptr_t>(to) % 64 != 0 || reinterpret_cast<uintptr_t>(base) % 16 != 0)
        return kInvalidValue;
    machine::TensorMap map = {};
    map.base = static_cast<unsigned char*>(base);
    map.magic = machine::TensorMap::kMagic;
    for (int n = 0; n < 4; ++n) {
        if (sizes[n] == 0 || sizes[n] > 1ull << 32 || box[n] == 0 || box[n] > 256 || steps[n] != 1)
            return kInvalidValue;
        map.sizes[n] = sizes[n];
        map.box[n] = box[n];
    }
    if (box[0] * 2 != 128 || box[2] != 1 || box[3] != 1) return kInvalidValue;  // the inner size is the swizzle's span
    for (int n = 0; n < 3; ++n) {
        if (strides[n] == 0 || strides[n] % 16 != 0 || strides[n] >= 1ull << 40) return kInvalidValue;
        map.strides[n] = strides[n];
    }
    memcpy(to, &map, sizeof(map));
    return kSuccess;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                   void** extra) {
    if (const int code = called("cuLaunchKernel")) return code;
    if (context == nullptr) return kInvalidContext;
    const Function& kernel = *static_cast<Function*>(function);
    if (grid_x == 0 || grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || extra != nullptr)
        return kInvalidValue;
    if (static_cast<int>(shared_bytes) > kernel.shared_bytes) return kInvalidValue;
    for (int n = 0; n < 3; ++n) {
        machine::TensorMap map;
        memcpy(&map, parameters[n], sizeof(map));
        if (map.magic != machine::TensorMap::kMagic) return kInvalidValue;
    }
    const std::lock_guard<std::mutex> guard(lock);
    launch_log = kernel.name + " " + std::to_string(grid_x) + " x " + std::to_string(block_x) + ", stream " +
                 std::to_string(reinterpret_cast<uintptr_t>(stream));
    // The driver copies the parameters before it returns; the copies here are as aligned as a kernel's are.
    machine::TensorMap maps[3];
    for (int n = 0; n < 3; ++n) memcpy(&maps[n], parameters[n], sizeof(machine::TensorMap));
    void* copied[4] = {&maps[0], &maps[1], &maps[2], parameters[3]};
    return run_kernel(kernel.name, grid_x, block_x, shared_bytes, seed, copied) ? kSuccess : kLaunchFailed;
}
}
