// Runs one launch from a file under the sanitizers that this program is built with, and writes the
// buffers back. Every buffer is a heap block of its own, so that AddressSanitizer guards its ends.
//
// File (native byte order, sizes as int64): name, grid x, grid y, threads, shared bytes, arguments,
// count and buffers, count and pointers (place in the arguments, buffer, offset). A string or a
// buffer is its size and its bytes. The result is the buffers' bytes, one after the other.
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

extern "C" int tigon_host_launch(const char*, std::int64_t, std::int64_t, std::int64_t,
                                 std::int64_t, const char*, size_t);

namespace {

struct Buffer {
    std::unique_ptr<char[]> data;
    std::int64_t size;
};

std::int64_t read_size(std::istream& in) {
    std::int64_t value = 0;
    in.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
}

Buffer read_buffer(std::istream& in) {
    const std::int64_t size = read_size(in);
    Buffer buffer{std::unique_ptr<char[]>(new char[size]), size};
    in.read(buffer.data.get(), size);
    return buffer;
}

}  // namespace

int main(int, char** argv) {
    std::ifstream in(argv[1], std::ios::binary);
    const Buffer name = read_buffer(in);
    const std::int64_t grid_x = read_size(in), grid_y = read_size(in);
    const std::int64_t threads = read_size(in), shared_bytes = read_size(in);
    const Buffer arguments = read_buffer(in);
    std::vector<Buffer> buffers(read_size(in));
    for (Buffer& buffer : buffers) buffer = read_buffer(in);
    for (std::int64_t pointers = read_size(in); pointers > 0; --pointers) {
        const std::int64_t place = read_size(in), buffer = read_size(in), offset = read_size(in);
        const char* target = buffers[buffer].data.get() + offset;
        std::memcpy(arguments.data.get() + place, &target, sizeof(target));
    }
    const std::string text(name.data.get(), name.size);
    if (!in || tigon_host_launch(text.c_str(), grid_x, grid_y, threads, shared_bytes,
                                 arguments.data.get(), arguments.size))
        return 2;
    std::ofstream out(argv[2], std::ios::binary);
    for (const Buffer& buffer : buffers) out.write(buffer.data.get(), buffer.size);
    return out ? 0 : 3;
}
