#include "common/base/direct_writer.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {

absl::StatusOr<std::unique_ptr<DirectWriter>> DirectWriter::Start(File file, uint64_t begin,
                                                                  uint64_t size) {
  if (begin % kAlignment != 0) return absl::InternalError("DirectWriter: unaligned begin");
  MS_RETURN_IF_ERROR(file.Allocate(size));
  file.TryDirect();
  return std::unique_ptr<DirectWriter>(new DirectWriter(std::move(file), begin));
}

DirectWriter::~DirectWriter() {
  {
    absl::MutexLock lock(&mutex_);
    queue_.clear();
  }
  EndThreads().IgnoreError();
}

absl::Status DirectWriter::Append(absl::Span<const uint8_t> bytes) {
  while (!bytes.empty()) {
    // A block is handed over when there is more, so the last one stays for Finish.
    if (filling_.data() != nullptr && filled_ == kBlockBytes) HandOver();
    if (filling_.data() == nullptr) MS_RETURN_IF_ERROR(TakeBlock());
    const size_t size = std::min<uint64_t>(bytes.size(), kBlockBytes - filled_);
    std::memcpy(filling_.data() + filled_, bytes.data(), size);
    filled_ += size;
    bytes.remove_prefix(size);
  }
  return absl::OkStatus();
}

absl::Status DirectWriter::Finish(absl::Span<const uint8_t> head) {
  MS_RETURN_IF_ERROR(EndThreads());
  // What is no multiple of a sector, or lies anywhere in memory, goes through the page cache.
  if (filled_ > 0) MS_RETURN_IF_ERROR(file_.WriteAt(offset_, {filling_.data(), filled_}));
  MS_RETURN_IF_ERROR(file_.WriteAt(0, head));
  return file_.SyncData();
}

absl::Status DirectWriter::TakeBlock() {
  if (blocks_ == kBlocks) {
    absl::MutexLock lock(&mutex_);
    const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return !idle_.empty() || !status_.ok();
    };
    mutex_.Await(absl::Condition(&ready));
    MS_RETURN_IF_ERROR(status_);
    filling_ = std::move(idle_.back());
    idle_.pop_back();
    return absl::OkStatus();
  }
  ++blocks_;
  filling_ = HugeBuffer(kBlockBytes);
  if (filling_.data() == nullptr) {
    return MakeError(Reason::kDeviceMemory, "no memory for a block of a file; free some");
  }
  return absl::OkStatus();
}

void DirectWriter::HandOver() {
  {
    absl::MutexLock lock(&mutex_);
    queue_.push_back({std::move(filling_), offset_, filled_});
  }
  offset_ += std::exchange(filled_, 0);
  if (threads_.size() == kThreads) return;
  try {
    threads_.emplace_back(&DirectWriter::WriteQueue, this);
  } catch (const std::system_error& error) {
    if (!threads_.empty()) return;  // one is slower, and enough
    absl::MutexLock lock(&mutex_);
    status_.Update(MakeError(
        Reason::kStorageError,
        absl::StrCat("cannot start a thread that writes ", file_.name(), ": ", error.what(),
                     "; raise the limit of threads (ulimit -u) and try again")));
  }
}

void DirectWriter::WriteQueue() {
  const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !queue_.empty() || ending_;
  };
  for (;;) {
    Filled next;
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(&ready));
      if (queue_.empty() || !status_.ok()) return;
      next = std::move(queue_.front());
      queue_.pop_front();
    }
    absl::Status written = file_.WriteAt(next.offset, {next.block.data(), next.bytes});
    absl::MutexLock lock(&mutex_);
    status_.Update(std::move(written));
    idle_.push_back(std::move(next.block));
  }
}

absl::Status DirectWriter::EndThreads() {
  {
    absl::MutexLock lock(&mutex_);
    ending_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  absl::MutexLock lock(&mutex_);
  return status_;
}

}  // namespace modelstate
