#pragma once

namespace mod_kernels {

// What thread_count() says from now on.
void set_thread_count(int count);

}  // namespace mod_kernels
