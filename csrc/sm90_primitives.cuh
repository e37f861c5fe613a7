// What Hopper's tensor cores need around them, each as one function: barriers in shared memory, bulk tensor copies,
// warpgroup products of e4m3, and fences between the ways to reach memory. PTX ISA 8.x has the definitions.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sonicmoe::sm90 {

// A place in this block's shared memory.
using Address = uint32_t;

__device__ __forceinline__ Address shared_address(const void* pointer) {
  return static_cast<Address>(__cvta_generic_to_shared(pointer));
}

// The compiler forgets how it came by a value: one that is dear to work out again it then keeps, and one that is worked
// out where it is used it does not keep from tile to tile, where it would push sums out of the registers.
template <class T>
__device__ __forceinline__ T opaque(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Reads that stay where they are written.
__device__ __forceinline__ float load_one(Address place) {
  float found;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(found) : "r"(place) : "memory");
  return found;
}
__device__ __forceinline__ float2 load_two(Address place) {
  float2 found;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(found.x), "=f"(found.y) : "r"(place) : "memory");
  return found;
}
__device__ __forceinline__ void store_two(Address place, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(place), "f"(x), "f"(y) : "memory");
}

// ---- Clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// ---- Barriers

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Before other threads of the cluster may use barriers that this one has made.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(Address barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) { barrier_arrive(shared_address(barrier)); }

// The same barrier in another block of the cluster. Ordered within this block alone: what it tells is that products have
// read, which is over when they were waited for; an order for the cluster would wait for all of this thread's stores and
// empty its cache, once a step.
__device__ __forceinline__ void barrier_arrive_at(Address barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(Address barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  barrier_wait(shared_address(barrier), parity);
}

// Threads of one warpgroup; ``number`` 1 to 15.
__device__ __forceinline__ void warpgroup_sync(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
}

// The same for any warps: of ``threads`` in all, some may go on at once.
__device__ __forceinline__ void pass(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void pass_when_all_have_come(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- Copies

// A box of a two-dimensional tensor to this block, or to the same place in each block of ``mask``.
__device__ __forceinline__ void tensor_load(const CUtensorMap& map, uint64_t* barrier, void* target, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(target)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void tensor_load_multicast(const CUtensorMap& map, uint64_t* barrier, void* target, int x,
                                                      int y, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(target)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(mask)
      : "memory");
}

__device__ __forceinline__ void bulk_load(uint64_t* barrier, void* target, const void* source, uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void tensor_store(const CUtensorMap& map, Address source, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(source),
               "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tensor_store(const CUtensorMap& map, const void* source, int x, int y) {
  tensor_store(map, shared_address(source), x, y);
}

// Added to what is there.
__device__ __forceinline__ void tensor_add(const CUtensorMap& map, Address source, int x, int y) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(source), "r"(x), "r"(y)
               : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until the sources of this thread's stores may be written again, of all but the last ``kPending``.
template <int kPending>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until they are done.
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// 16 bytes, in the order of ordinary stores; zeros where ``real`` is 0.
__device__ __forceinline__ void async_copy(Address target, const void* source, uint32_t real) {
  asm volatile(
      "{\n"
      ".reg .pred pad;\n"
      "setp.eq.u32 pad, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, pad;\n"
      "}" ::"r"(target),
      "l"(source), "r"(real)
      : "memory");
}

__device__ __forceinline__ void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What ordinary stores wrote to shared memory, tensor cores and bulk copies may read after this.
__device__ __forceinline__ void fence_for_async_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- Registers

template <int kCount>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Products

// Where an operand tile of rows of 128 bytes lies, in the 128-byte swizzle that bulk copies write: groups of eight rows
// follow each other, 1024 bytes apart. This is the half of the descriptor that differs from tile to tile.
using Operand = uint32_t;

__device__ __forceinline__ Operand operand(Address tile) { return 1u << 16 | (tile & 0x3FFFF) >> 4; }

// The same tile, or one like it, ``bytes`` further on.
__device__ __forceinline__ Operand further(Operand tile, int bytes) { return tile + (bytes >> 4); }

__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// d [64,N] = (+=) a [64,32] @ b [N,32]^T for one warpgroup. Thread t holds of row 16 * (t / 32) + (t % 32) / 4 the
// columns 8j + 2 (t % 4) + {0, 1} in d[4j + {0, 1}], and of the row 8 further down the same ones in d[4j + {2, 3}].
#define SONICMOE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SONICMOE_D16(i) SONICMOE_D4(i), SONICMOE_D4(i + 4), SONICMOE_D4(i + 8), SONICMOE_D4(i + 12)
__device__ __forceinline__ void product(float (&d)[64], Operand a, Operand b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      ".reg .b64 a, b;\n"
      "mov.b64 a, {%64, 0x40000040};\n"  // 128-byte swizzle; 1024 bytes
      "mov.b64 b, {%65, 0x40000040};\n"
      "setp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "a, b, add, 1, 1;\n"
      "}"
      : SONICMOE_D16(0), SONICMOE_D16(16), SONICMOE_D16(32), SONICMOE_D16(48)
      : "r"(a), "r"(b), "r"(static_cast<int32_t>(add)));
}
__device__ __forceinline__ void product(float (&d)[96], Operand a, Operand b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      ".reg .b64 a, b;\n"
      "mov.b64 a, {%96, 0x40000040};\n"
      "mov.b64 b, {%97, 0x40000040};\n"
      "setp.ne.b32 add, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
      "a, b, add, 1, 1;\n"
      "}"
      : SONICMOE_D16(0), SONICMOE_D16(16), SONICMOE_D16(32), SONICMOE_D16(48), SONICMOE_D16(64), SONICMOE_D16(80)
      : "r"(a), "r"(b), "r"(static_cast<int32_t>(add)));
}
#undef SONICMOE_D16
#undef SONICMOE_D4

// The compiler knows nothing of what goes on in these registers between a product and the wait for it: no use of them
// may move across this.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Four 8x8 matrices of 16-bit values in rows of 16 bytes; lane 8m + r gives the place of row r of matrix m. Thread t
// holds of each one the columns 2 (t % 4) + {0, 1} of row t / 4, or, transposed, those rows of column t / 4.
__device__ __forceinline__ void store_matrices(Address row, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(Address row, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
__device__ __forceinline__ void load_matrices(Address row, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row)
               : "memory");
}

// ---- Numbers

// 1 / x, to about the last bit.
__device__ __forceinline__ float near_inverse(float x) {
  float found;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
  return found;
}

// 1 / (1 + e^-x), to a few bits of float32's last.
__device__ __forceinline__ float sigmoid(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
  return near_inverse(1.0f + power);
}

// The smaller one. Unlike fminf it keeps a NaN.
__device__ __forceinline__ float at_most(float x, float bound) {
  float found;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(x), "f"(bound));
  return found;
}

// Two values to e4m3, nearest even, saturating; NaN stays NaN. The first is the lower byte.
__device__ __forceinline__ uint32_t to_e4m3(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t to_e4m3(float a, float b, float c, float d) {
  return to_e4m3(a, b) | to_e4m3(c, d) << 16;
}

__device__ __forceinline__ float2 from_e4m3(uint16_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

// Two values of 16 bits: float16 or bfloat16.
__device__ __forceinline__ uint32_t two(float low, float high, bool half) {
  if (half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// ---- Pairs of 16 bits: bfloat16, and float16 where it says halves

__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000); }
__device__ __forceinline__ float2 from_half(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// An Inf as a NaN, without a comparison: 0 times a number adds nothing.
__device__ __forceinline__ uint32_t tamed_two(uint32_t pair) {
  uint32_t found;
  asm("fma.rn.bf16x2 %0, %1, %2, %1;" : "=r"(found) : "r"(pair), "r"(0));
  return found;
}
__device__ __forceinline__ uint32_t tamed_halves(uint32_t pair) {
  uint32_t found;
  asm("fma.rn.f16x2 %0, %1, %2, %1;" : "=r"(found) : "r"(pair), "r"(0));
  return found;
}

// The larger magnitudes, with any signs. A NaN gives way to a number.
__device__ __forceinline__ uint32_t larger_two(uint32_t x, uint32_t y) {
  uint32_t found;
  asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(x), "r"(y));
  return found;
}
__device__ __forceinline__ uint32_t larger_halves(uint32_t x, uint32_t y) {
  uint32_t found;
  asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(found) : "r"(x), "r"(y));
  return found;
}

}  // namespace sonicmoe::sm90
