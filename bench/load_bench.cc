// Loads of checkpoint files through a real server process, against reads by as many threads as the
// machine has, in the same run, interleaved.
//
//   build/release/bin/load_bench [--mib=1024] [--rounds=7] [--server=PATH]
//
// Where the bytes land decides, so there are two baselines: pread into memory that was touched
// before, which is what a reload finds in the pool, and into new huge pages, which is what a new
// module gets. Files are in the page cache but for the cold rows, whose baseline is O_DIRECT. The
// torch file has CRCs, which are checked.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "bench/model_file.h"
#include "bench/read_file.h"
#include "bench/server_process.h"
#include "client/client.h"
#include "common/format/convert_checkpoint.h"
#include "common/format/open_path.h"

ABSL_FLAG(int, mib, 1024, "size of the file");
ABSL_FLAG(int, rounds, 7, "rounds, each measuring every row once");
ABSL_FLAG(std::string, server, "", "path of modelstate-server; default: beside this program");

namespace modelstate {
namespace {

void DropFromCache(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY);
  if (fd < 0 || fdatasync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0) {
    std::perror(path.c_str());
    std::exit(1);
  }
  close(fd);
}

struct Row {
  std::string name;
  size_t baseline;
  std::function<void()> run;
  std::function<void()> after = [] {};
  std::function<void()> before = [] {};
  std::vector<double> seconds = {};
};

void Run(const std::string& binary) {
  const uint64_t bytes = static_cast<uint64_t>(absl::GetFlag(FLAGS_mib)) << 20;
  const ServerProcess server(binary);
  const Client client = ConnectNear(server.target());
  const std::vector<TensorSpec> specs = TransformerSpecs(bytes);
  const std::string plain = absl::StrCat(server.root(), "/plain.safetensors");
  const std::string digests = absl::StrCat(server.root(), "/digests.safetensors");
  WriteModelFile(plain, specs, false);
  WriteModelFile(digests, specs, true);
  ConvertOptions to_torch;
  to_torch.to_torch = true;
  OrDie(ConvertCheckpoint(*OrDie(OpenCheckpointPath(plain)),
                          absl::StrCat(server.root(), "/torch.pt"), to_torch));
  const int fd = open(plain.c_str(), O_RDONLY);
  const int direct = open(plain.c_str(), O_RDONLY | O_DIRECT);
  if (direct < 0) std::printf("no O_DIRECT here: the cold baseline reads through the page cache\n");
  const size_t size = std::filesystem::file_size(plain);
  const auto drop = [&plain] { DropFromCache(plain); };
  const unsigned threads = std::max(1U, std::thread::hardware_concurrency());
  // What is read past the cache comes in whole blocks.
  uint8_t* touched = HugePages(size);
  touched += -reinterpret_cast<uintptr_t>(touched) % (uintptr_t{2} << 20);
  std::memset(touched, 1, size);
  const auto warm = [&] { ReadWith(threads, fd, touched, size); };

  client::LoadCheckpointOptions anew;
  anew.create_module = true;
  for (const char* name : {"plain.safetensors", "digests.safetensors", "torch.pt"}) {
    OrDie(client.LoadCheckpoint(absl::StrCat("kept-", name), name, anew));
  }
  const auto load_new = [&client, &anew](const std::string& name) {
    return [&client, &anew, name] { OrDie(client.LoadCheckpoint("new", name, anew)); };
  };
  const auto drop_new = [&client] {
    if (!client.DeleteModule("new").ok()) std::exit(1);
  };
  const auto reload = [&client](const std::string& name) {
    return [&client, name] { OrDie(client.LoadCheckpoint(absl::StrCat("kept-", name), name)); };
  };
  uint8_t* pages = nullptr;
  std::vector<Row> rows = {
      {"pread into touched memory", 0, warm, [] {}, warm},
      {"pread into new huge pages", 1,
       [&] {
         pages = HugePages(size);
         ReadWith(threads, fd, pages, size);
       },
       [&] { munmap(pages, size + (size_t{2} << 20)); }},
      {"load into a new module", 1, load_new("plain.safetensors"), drop_new},
      {"the same, digests checked", 1, load_new("digests.safetensors"), drop_new},
      {"the same, a torch file", 1, load_new("torch.pt"), drop_new},
      {"reload", 0, reload("plain.safetensors")},
      {"the same, digests checked", 0, reload("digests.safetensors")},
      {"the same, a torch file", 0, reload("torch.pt")},
      {"cold: O_DIRECT", 8, [&] { ReadWith(threads, direct < 0 ? fd : direct, touched, size); },
       [] {}, drop},
      {"cold: load into a new module", 8, load_new("plain.safetensors"), drop_new, drop},
      {"cold: reload", 8, reload("plain.safetensors"), [] {}, drop},
  };
  for (int round = -1; round < absl::GetFlag(FLAGS_rounds); ++round) {
    for (Row& row : rows) {
      row.before();
      const double begin = Now();
      row.run();
      if (round >= 0) row.seconds.push_back(Now() - begin);
      row.after();
    }
  }
  std::printf("%zu tensors, %d MiB, %u threads, %d rounds, medians\n", specs.size(),
              absl::GetFlag(FLAGS_mib), threads, absl::GetFlag(FLAGS_rounds));
  std::printf("%-28s %8s %8s %8s\n", "", "GB/s", "fastest", "ratio");
  for (const Row& row : rows) {
    std::vector<double> ratios;
    for (size_t i = 0; i < row.seconds.size(); ++i) {
      ratios.push_back(rows[row.baseline].seconds[i] / row.seconds[i]);
    }
    const double gigabytes = static_cast<double>(size) / 1e9;
    std::printf("%-28s %8.2f %8.2f %8.2f\n", row.name.c_str(), gigabytes / Median(row.seconds),
                gigabytes / *std::min_element(row.seconds.begin(), row.seconds.end()),
                Median(ratios));
  }
  close(fd);
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  modelstate::Run(modelstate::ServerBinary(absl::GetFlag(FLAGS_server), argv[0]));
  return 0;
}
