// Functions of the kernel that tests call as plain C++. Only this macro; no thread.
#pragma once

#ifdef __CUDACC__
#define HVD_HOST_DEVICE __host__ __device__
#else
#define HVD_HOST_DEVICE
#endif
