#ifndef MODELSTATE_TESTS_FAULT_DURABILITY_DISK_MODEL_H_
#define MODELSTATE_TESTS_FAULT_DURABILITY_DISK_MODEL_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tests/fault/durability/syscall_tracer.h"

namespace modelstate::fault {

// One change or sync of a file or directory, as a system call made it. Paths are relative to the
// root, and those of the moment of the call.
struct DiskOp {
  enum Kind { kMakeDirectory, kCreate, kWrite, kSync, kRename, kExchange, kRemove, kAcknowledge };
  Kind kind = kSync;
  std::string path;
  std::string to;  // renames
  uint64_t offset = 0;
  std::string bytes;  // kWrite
};

// Records what a traced process does below `root`; a call that changes files in a way that is not
// known here fails the test.
class DiskRecorder {
 public:
  explicit DiskRecorder(std::filesystem::path root) : root_(std::move(root)) {}

  Observer AsObserver();
  // Says that the caller has been told of success.
  void Acknowledge(std::string what);
  std::vector<DiskOp> ops;

 private:
  std::string Relative(const std::string& path) const;
  void Record(const SystemCall& call);

  const std::filesystem::path root_;
};

// The files that a disk may hold after the power went, by path; directories end with a slash.
using DiskImage = std::map<std::string, std::string>;

// What of the ops before a power cut has reached the disk. A sync of a file makes its writes last
// and nothing else; one of a directory the names in it and nothing else. Unsynced writes of a file
// may be there, missing, cut off, with holes, or zeros, each file for itself; unsynced changes of a
// directory are there up to some moment, each directory for itself. This is weaker than what ext4,
// XFS and Btrfs keep.
class PowerCut {
 public:
  // After the first `count` of `ops`, in a root that was empty.
  PowerCut(const std::vector<DiskOp>& ops, size_t count);

  // Every combination of what the directories kept, with the data of all files in each of the ways
  // above, while there are at most `limit`; further ones by chance up to `limit`.
  std::vector<DiskImage> Images(size_t limit, std::mt19937& random) const;

 private:
  struct Edit {
    std::string name;
    int node = -1;  // -1: removed
  };
  struct Node {
    bool is_directory = false;
    size_t synced = 0;  // the first so many of these are on the disk
    std::vector<std::vector<Edit>> changes;
    std::vector<DiskOp> writes;
    size_t pending() const { return (is_directory ? changes.size() : writes.size()) - synced; }
  };
  enum Data { kGone, kWhole, kCutOff, kHole, kZeros, kWithoutTheFirst, kDataKinds };
  struct Choice {
    std::vector<size_t> kept;  // changes of each directory node
    std::vector<Data> data;    // of each file node
    std::vector<double> cut;   // where the last write ends or a hole is, as a part of it
  };

  int Find(const std::string& path) const;
  // In the directory that `path` is in.
  void Change(const std::string& path, std::vector<Edit> edits);
  std::string Content(const Node& node, Data data, double cut) const;
  void Add(int node, const std::string& path, const Choice& choice, DiskImage* image) const;

  std::vector<Node> nodes_;                      // [0] is the root
  std::vector<std::map<std::string, int>> now_;  // names in each directory, as programs see them
};

// Puts `image` in the place of what is below `root`.
void Materialize(const DiskImage& image, const std::filesystem::path& root);

}  // namespace modelstate::fault

#endif  // MODELSTATE_TESTS_FAULT_DURABILITY_DISK_MODEL_H_
