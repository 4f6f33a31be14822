#ifndef MODELSTATE_COMMON_BASE_REF_COUNTED_H_
#define MODELSTATE_COMMON_BASE_REF_COUNTED_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace modelstate {

// An intrusive reference count. Unlike `shared_ptr::use_count()`, IsSoleReference() is an acquire
// load: when it is true, every access through references that are gone happened before.
// Thread-safe. `Derived` is deleted as `Derived`, so it needs no virtual destructor.
template <typename Derived>
class RefCounted {
 public:
  RefCounted(const RefCounted&) = delete;
  RefCounted& operator=(const RefCounted&) = delete;

  void Ref() const { count_.fetch_add(1, std::memory_order_relaxed); }
  void Unref() const {
    if (count_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      delete static_cast<const Derived*>(this);
    }
  }
  // True means that the caller's reference is the only one; it stays so as long as only the caller
  // can hand out new ones.
  bool IsSoleReference() const { return count_.load(std::memory_order_acquire) == 1; }

 protected:
  RefCounted() = default;
  ~RefCounted() = default;

 private:
  mutable std::atomic<uint32_t> count_{1};
};

// Owns one reference. Value type; a given RefPtr is thread-compatible.
template <typename T>
class RefPtr {
 public:
  RefPtr() = default;
  RefPtr(std::nullptr_t) {}  // NOLINT: implicit, as for a plain pointer
  RefPtr(const RefPtr& other) : ptr_(other.ptr_) {
    if (ptr_ != nullptr) ptr_->Ref();
  }
  // From T to const T.
  template <typename U, typename = std::enable_if_t<std::is_convertible_v<U*, T*>>>
  RefPtr(RefPtr<U> other) : ptr_(other.Release()) {}  // NOLINT: implicit, as for a plain pointer
  RefPtr(RefPtr&& other) noexcept : ptr_(std::exchange(other.ptr_, nullptr)) {}
  RefPtr& operator=(RefPtr other) noexcept {
    std::swap(ptr_, other.ptr_);
    return *this;
  }
  ~RefPtr() {
    if (ptr_ != nullptr) ptr_->Unref();
  }

  // Takes over the reference that `new` made.
  static RefPtr Adopt(T* ptr) {
    RefPtr result;
    result.ptr_ = ptr;
    return result;
  }

  // Gives the reference to the caller, who owes one Unref().
  T* Release() { return std::exchange(ptr_, nullptr); }

  T* get() const { return ptr_; }
  T* operator->() const { return ptr_; }
  T& operator*() const { return *ptr_; }
  explicit operator bool() const { return ptr_ != nullptr; }

  friend bool operator==(const RefPtr& a, const RefPtr& b) { return a.ptr_ == b.ptr_; }
  friend bool operator!=(const RefPtr& a, const RefPtr& b) { return a.ptr_ != b.ptr_; }

 private:
  T* ptr_ = nullptr;
};

template <typename T, typename... Args>
RefPtr<T> MakeRef(Args&&... args) {
  return RefPtr<T>::Adopt(new T(std::forward<Args>(args)...));
}

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_REF_COUNTED_H_
