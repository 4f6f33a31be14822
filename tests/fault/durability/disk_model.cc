#include "tests/fault/durability/disk_model.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <algorithm>
#include <fstream>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

#ifndef RENAME_EXCHANGE
#define RENAME_EXCHANGE 2
#endif

namespace modelstate::fault {
namespace {

constexpr size_t kSector = 512;

}  // namespace

#if defined(__x86_64__)

Observer DiskRecorder::AsObserver() {
  Observer observer;
  // What a call removes or closes is asked for before, what it makes is known after.
  observer.before = [](const SystemCall&) { return Verdict(); };
  observer.after = [this](const SystemCall& call) {
    if (call.result >= 0) Record(call);
    return false;
  };
  return observer;
}

std::string DiskRecorder::Relative(const std::string& path) const {
  const std::string relative = std::filesystem::path(path).lexically_relative(root_).string();
  EXPECT_FALSE(relative.empty() || absl::StartsWith(relative, "..")) << path << " is not below";
  return relative == "." ? "" : relative;
}

void DiskRecorder::Record(const SystemCall& call) {
  const auto at = [&](size_t directory, size_t name) {
    return Relative((std::filesystem::path(call.DescriptorPath(directory)) / call.ReadText(name))
                        .lexically_normal()
                        .string());
  };
  switch (call.number) {
    case SYS_openat2: {
      uint64_t flags = 0;
      const std::string how = call.ReadBytes(2, sizeof(flags));
      std::copy(how.begin(), how.end(), reinterpret_cast<char*>(&flags));
      if ((flags & O_CREAT) != 0) ops.push_back({DiskOp::kCreate, at(0, 1), "", 0, ""});
      return;
    }
    case SYS_mkdirat:
      ops.push_back({DiskOp::kMakeDirectory, at(0, 1), "", 0, ""});
      return;
    case SYS_pwrite64:
      ops.push_back({DiskOp::kWrite, Relative(call.DescriptorPath(0)), "", call.arguments[3],
                     call.ReadBytes(1, static_cast<size_t>(call.result))});
      return;
    case SYS_fallocate:  // room of zeros
      ops.push_back({DiskOp::kWrite, Relative(call.DescriptorPath(0)), "", call.arguments[2],
                     std::string(call.arguments[3], '\0')});
      return;
    case SYS_fsync:
    case SYS_fdatasync:
      ops.push_back({DiskOp::kSync, Relative(call.DescriptorPath(0)), "", 0, ""});
      return;
    case SYS_renameat2:
      ops.push_back(
          {(call.arguments[4] & RENAME_EXCHANGE) != 0 ? DiskOp::kExchange : DiskOp::kRename,
           at(0, 1), at(2, 3), 0, ""});
      return;
    case SYS_unlinkat:
      ops.push_back({DiskOp::kRemove, at(0, 1), "", 0, ""});
      return;
    case SYS_write:
      // UndefinedBehaviorSanitizer asks with a pipe whether memory is there.
      EXPECT_TRUE(absl::StartsWith(call.DescriptorPath(0), "pipe:")) << "write is not recorded";
      return;
    case SYS_openat:
      EXPECT_EQ(call.arguments[2] & (O_CREAT | O_TRUNC), 0u) << "a call that is not recorded";
      return;
    default: {
      static const std::set<long> kReads = {SYS_read,       SYS_pread64,  SYS_close, SYS_fstat,
                                            SYS_newfstatat, SYS_statx,    SYS_fcntl, SYS_getdents64,
                                            SYS_lseek,      SYS_fadvise64};
      EXPECT_TRUE(!TouchesFiles(call) || kReads.contains(call.number))
          << CallName(call) << " is not recorded: teach the recorder what it does";
    }
  }
}

#else
Observer DiskRecorder::AsObserver() { return {}; }
std::string DiskRecorder::Relative(const std::string& path) const { return path; }
void DiskRecorder::Record(const SystemCall&) {}
#endif

void DiskRecorder::Acknowledge(std::string what) {
  ops.push_back({DiskOp::kAcknowledge, std::move(what), "", 0, ""});
}

int PowerCut::Find(const std::string& path) const {
  int node = 0;
  for (const std::filesystem::path& part : std::filesystem::path(path)) {
    const auto& names = now_[static_cast<size_t>(node)];
    const auto it = names.find(part.string());
    if (it == names.end()) {
      ADD_FAILURE() << path << " is not there";
      return 0;
    }
    node = it->second;
  }
  return node;
}

void PowerCut::Change(const std::string& path, std::vector<Edit> edits) {
  const size_t parent =
      static_cast<size_t>(Find(std::filesystem::path(path).parent_path().string()));
  for (const Edit& edit : edits) {
    if (edit.node < 0) {
      now_[parent].erase(edit.name);
    } else {
      now_[parent][edit.name] = edit.node;
    }
  }
  nodes_[parent].changes.push_back(std::move(edits));
}

PowerCut::PowerCut(const std::vector<DiskOp>& ops, size_t count) : nodes_(1), now_(1) {
  nodes_[0].is_directory = true;
  for (size_t i = 0; i < count; ++i) {
    const DiskOp& op = ops[i];
    const std::string name = std::filesystem::path(op.path).filename().string();
    switch (op.kind) {
      case DiskOp::kMakeDirectory:
      case DiskOp::kCreate:
        nodes_.emplace_back().is_directory = op.kind == DiskOp::kMakeDirectory;
        now_.emplace_back();
        Change(op.path, {{name, static_cast<int>(nodes_.size()) - 1}});
        break;
      case DiskOp::kWrite:
        nodes_[static_cast<size_t>(Find(op.path))].writes.push_back(op);
        break;
      case DiskOp::kSync: {
        Node& node = nodes_[static_cast<size_t>(Find(op.path))];
        node.synced = node.is_directory ? node.changes.size() : node.writes.size();
        break;
      }
      case DiskOp::kRename:
      case DiskOp::kExchange: {
        const std::filesystem::path to(op.to);
        const std::string target = to.filename().string();
        EXPECT_EQ(to.parent_path(), std::filesystem::path(op.path).parent_path());
        const int from = Find(op.path);
        const int replaced = op.kind == DiskOp::kExchange ? Find(op.to) : -1;
        Change(op.path, {{name, replaced}, {target, from}});
        break;
      }
      case DiskOp::kRemove:
        Change(op.path, {{name, -1}});
        break;
      case DiskOp::kAcknowledge:
        break;
    }
  }
}

std::string PowerCut::Content(const Node& node, Data data, double cut) const {
  std::string content;
  for (size_t i = 0; i < node.writes.size(); ++i) {
    std::string bytes = node.writes[i].bytes;
    if (i >= node.synced) {
      const bool first = i == node.synced;
      const bool last = i + 1 == node.writes.size();
      if (data == kGone || (data == kWithoutTheFirst && first)) continue;
      if (data == kZeros) std::fill(bytes.begin(), bytes.end(), '\0');
      const size_t place = static_cast<size_t>(static_cast<double>(bytes.size()) * cut);
      if (data == kCutOff && last) bytes.resize(place);
      if (data == kHole) {
        const size_t end = std::min(bytes.size(), place + kSector);
        std::fill(bytes.begin() + static_cast<ptrdiff_t>(place),
                  bytes.begin() + static_cast<ptrdiff_t>(end), '\0');
      }
    }
    const size_t end = node.writes[i].offset + bytes.size();
    if (content.size() < end) content.resize(end);
    content.replace(node.writes[i].offset, bytes.size(), bytes);
  }
  return content;
}

void PowerCut::Add(int index, const std::string& path, const Choice& choice,
                   DiskImage* image) const {
  const size_t i = static_cast<size_t>(index);
  const Node& node = nodes_[i];
  if (!node.is_directory) {
    (*image)[path] = Content(node, choice.data[i], choice.cut[i]);
    return;
  }
  if (!path.empty()) (*image)[path + "/"] = "";
  std::map<std::string, int> names;
  for (size_t change = 0; change < choice.kept[i]; ++change) {
    for (const Edit& edit : node.changes[change]) {
      if (edit.node < 0) {
        names.erase(edit.name);
      } else {
        names[edit.name] = edit.node;
      }
    }
  }
  for (const auto& [name, child] : names) {
    Add(child, path.empty() ? name : absl::StrCat(path, "/", name), choice, image);
  }
}

std::vector<DiskImage> PowerCut::Images(size_t limit, std::mt19937& random) const {
  std::vector<DiskImage> images;
  Choice choice;
  choice.kept.resize(nodes_.size());
  choice.data.resize(nodes_.size());
  choice.cut.assign(nodes_.size(), 0.5);
  const auto add = [&] {
    DiskImage image;
    Add(0, "", choice, &image);
    images.push_back(std::move(image));
  };
  for (size_t i = 0; i < nodes_.size(); ++i) choice.kept[i] = nodes_[i].synced;
  // Counts through what the directories kept, as the digits of a number.
  for (bool more = true; more && images.size() + kDataKinds <= limit;) {
    for (int data = 0; data < kDataKinds; ++data) {
      std::fill(choice.data.begin(), choice.data.end(), static_cast<Data>(data));
      add();
    }
    more = false;
    for (size_t i = 0; i < nodes_.size() && !more; ++i) {
      if (!nodes_[i].is_directory) continue;
      more = choice.kept[i] < nodes_[i].changes.size();
      choice.kept[i] = more ? choice.kept[i] + 1 : nodes_[i].synced;
    }
  }
  while (images.size() < limit) {
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const size_t lost = random() % 2 == 0 ? 0 : random() % (nodes_[i].pending() + 1);
      choice.kept[i] = nodes_[i].synced + nodes_[i].pending() - lost;
      choice.data[i] = static_cast<Data>(random() % kDataKinds);
      choice.cut[i] = static_cast<double>(random() % 1000) / 1000;
    }
    add();
  }
  return images;
}

void Materialize(const DiskImage& image, const std::filesystem::path& root) {
  std::filesystem::remove_all(root);
  std::filesystem::create_directories(root);
  // A directory comes before what is in it.
  for (const auto& [path, content] : image) {
    if (path.back() == '/') {
      std::filesystem::create_directories(root / path.substr(0, path.size() - 1));
    } else {
      std::ofstream(root / path, std::ios::binary) << content;
    }
  }
}

}  // namespace modelstate::fault
