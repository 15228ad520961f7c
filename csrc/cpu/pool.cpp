// Not in the stable ABI of torch: a tensor that can be resized as any other needs an allocator.
#include "pool.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <vector>

namespace bnfuse {
namespace {

constexpr int64_t SMALLEST_BLOCK = int64_t(1) << 20;  // smaller tensors: the C library keeps their memory anyway
constexpr int64_t HUGE_PAGE = int64_t(1) << 21;
constexpr int POISON = 0xff;                          // in all bytes: NaN in every dtype
constexpr int64_t MOST_WASTE = 8;                     // a tensor takes a block of up to as many times its size

struct Block {
  void* data;
  int64_t bytes;
};

class Pool {
 public:
  Block take(int64_t bytes) {
    const int64_t rounded = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = kept_.end();
      for (auto block = kept_.begin(); block != kept_.end(); ++block)
        if (block->bytes >= rounded && block->bytes <= MOST_WASTE * rounded &&
            (best == kept_.end() || block->bytes < best->bytes))
          best = block;
      if (best != kept_.end()) {
        const Block block = *best;
        kept_.erase(best);
        use_.kept -= block.bytes;
        count_in_use(block.bytes);
        return block;
      }
    }
    const Block block{std::aligned_alloc(HUGE_PAGE, rounded), rounded};
    TORCH_CHECK(block.data != nullptr, "out of memory: cannot allocate ", rounded,
                    " bytes for an activation; use smaller batches");
#ifdef __linux__
    madvise(block.data, rounded, MADV_HUGEPAGE);  // fewer and larger pages to touch; a wish, so failure is no error
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    count_in_use(block.bytes);
    return block;
  }

  void give(Block block) {
    std::vector<void*> unused;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      use_.in_use -= block.bytes;
      use_.kept += block.bytes;
      kept_.push_back(block);
      unused = shrink(most_in_use_);
    }
    free_all(unused);
  }

  void empty() {
    std::vector<void*> unused;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      unused = shrink(0);
      most_in_use_ = use_.in_use;
    }
    free_all(unused);
  }

  PoolUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return use_;
  }

  bool poison = false;

 private:
  void count_in_use(int64_t bytes) {
    use_.in_use += bytes;
    most_in_use_ = std::max(most_in_use_, use_.in_use);
  }

  // What is to be freed so that no more than this is kept, the longest unused first.
  std::vector<void*> shrink(int64_t limit) {
    std::vector<void*> unused;
    while (use_.kept > limit) {
      unused.push_back(kept_.front().data);
      use_.kept -= kept_.front().bytes;
      kept_.pop_front();
    }
    return unused;
  }

  // Without the lock: giving pages back takes the system a while.
  static void free_all(const std::vector<void*>& unused) {
    for (void* const data : unused) std::free(data);
  }

  std::mutex mutex_;
  std::deque<Block> kept_;
  PoolUse use_{0, 0};
  int64_t most_in_use_ = 0;
};

// Never destroyed: tensors may outlive the library's static objects.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

// The pool as torch's storages use it; the context of a pointer is its block.
class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Block* const block = new Block(pool().take(static_cast<int64_t>(bytes)));
    if (pool().poison) std::memset(block->data, POISON, block->bytes);
    return {block->data, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void give_back(void* context) {
    Block* const block = static_cast<Block*>(context);
    pool().give(*block);
    delete block;
  }
};

AtenTensorHandle handed_over(at::Tensor tensor) {
  if (pool().poison && tensor.nbytes()) std::memset(tensor.mutable_data_ptr(), POISON, tensor.nbytes());
  return torch::aot_inductor::new_tensor_handle(std::move(tensor));
}

}  // namespace

AtenTensorHandle pooled_empty_like(AtenTensorHandle x_handle) {
  static PoolAllocator* const allocator = new PoolAllocator;
  const at::Tensor& x = *torch::aot_inductor::tensor_handle_to_tensor_pointer(x_handle);
  return handed_over(
      static_cast<int64_t>(x.nbytes()) < SMALLEST_BLOCK
          ? at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.options())
          : at::Tensor(at::detail::empty_strided_generic(x.sizes(), x.strides(), allocator,
                                                         c10::DispatchKeySet(c10::DispatchKey::CPU), x.scalar_type())));
}

AtenTensorHandle empty_small(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype) {
  return handed_over(at::detail::empty_cpu(sizes, at::TensorOptions().dtype(dtype)));
}

PoolUse pool_use() { return pool().use(); }

void empty_pool() { pool().empty(); }

void poison_pool(bool poison) { pool().poison = poison; }

}  // namespace bnfuse
