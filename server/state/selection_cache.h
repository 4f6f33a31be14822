#ifndef MODELSTATE_SERVER_STATE_SELECTION_CACHE_H_
#define MODELSTATE_SERVER_STATE_SELECTION_CACHE_H_

#include <cstdint>
#include <iterator>
#include <list>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "common/base/selection.h"

namespace modelstate {

// Selections as the key of a cache, so that equal keys mean equal selections. `scope` tells apart
// what is selected from. Empty for a selection that is too large to be worth keeping.
std::string SelectionKey(const Selection& selection, absl::string_view scope);

// What the last few selections came to. Thread-safe; the lock is held for a look-up only.
template <typename T>
class SelectionCache {
 public:
  explicit SelectionCache(size_t capacity) : capacity_(capacity) {}

  // null: not there.
  std::shared_ptr<const T> Find(const std::string& key) {
    if (key.empty()) return nullptr;
    absl::MutexLock lock(&mutex_);
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (it->first != key) continue;
      entries_.splice(entries_.begin(), entries_, it);  // the last used is the first
      return it->second;
    }
    return nullptr;
  }

  void Add(std::string key, std::shared_ptr<const T> value) {
    if (key.empty()) return;
    std::list<Entry> dropped;  // ends after the lock
    absl::MutexLock lock(&mutex_);
    entries_.emplace_front(std::move(key), std::move(value));
    if (entries_.size() > capacity_) {
      dropped.splice(dropped.begin(), entries_, std::prev(entries_.end()));
    }
  }

 private:
  using Entry = std::pair<std::string, std::shared_ptr<const T>>;
  const size_t capacity_;
  absl::Mutex mutex_;
  std::list<Entry> entries_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_SELECTION_CACHE_H_
