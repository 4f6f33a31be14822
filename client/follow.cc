#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/backoff.h"
#include "client/client.h"
#include "common/base/status.h"

namespace modelstate::client {

absl::StatusOr<std::vector<size_t>> StateDict::Update(const StateDict& delta) {
  std::vector<size_t> indices;
  indices.reserve(delta.size());
  for (const TensorSpec& spec : delta.specs()) {
    const std::optional<size_t> index = Find(spec.name, spec.slot);
    if (!index || specs_[*index].dtype != spec.dtype || specs_[*index].shape != spec.shape) {
      return absl::InternalError(
          absl::StrCat("the server sent a change of \"", spec.name, "\", which the copy has not"));
    }
    indices.push_back(*index);
  }
  for (size_t i = 0; i < indices.size(); ++i) {
    const absl::Span<const uint8_t> bytes = delta.bytes(i);
    if (!bytes.empty()) std::memcpy(data_.get() + offsets_[indices[i]], bytes.data(), bytes.size());
  }
  version_ = delta.version();
  step_ = delta.step();
  return indices;
}

// The copy, and how it is brought to the newest version.
class Follower {
 public:
  Follower(const Client& client, std::string module, const FollowOptions& options,
           Cancellation* cancellation)
      : client_(client),
        module_(std::move(module)),
        options_(options),
        cancellation_(cancellation) {}

  const StateDict& state() const { return state_; }
  bool IsAt(Version version) const { return has_ && state_.version() == version; }

  // nullopt: it is the newest already.
  absl::StatusOr<std::optional<FollowUpdate>> Refresh() {
    FetchOptions fetch;
    fetch.selection = options_.selection;
    fetch.chunk_bytes = options_.chunk_bytes;
    fetch.digests = options_.digests;
    if (has_) {
      fetch.if_newer_than = fetch.changed_since = state_.version();
      fetch.layout_digest = state_.layout_digest();
      absl::StatusOr<StateDict> delta = client_.Fetch(module_, fetch, cancellation_);
      if (delta.ok()) return Apply(*delta);
      // Another life of the module, or other tensors.
      if (GetReason(delta.status()) != Reason::kIncarnationChanged &&
          GetReason(delta.status()) != Reason::kLayoutMismatch) {
        return delta.status();
      }
      fetch.if_newer_than = fetch.changed_since = std::nullopt;
      fetch.layout_digest.clear();
    }
    // Of two copies in memory the old one goes first.
    has_ = false;
    state_ = StateDict();
    MS_ASSIGN_OR_RETURN(state_, client_.Fetch(module_, fetch, cancellation_));
    has_ = true;
    FollowUpdate update;
    update.whole = true;
    update.received_bytes = state_.data().size();
    for (size_t i = 0; i < state_.size(); ++i) update.changed.push_back(i);
    return update;
  }

 private:
  absl::StatusOr<std::optional<FollowUpdate>> Apply(const StateDict& delta) {
    if (delta.not_modified()) return std::nullopt;
    FollowUpdate update;
    update.received_bytes = delta.data().size();
    MS_ASSIGN_OR_RETURN(update.changed, state_.Update(delta));
    return update;
  }

  const Client& client_;
  const std::string module_;
  const FollowOptions& options_;
  Cancellation* const cancellation_;
  bool has_ = false;
  StateDict state_;
};

absl::Status Client::Follow(
    const std::string& module, const FollowOptions& options,
    const std::function<absl::StatusOr<bool>(const StateDict&, const FollowUpdate&)>& on_version,
    Cancellation* cancellation) const {
  Follower follower(*this, module, options, cancellation);
  Backoff backoff(connection_options());
  while (true) {
    absl::Status failed;  // what ended the watch from within
    bool ended = false;
    const absl::Status watched = Watch(
        module,
        [&](const WatchEvent& event) {
          if (follower.IsAt(event.module.version)) return true;
          absl::StatusOr<std::optional<FollowUpdate>> update = follower.Refresh();
          if (!update.ok()) {
            failed = update.status();
            return false;
          }
          backoff.Reset();
          if (!*update) return true;
          const absl::StatusOr<bool> more = on_version(follower.state(), **update);
          failed = more.status();
          ended = !more.ok() || !*more;
          return !ended;
        },
        cancellation);
    if (ended) return failed;
    const absl::Status status = failed.ok() ? watched : failed;
    if (status.ok() || !backoff.WaitBeforeRetry(status, cancellation)) return status;
  }
}

}  // namespace modelstate::client
