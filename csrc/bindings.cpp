// tigon._C: finds a kernel by name and launches it on a stream.
//
// The launch arithmetic (which instance, which grid, the packed arguments) lives in
// python/native/; here a kernel's one argument is a struct of known size, given as bytes.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "common/kernel_table.cuh"

namespace py = pybind11;

namespace {

constexpr std::int64_t kSharedByDefault = 48 * 1024;  // a launch with more must say so before

const tigon::KernelTable& kernels() {
    static const tigon::KernelTable table = tigon::all_kernels();
    return table;
}

void check(cudaError_t status, const std::string& what) {
    if (status != cudaSuccess)
        throw std::runtime_error("tigon: " + what + ": " + cudaGetErrorString(status));
}

// Makes a device current for one launch, and the previous one again afterwards.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "no CUDA device");
        changed_ = previous_ != device;
        if (changed_)
            check(cudaSetDevice(device), "cannot use CUDA device " + std::to_string(device));
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool changed_ = false;
};

int find(const std::string& name) {
    for (size_t i = 0; i < kernels().size(); ++i)
        if (kernels()[i].name == name) return static_cast<int>(i);
    throw std::runtime_error("tigon: the extension holds no kernel " + name);
}

void launch(int handle, std::int64_t grid_x, std::int64_t grid_y, std::int64_t block,
            std::int64_t shared_bytes, int device, std::uintptr_t stream,
            const py::bytes& arguments) {
    const tigon::Kernel& kernel = kernels().at(handle);
    const std::string_view packed = arguments;
    if (packed.size() != kernel.parameter_bytes)
        throw std::runtime_error("tigon: " + std::string(kernel.name) + " takes " +
                                 std::to_string(kernel.parameter_bytes) +
                                 " bytes of arguments, got " + std::to_string(packed.size()));
    const DeviceGuard guard(device);
    if (shared_bytes > kSharedByDefault)
        check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)),
              std::string("shared memory of ") + kernel.name);
    void* pointers[] = {const_cast<char*>(packed.data())};
    check(cudaLaunchKernel(kernel.function, dim3(grid_x, grid_y), dim3(block), pointers,
                           shared_bytes, reinterpret_cast<cudaStream_t>(stream)),
          std::string("launch of ") + kernel.name + " failed");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Tigon's CUDA kernels, by name; tigon.native is the interface.";
    module.attr("built_archs") = TIGON_BUILT_ARCHS;
    module.attr("nvcc_version") = TIGON_NVCC_VERSION;
    module.attr("cxx_compiler") = TIGON_CXX_COMPILER;
    module.def("kernels", [] {
        py::dict sizes;
        for (const tigon::Kernel& kernel : kernels()) sizes[kernel.name] = kernel.parameter_bytes;
        return sizes;
    });
    module.def("find", &find, py::arg("name"));
    module.def("launch", &launch, py::arg("handle"), py::arg("grid_x"), py::arg("grid_y"),
               py::arg("block"), py::arg("shared_bytes"), py::arg("device"), py::arg("stream"),
               py::arg("arguments"));
}
