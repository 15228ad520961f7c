#include "loss.cuh"

#include <algorithm>

namespace bnfuse {
namespace {

template <typename A>
void launch_loss(Loss loss, const std::vector<LossSite>& sites, Stream stream) {
  for (loss.first_site = 0; loss.first_site < loss.sites; loss.first_site += SITES_A_LAUNCH) {
    const int64_t count = std::min<int64_t>(SITES_A_LAUNCH, loss.sites - loss.first_site);
    std::copy_n(sites.begin() + loss.first_site, count, loss.site);
    if (loss.groups)
      launch("bn_loss", distances_kernel<A>, count * loss.groups, SMALL_THREADS, LOSS_SHARED_BYTES, stream, loss);
  }
  launch("bn_loss's sum", loss_kernel<A>, 1, SMALL_THREADS, LOSS_SHARED_BYTES, stream, loss);
}

}  // namespace

void loss_on_cuda(bool is_float64, Loss loss, const std::vector<LossSite>& sites, Stream stream) {
  is_float64 ? launch_loss<double>(loss, sites, stream) : launch_loss<float>(loss, sites, stream);
}

}  // namespace bnfuse
