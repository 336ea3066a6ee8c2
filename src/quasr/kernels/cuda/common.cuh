// What the kernels for one row share: numbers of 16 bits, barriers in shared memory, bulk copies, dependent launch.
// TYPE_IS_HALF: 1 where activations are fp16, 0 where they are bf16.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// The two numbers of 16 bits in a word, the one at the lower address first.
DEVICE float first_of(u32 word) {
#if TYPE_IS_HALF
  float f;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(f) : "r"(word));
  return f;
#else
  return __uint_as_float(word << 16);
#endif
}

DEVICE float second_of(u32 word) {
#if TYPE_IS_HALF
  float f;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(f) : "r"(word));
  return f;
#else
  return __uint_as_float(word & 0xffff0000u);
#endif
}

DEVICE u16 to_16(float f) {
  u16 r;
#if TYPE_IS_HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f));
#endif
  return r;
}

DEVICE float from_16(u16 n) { return first_of(n); }

DEVICE u32 pair_of(float a, float b) { return to_16(a) | ((u32)to_16(b) << 16); }

DEVICE void unpack(uint4 v, float* to) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = first_of(words[i]);
    to[2 * i + 1] = second_of(words[i]);
  }
}

// The larger one; NaN where either is.
DEVICE float larger(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void barrier_init(u64* b, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals));
}

DEVICE void barrier_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(u64* b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

DEVICE void barrier_wait(u64* b, u32 parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "AGAIN%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra DONE%=;\n"
      "bra AGAIN%=;\n"
      "DONE%=:}" ::"r"(shared_address(b)), "r"(parity) : "memory");
}

// Device memory -> shared memory by the copy engine: multiples of 16 bytes, counted by the barrier.
DEVICE void bulk_copy(void* to, const void* from, u32 bytes, u64* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                   "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)) : "memory");
}

// Programmatic dependent launch: the kernel before has ended; the kernel after may be put beside this one.
DEVICE void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
