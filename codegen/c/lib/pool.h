/* pool.h: a persistent thread pool in SPMD style.
 *
 * The whole plan of a model function is one dilu_pool_run: every thread executes the same sequence of
 * kernels, kernels share out their tasks among the threads, and dilu_barrier stands between a kernel
 * and the ones that read its results.
 *
 *   dilu_pool* dilu_pool_create(int threads)     threads >= 1, the caller included; NULL: no memory
 *   void dilu_pool_destroy(dilu_pool*)
 *   int  dilu_pool_threads(const dilu_pool*)     1 for NULL
 *   void dilu_pool_run(pool, fn, arg)            fn(arg, thread, threads) on every thread; the caller is
 *                                                thread 0; returns when all are done. One run at a time.
 *   void dilu_barrier(pool, thread)              all threads arrive before any goes on
 *   dilu_loop dilu_loop_begin(pool, thread, n)   shares tasks 0..n-1 among the threads:
 *   int64_t dilu_loop_next(&loop)                  the next task of this thread, -1 after the last
 *
 * Each thread has a contiguous range of a loop's tasks, which it does in order, so that it reads memory
 * in order; when it is done, it takes tasks from the ends of the others' ranges.
 *
 * A NULL pool means "this thread alone" everywhere. Every thread must run the same loops in the same
 * order; who executes which task is not fixed, so a task's result must not depend on it.
 *
 * During a run subnormals are kept (flush-to-zero and denormals-are-zero off) and rounding is to
 * nearest; the caller's mode is restored after it. Workers that wait spin first, yield then, and sleep
 * between runs.
 */
#ifndef DILU_POOL_H
#define DILU_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>

#include "formats.h"

/* Loops between two barriers that share tasks dynamically; further ones are split statically. */
#define DILU_LOOPS 16
#define DILU_LINE 64

/* How many tasks of a thread's range are taken: from its front in the lower half, from its end in the
 * upper half. Whoever counts up from a sum below the range's length has taken one. */
typedef struct {
  uint64_t taken;
  char pad[DILU_LINE - sizeof(uint64_t)];
} dilu_range;

/* A thread's ranges of the loops begun since the last barrier. Phases between barriers use the two halves
 * in turn, so that a thread can clear what the phase before has used. */
typedef struct {
  _Alignas(DILU_LINE) int64_t loops[2];
  int64_t half;
  dilu_range ranges[2][DILU_LOOPS];
} dilu_ranges;

typedef struct dilu_pool {
  uint32_t arrived; /* barrier */
  char pad0[DILU_LINE - 4];
  uint32_t phase;
  char pad1[DILU_LINE - 4];
  uint32_t runs; /* counts dilu_pool_run calls; workers wait for a change */
  char pad2[DILU_LINE - 4];
  dilu_ranges* shares; /* [threads] */
  int64_t* counts; /* where the next block of experts adds up its entries, by expert, or NULL */
  int threads, started, stop, sleepers;
  void (*fn)(void*, int, int);
  void* arg;
  pthread_t* handles;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
} dilu_pool;

typedef struct {
  dilu_pool* pool; /* NULL: tasks next, next + step.. below `tasks` are this thread's */
  int64_t next, step, tasks;
  int thread, slot, half, victim; /* whose range is next: this thread's, then the others' in turn */
} dilu_loop;

DILU_INLINE void dilu_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Waits until *word differs from old: spins about 20 microseconds, then gives the core away. Returns 0
 * when `patience` yields went by in vain (patience < 0: never). */
DILU_INLINE int dilu_wait_change(const uint32_t* word, uint32_t old, int patience) {
  for (int spin = 0; spin < 2000; spin++) {
    if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != old) return 1;
    dilu_pause();
  }
  for (int turn = 0; patience < 0 || turn < patience; turn++) {
    if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != old) return 1;
    sched_yield();
  }
  return __atomic_load_n(word, __ATOMIC_ACQUIRE) != old;
}

/* Sets the floating-point mode of this thread for a run and returns the previous one. */
DILU_INLINE uint64_t dilu_float_mode_enter(void) {
#if defined(__x86_64__) || defined(__SSE__)
  uint32_t mode = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(0x1F80);
  return mode;
#elif defined(__aarch64__)
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  __asm__ volatile("msr fpcr, %0" : : "r"(mode & ~(uint64_t)0x01C00000));
  return mode;
#else
  return 0;
#endif
}

DILU_INLINE void dilu_float_mode_leave(uint64_t mode) {
#if defined(__x86_64__) || defined(__SSE__)
  __builtin_ia32_ldmxcsr((uint32_t)mode);
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#else
  (void)mode;
#endif
}

DILU_INLINE int dilu_pool_threads(const dilu_pool* pool) { return pool ? pool->threads : 1; }

DILU_NOINLINE void dilu_barrier(dilu_pool* pool, int thread) {
  if (!pool || pool->threads == 1) return;
  dilu_ranges* share = &pool->shares[thread];
  /* Nobody takes tasks of the phase before this one any more, and nobody does of the next one yet. */
  share->half = 1 - share->half;
  for (int64_t i = 0; i < share->loops[share->half] && i < DILU_LOOPS; i++)
    __atomic_store_n(&share->ranges[share->half][i].taken, 0, __ATOMIC_RELAXED);
  share->loops[share->half] = 0;
  uint32_t phase = __atomic_load_n(&pool->phase, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&pool->arrived, 1, __ATOMIC_ACQ_REL) == (uint32_t)pool->threads) {
    __atomic_store_n(&pool->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&pool->phase, phase + 1, __ATOMIC_RELEASE);
  } else {
    dilu_wait_change(&pool->phase, phase, -1);
  }
}

DILU_INLINE dilu_loop dilu_loop_begin(dilu_pool* pool, int thread, int64_t tasks) {
  if (!pool || pool->threads == 1) return (dilu_loop){0, 0, 1, tasks, 0, 0, 0, 0};
  dilu_ranges* share = &pool->shares[thread];
  int64_t slot = share->loops[share->half]++;
  if (slot < DILU_LOOPS) return (dilu_loop){pool, 0, 0, tasks, thread, (int)slot, (int)share->half, 0};
  return (dilu_loop){0, thread, pool->threads, tasks, 0, 0, 0, 0};
}

/* The next task of a range, from its front or its end; -1 when all are taken. */
DILU_INLINE int64_t dilu_range_take(dilu_range* range, int64_t begin, int64_t end, int front) {
  uint64_t taken = __atomic_load_n(&range->taken, __ATOMIC_RELAXED);
  if ((int64_t)(taken & 0xFFFFFFFFu) + (int64_t)(taken >> 32) >= end - begin) return -1; /* counts stay small */
  taken = __atomic_fetch_add(&range->taken, front ? 1 : (uint64_t)1 << 32, __ATOMIC_RELAXED);
  int64_t from_front = (int64_t)(taken & 0xFFFFFFFFu), from_end = (int64_t)(taken >> 32);
  if (from_front + from_end >= end - begin) return -1;
  return front ? begin + from_front : end - 1 - from_end;
}

DILU_INLINE int64_t dilu_loop_next(dilu_loop* loop) {
  if (!loop->pool) {
    int64_t task = loop->next;
    loop->next += loop->step;
    return task < loop->tasks ? task : -1;
  }
  const int threads = loop->pool->threads;
  for (; loop->victim < threads; loop->victim++) {
    int owner = (loop->thread + loop->victim) % threads;
    int64_t begin = loop->tasks * owner / threads, end = loop->tasks * (owner + 1) / threads;
    int64_t task = dilu_range_take(&loop->pool->shares[owner].ranges[loop->half][loop->slot], begin, end, loop->victim == 0);
    if (task >= 0) return task;
  }
  return -1;
}

typedef struct {
  dilu_pool* pool;
  int thread;
} dilu_worker_start;

/* Sleeps until the run counter differs from `seen`. The counter is read again under the mutex, and
 * dilu_pool_run looks at `sleepers` after it has counted, so no wake-up is lost. */
DILU_NOINLINE void dilu_worker_sleep(dilu_pool* pool, uint32_t seen) {
  pthread_mutex_lock(&pool->mutex);
  __atomic_add_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&pool->runs, __ATOMIC_SEQ_CST) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
  __atomic_sub_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
  pthread_mutex_unlock(&pool->mutex);
}

DILU_NOINLINE void* dilu_worker_main(void* start) {
  dilu_pool* pool = ((dilu_worker_start*)start)->pool;
  int thread = ((dilu_worker_start*)start)->thread;
  free(start);
  dilu_float_mode_enter();
  for (uint32_t seen = 0;; seen++) {
    if (!dilu_wait_change(&pool->runs, seen, 50)) dilu_worker_sleep(pool, seen);
    if (pool->stop) return 0;
    pool->fn(pool->arg, thread, pool->threads);
    dilu_barrier(pool, thread);
  }
}

DILU_INLINE void dilu_pool_signal(dilu_pool* pool) {
  __atomic_add_fetch(&pool->runs, 1, __ATOMIC_SEQ_CST);
  if (!__atomic_load_n(&pool->sleepers, __ATOMIC_SEQ_CST)) return;
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_broadcast(&pool->wake);
  pthread_mutex_unlock(&pool->mutex);
}

DILU_NOINLINE void dilu_pool_destroy(dilu_pool* pool) {
  if (!pool) return;
  pool->stop = 1;
  dilu_pool_signal(pool);
  for (int i = 1; i < pool->started; i++) pthread_join(pool->handles[i], 0);
  pthread_cond_destroy(&pool->wake);
  pthread_mutex_destroy(&pool->mutex);
  free(pool->handles);
  free(pool->shares);
  free(pool);
}

DILU_INLINE int dilu_worker_begin(dilu_pool* pool, int thread) {
  dilu_worker_start* start = malloc(sizeof *start);
  if (!start) return 0;
  *start = (dilu_worker_start){pool, thread};
  if (pthread_create(&pool->handles[thread], 0, dilu_worker_main, start) == 0) return 1;
  free(start);
  return 0;
}

DILU_NOINLINE dilu_pool* dilu_pool_create(int threads) {
  dilu_pool* pool = calloc(1, sizeof *pool);
  if (!pool) return 0;
  pthread_mutex_init(&pool->mutex, 0);
  pthread_cond_init(&pool->wake, 0);
  pool->threads = threads < 1 ? 1 : threads;
  pool->started = 1;
  pool->handles = calloc((size_t)pool->threads, sizeof *pool->handles);
  pool->shares = aligned_alloc(DILU_LINE, (size_t)pool->threads * sizeof *pool->shares);
  if (pool->shares) memset(pool->shares, 0, (size_t)pool->threads * sizeof *pool->shares);
  int ok = pool->handles && pool->shares;
  while (ok && pool->started < pool->threads) {
    ok = dilu_worker_begin(pool, pool->started);
    pool->started += ok;
  }
  if (ok) return pool;
  dilu_pool_destroy(pool);
  return 0;
}

DILU_NOINLINE void dilu_pool_run(dilu_pool* pool, void (*fn)(void* arg, int thread, int threads), void* arg) {
  uint64_t mode = dilu_float_mode_enter();
  if (!pool || pool->threads == 1) {
    fn(arg, 0, 1);
  } else {
    pool->fn = fn;
    pool->arg = arg;
    dilu_pool_signal(pool);
    fn(arg, 0, pool->threads);
    dilu_barrier(pool, 0);
  }
  dilu_float_mode_leave(mode);
}

#endif
