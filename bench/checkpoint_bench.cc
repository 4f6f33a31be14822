// Durable saves of a module through a real server process, against what the disk takes, in the same
// run, interleaved.
//
//   build/release/bin/checkpoint_bench [--mib=1024] [--rounds=7] [--server=PATH]
//       [--peers="PYTHON bench/checkpoint_peers.py"]
//
// The baselines write the same number of bytes from one buffer that is in memory, without a digest,
// a header, a manifest or a rename. Where a save replaces another, that one's removal is in its
// time. The saves are of a version that nobody has read, so that its digests are computed while it
// is written; those of the last row are known. What saves cost steps beside them:
// step_latency_bench --saves.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
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
#include "bench/rows.h"
#include "bench/server_process.h"
#include "client/client.h"
#include "common/base/huge_buffer.h"

ABSL_FLAG(int, mib, 1024, "size of the module");
ABSL_FLAG(int, rounds, 7, "rounds, each measuring every row once");
ABSL_FLAG(std::string, server, "", "path of modelstate-server; default: beside this program");
ABSL_FLAG(std::string, peers, "", "command that runs checkpoint_peers.py; default: none");

namespace modelstate {
namespace {

constexpr size_t kBlock = size_t{4} << 20;

void Check(bool good, const char* what) {
  if (good) return;
  std::perror(what);
  std::exit(1);
}

// Into room that is set aside, past the page cache, by two threads.
void WriteDirect(const std::string& path, const uint8_t* from, size_t size) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_DIRECT, 0600);
  Check(fd >= 0, "open with O_DIRECT");
  Check(fallocate(fd, 0, 0, static_cast<off_t>(size)) == 0, "fallocate");
  std::atomic<size_t> next{0};
  const auto write = [&] {
    for (size_t at = next.fetch_add(kBlock); at < size; at = next.fetch_add(kBlock)) {
      const size_t bytes = std::min(kBlock, size - at);
      Check(pwrite(fd, from + at, bytes, static_cast<off_t>(at)) == static_cast<ssize_t>(bytes),
            "pwrite");
    }
  };
  std::thread other(write);
  write();
  other.join();
  Check(fdatasync(fd) == 0, "fdatasync");
  close(fd);
}

void WriteBuffered(const std::string& path, const uint8_t* from, size_t size) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0600);
  Check(fd >= 0, "open");
  for (size_t at = 0; at < size; at += kBlock) {
    const size_t bytes = std::min(kBlock, size - at);
    Check(pwrite(fd, from + at, bytes, static_cast<off_t>(at)) == static_cast<ssize_t>(bytes),
          "pwrite");
  }
  Check(fdatasync(fd) == 0, "fdatasync");
  close(fd);
}

void Run(const std::string& binary) {
  const size_t size = static_cast<size_t>(absl::GetFlag(FLAGS_mib)) << 20;
  std::unique_ptr<PeerProcess> peers;
  if (!absl::GetFlag(FLAGS_peers).empty()) {
    peers = std::make_unique<PeerProcess>(absl::GetFlag(FLAGS_peers));
  }
  const ServerProcess server(binary);
  const Client client = ConnectNear(server.target());
  WriteModelFile(absl::StrCat(server.root(), "/plain.safetensors"), TransformerSpecs(size), false);
  const HugeBuffer buffer(size);
  uint8_t* const memory = buffer.data();
  uint64_t state = 1;
  for (size_t i = 0; i < size; i += 8) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    std::memcpy(memory + i, &state, sizeof(state));
  }
  const std::string file = absl::StrCat(server.root(), "/baseline");
  client::LoadCheckpointOptions anew;
  anew.create_module = true;
  OrDie(client.LoadCheckpoint("m", "plain.safetensors", anew));
  // A version whose digests nobody knows.
  const auto reload = [&client] { OrDie(client.LoadCheckpoint("m", "plain.safetensors")); };
  client::SaveCheckpointOptions over;
  over.overwrite = true;
  const auto save = [&] { OrDie(client.SaveCheckpoint("m", "run/step", over)); };
  const auto clear = [&file] { std::filesystem::remove_all(file); };
  std::vector<Row> rows = {
      {"O_DIRECT, two threads, fdatasync", 0, [&] { WriteDirect(file, memory, size); }, clear},
      {"pwrite and fdatasync", 0, [&] { WriteBuffered(file, memory, size); }, clear},
      {"save", 0, save,
       [&] {
         clear();
         reload();
         client.DeleteCheckpoint("run/step").IgnoreError();
       }},
      {"save over another", 0, save, reload},
      {"save with digests known", 0, save},
  };
  if (peers != nullptr) {
    peers->Ask({"keep", absl::StrCat(server.root(), "/plain.safetensors")});
    const std::vector<std::string> names = absl::StrSplit(peers->Ask({"names", "save"}), '\t');
    for (const std::string& name : names) {
      rows.push_back({name, 0, [&peers, &file, name] { peers->Ask({"save", name, file}); }, clear});
    }
  }
  RunRows(rows, absl::GetFlag(FLAGS_rounds));
  std::printf("%d MiB to %s, %d rounds, medians\n", absl::GetFlag(FLAGS_mib), server.root().c_str(),
              absl::GetFlag(FLAGS_rounds));
  PrintRows(rows, size);
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  modelstate::Run(modelstate::ServerBinary(absl::GetFlag(FLAGS_server), argv[0]));
  return 0;
}
