#include "client/files/tensor_source.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/files/held_version.h"
#include "client/files/lease_keeper.h"
#include "client/range_fetch.h"
#include "common/base/status.h"
#include "common/format/open_path.h"

namespace modelstate::client {
namespace {

class FileSource final : public TensorSource {
 public:
  FileSource(const std::string& path, std::unique_ptr<CheckpointReader> reader)
      : reader_(std::move(reader)) {
    name_ = path;
    for (const StoredTensor& tensor : reader_->tensors()) {
      TensorSpec spec;
      spec.name = tensor.name;
      spec.kind = tensor.kind.value_or(TensorKind::kParameter);
      spec.dtype = tensor.dtype;
      spec.shape = tensor.shape;
      spec.alias_of = tensor.alias_of;
      specs_.push_back(std::move(spec));
    }
  }

  absl::StatusOr<std::vector<absl::Span<const uint8_t>>> Read(
      absl::Span<const size_t> indices) override {
    tensors_.clear();
    std::vector<absl::Span<const uint8_t>> result;
    for (const size_t index : indices) {
      absl::StatusOr<std::unique_ptr<uint8_t[]>> tensor = reader_->ReadWhole(index, pass_);
      if (!tensor.ok()) return Annotate(tensor.status(), name_);
      tensors_.push_back(*std::move(tensor));
      result.emplace_back(tensors_.back().get(), specs_[index].nbytes());
    }
    return result;
  }

  absl::StatusOr<absl::Span<const uint8_t>> ReadPart(size_t index, uint64_t offset,
                                                     uint64_t bytes) override {
    const std::optional<CheckpointReader::Extent> stored = reader_->StoredAt(index);
    if (!stored) return TensorSource::ReadPart(index, offset, bytes);
    if (offset == 0) {
      tensors_.clear();
      MS_RETURN_IF_ERROR(Annotate(reader_->Verify(index, pass_), name_));
    }
    part_.resize(bytes);
    MS_RETURN_IF_ERROR(stored->file->ReadAt(stored->begin + offset, absl::MakeSpan(part_)));
    return part_;
  }

 private:
  const std::unique_ptr<CheckpointReader> reader_;
  ReadPass pass_;
  std::vector<std::unique_ptr<uint8_t[]>> tensors_;
  std::vector<uint8_t> part_;
};

class ModuleSource final : public TensorSource {
 public:
  ModuleSource(const Client& client, const std::string& module, HeldVersion held,
               Cancellation* cancellation, absl::Duration lease)
      : client_(client), module_(module), held_(std::move(held)), cancellation_(cancellation) {
    if (held_.own_pin) keeper_.emplace(client_, module_, held_.snapshot_id, lease);
  }
  ~ModuleSource() override {
    keeper_.reset();  // it would find the pin gone
    if (held_.own_pin) (void)client_.ReleaseSnapshot(held_.snapshot_id);
  }

  absl::Status ReadTable() {
    RangeRequest request;
    request.module = module_;
    request.snapshot_id = held_.snapshot_id;
    request.version = held_.snapshot_id.empty() ? held_.version.number : 0;
    MS_ASSIGN_OR_RETURN(StateTable table, FetchTable(client_, std::move(request), cancellation_));
    specs_ = std::move(table.specs);
    name_ = absl::StrCat(module_, ", version ", table.header.version.number);
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<absl::Span<const uint8_t>>> Read(
      absl::Span<const size_t> indices) override {
    FetchOptions options;
    for (size_t index : indices) options.selection.names.push_back(specs_[index].name);
    options.snapshot_id = held_.snapshot_id;
    options.version = held_.snapshot_id.empty() ? held_.version.number : 0;
    state_ = StateDict();  // its memory first
    absl::StatusOr<StateDict> state = client_.Fetch(module_, options, cancellation_);
    if (!state.ok()) return WithRenewal(state.status());
    state_ = *std::move(state);
    std::vector<absl::Span<const uint8_t>> result;
    for (size_t index : indices) {
      const std::optional<size_t> found = state_.Find(specs_[index].name);
      if (!found || state_.bytes(*found).size() != specs_[index].nbytes()) {
        return absl::InternalError(absl::StrCat("the server sent tensor \"", specs_[index].name,
                                                "\" otherwise than its table says"));
      }
      result.push_back(state_.bytes(*found));
    }
    return result;
  }

 private:
  // Why the version may be gone.
  absl::Status WithRenewal(const absl::Status& status) const {
    const absl::Status renewal = keeper_ ? keeper_->status() : absl::OkStatus();
    if (renewal.ok()) return status;
    return Annotate(status,
                    absl::StrCat("after the pin could not be renewed (", renewal.message(), ")"));
  }

  const Client client_;
  const std::string module_;
  const HeldVersion held_;
  Cancellation* const cancellation_;
  std::optional<LeaseKeeper> keeper_;
  StateDict state_;
};

}  // namespace

absl::StatusOr<absl::Span<const uint8_t>> TensorSource::ReadPart(size_t index, uint64_t offset,
                                                                 uint64_t bytes) {
  if (offset == 0) {
    MS_ASSIGN_OR_RETURN(const std::vector<absl::Span<const uint8_t>> read, Read({index}));
    whole_ = read.front();
  }
  return whole_.subspan(offset, bytes);
}

absl::StatusOr<std::unique_ptr<TensorSource>> OpenFileSource(const std::string& path) {
  absl::StatusOr<std::unique_ptr<CheckpointReader>> reader = OpenCheckpointPath(path);
  if (!reader.ok()) return Annotate(reader.status(), path);
  return std::make_unique<FileSource>(path, *std::move(reader));
}

absl::StatusOr<std::unique_ptr<TensorSource>> OpenModuleSource(
    const Client& client, const std::string& module, uint64_t version,
    const std::string& snapshot_id, Cancellation* cancellation, absl::Duration lease) {
  MS_ASSIGN_OR_RETURN(HeldVersion held, HoldVersion(client, module, version, snapshot_id, lease));
  auto source =
      std::make_unique<ModuleSource>(client, module, std::move(held), cancellation, lease);
  MS_RETURN_IF_ERROR(source->ReadTable());
  return source;
}

}  // namespace modelstate::client
