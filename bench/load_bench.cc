// Loads of checkpoint files through a real server process, against reads by as many threads as the
// machine has, in the same run, interleaved.
//
//   build/release/bin/load_bench [--mib=1024] [--rounds=7] [--server=PATH]
//       [--peers="PYTHON bench/checkpoint_peers.py"]
//
// Where the bytes land decides, so there are two baselines: pread into memory that was touched
// before, which is what a reload finds in the pool, and into new huge pages, which is what a new
// module gets. Files are in the page cache but for the cold rows, whose baseline is O_DIRECT. The
// torch file has CRCs, which are checked; reloads of it and of the file with digests are also held
// against reads that check as much. Warm rows follow a run of themselves. Other programs load the
// same files beside ours.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "bench/model_file.h"
#include "bench/peer_process.h"
#include "bench/process_stats.h"
#include "bench/read_file.h"
#include "bench/rows.h"
#include "bench/server_process.h"
#include "client/client.h"
#include "common/base/digest.h"
#include "common/base/huge_buffer.h"
#include "common/format/convert_checkpoint.h"
#include "common/format/open_path.h"
#include "common/format/zip_directory.h"

ABSL_FLAG(int, mib, 1024, "size of the file");
ABSL_FLAG(int, rounds, 7, "rounds, each measuring every row once");
ABSL_FLAG(std::string, server, "", "path of modelstate-server; default: beside this program");
ABSL_FLAG(std::string, only, "", "rows whose name has this; default: all");
ABSL_FLAG(std::string, peers, "", "command that runs checkpoint_peers.py; default: none");

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

// So that the kernel's free memory is not also new to a virtual machine's host, which can take ten
// times as long as the load.
void TouchFreeMemory(size_t size) {
  const HugeBuffer pages(size);
  std::memset(pages.data(), 1, size);
}

// A load into a server that has loaded nothing before, so that all its memory is new.
class FirstLoad {
 public:
  FirstLoad(std::string binary, std::string root, std::string file)
      : binary_(std::move(binary)), root_(std::move(root)), file_(std::move(file)) {}

  void Start() {
    const std::vector<std::string> flags = {absl::StrCat("--checkpoint_root=", root_)};
    server_ = std::make_unique<ServerProcess>(binary_, "cpu", flags);
    client_ = std::make_unique<Client>(ConnectNear(server_->target()));
    OrDie(client_->GetServerInfo());  // connects
    resident_ = ResidentBytes(server_->pid());
  }
  void Load() {
    client::LoadCheckpointOptions anew;
    anew.create_module = true;
    OrDie(client_->LoadCheckpoint("new", file_, anew));
  }
  void Stop(uint64_t payload) {
    const uint64_t peak = PeakResidentBytes(server_->pid());
    beyond_.push_back((static_cast<double>(peak) - static_cast<double>(resident_) -
                       static_cast<double>(payload)) /
                      (1 << 20));
    client_.reset();
    server_.reset();
  }
  // The most memory that the server had in each load beyond what it had before and the payload.
  const std::vector<double>& beyond_mib() const { return beyond_; }

 private:
  const std::string binary_;
  const std::string root_;
  const std::string file_;
  std::unique_ptr<ServerProcess> server_;
  std::unique_ptr<Client> client_;
  uint64_t resident_ = 0;
  std::vector<double> beyond_;
};

void Run(const std::string& binary) {
  const uint64_t bytes = static_cast<uint64_t>(absl::GetFlag(FLAGS_mib)) << 20;
  std::unique_ptr<PeerProcess> peers;
  if (!absl::GetFlag(FLAGS_peers).empty()) {
    peers = std::make_unique<PeerProcess>(absl::GetFlag(FLAGS_peers));
  }
  const ServerProcess server(binary);
  const Client client = ConnectNear(server.target());
  const std::vector<TensorSpec> specs = TransformerSpecs(bytes);
  const std::string plain = absl::StrCat(server.root(), "/plain.safetensors");
  const std::string digests = absl::StrCat(server.root(), "/digests.safetensors");
  WriteModelFile(plain, specs, false);
  WriteModelFile(digests, specs, true);
  // Of its own: the other rows find theirs in the cache.
  const std::string cold = absl::StrCat(server.root(), "/cold.safetensors");
  std::filesystem::copy_file(plain, cold);
  ConvertOptions to_torch;
  to_torch.to_torch = true;
  OrDie(ConvertCheckpoint(*OrDie(OpenCheckpointPath(plain)),
                          absl::StrCat(server.root(), "/torch.pt"), to_torch));
  const int fd = open(plain.c_str(), O_RDONLY);
  const int direct = open(cold.c_str(), O_RDONLY | O_DIRECT);
  if (direct < 0) {
    std::fprintf(stderr, "%s: its file system has no O_DIRECT\n", server.root().c_str());
    std::exit(1);
  }
  const size_t size = std::filesystem::file_size(plain);
  const auto drop = [&cold] { DropFromCache(cold); };
  const unsigned threads = std::max(1U, std::thread::hardware_concurrency());
  // What is read past the cache comes in whole blocks.
  const HugeBuffer memory(size);
  uint8_t* const touched = memory.data();
  std::memset(touched, 1, size);
  const auto warm = [&] { ReadWith(threads, fd, touched, size); };
  // What a loop that checks what it reads does, a MiB at a time, while it is in the cache.
  constexpr size_t kMiB = size_t{1} << 20;
  std::atomic<uint64_t> sum{0};
  const auto read_and_digest = [&] {
    ReadWith<kMiB>(threads, fd, touched, size,
                   [&](absl::Span<const uint8_t> piece) { sum += Xxh3(piece); });
  };
  const auto read_and_crc = [&] {
    ReadWith<kMiB>(threads, fd, touched, size,
                   [&](absl::Span<const uint8_t> piece) { sum += UpdateCrc32(0, piece); });
  };

  client::LoadCheckpointOptions anew;
  anew.create_module = true;
  for (const char* name :
       {"plain.safetensors", "cold.safetensors", "digests.safetensors", "torch.pt"}) {
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
  HugeBuffer pages;
  FirstLoad first(binary, server.root(), "plain.safetensors");
  FirstLoad first_digests(binary, server.root(), "digests.safetensors");
  FirstLoad first_torch(binary, server.root(), "torch.pt");
  FirstLoad first_cold(binary, server.root(), "cold.safetensors");
  std::vector<Row> rows = {
      {"pread into touched memory", 0, warm, warm},
      {"pread into new huge pages", 1,
       [&] {
         pages = HugeBuffer(size);
         ReadWith(threads, fd, pages.data(), size);
       },
       [size] { TouchFreeMemory(size); }, [&] { pages = HugeBuffer(); }},
      {"cold: O_DIRECT", 2, [&] { ReadWith(threads, direct, touched, size); }, drop},
      {"pread and XXH3", 3, read_and_digest, read_and_digest},
      {"pread and CRC-32", 4, read_and_crc, read_and_crc},
      {"load into a new module", 1, load_new("plain.safetensors"), [] {}, drop_new},
      {"the same, digests checked", 1, load_new("digests.safetensors"), [] {}, drop_new},
      {"the same, a torch file", 1, load_new("torch.pt"), [] {}, drop_new},
      {"reload", 0, reload("plain.safetensors"), reload("plain.safetensors")},
      {"reload, digests checked", 3, reload("digests.safetensors"), reload("digests.safetensors")},
      {"reload, a torch file", 4, reload("torch.pt"), reload("torch.pt")},
      {"cold: load into a new module", 2, load_new("cold.safetensors"), drop, drop_new},
      {"cold: reload", 2, reload("cold.safetensors"), drop},
  };
  std::pair<const char*, FirstLoad*> firsts[] = {{"a server's first load", &first},
                                                 {"the same, digests checked", &first_digests},
                                                 {"the same, a torch file", &first_torch},
                                                 {"cold: a server's first load", &first_cold}};
  for (const auto& [name, load] : firsts) {
    const bool cold = load == &first_cold;
    rows.push_back({name, cold ? size_t{2} : size_t{1}, [load = load] { load->Load(); },
                    [load = load, cold, drop, size] {
                      load->Start();
                      TouchFreeMemory(size);
                      if (cold) drop();
                    },
                    [load = load, bytes] { load->Stop(bytes); }});
  }
  if (peers != nullptr) {
    const std::string torch = absl::StrCat(server.root(), "/torch.pt");
    const std::vector<std::string> names = absl::StrSplit(peers->Ask({"names", "load"}), '\t');
    for (const std::string& name : names) {
      const std::string path = name == "torch.load" ? torch : plain;
      rows.push_back({name, 0, [&peers, name, path, bytes] {
                        if (peers->Ask({"load", name, path}) == absl::StrCat(bytes)) return;
                        std::fprintf(stderr, "%s did not load all\n", name.c_str());
                        std::exit(1);
                      }});
    }
  }
  const int rounds = absl::GetFlag(FLAGS_rounds);
  RunRows(rows, rounds, absl::GetFlag(FLAGS_only));
  std::printf("%zu tensors, %d MiB, %u threads, %d rounds, medians\n", specs.size(),
              absl::GetFlag(FLAGS_mib), threads, rounds);
  PrintRows(rows, size);
  std::printf("\n%-40s %8s %8s\n", "memory beyond the payload, MiB", "median", "most");
  for (const auto& [name, load] : firsts) {
    if (load->beyond_mib().empty()) continue;
    std::printf("%-40s %8.1f %8.1f\n", name, Median(load->beyond_mib()),
                *std::max_element(load->beyond_mib().begin(), load->beyond_mib().end()));
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
