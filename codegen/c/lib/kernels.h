/* kernels.h: the whole micro-kernel library, for generated modules.
 *
 *   formats.h     storage formats, exact codecs            elementary.h  exp, sigmoid, tanh, erf
 *   isa*.h        vectors and instruction tables           pool.h        threads, barriers, task loops
 *   group.h       groups of 32 weights; packed activations
 *   weights.h     stored weights and their scales          matmul*.h     products with them
 *   experts.h     grouped experts                          attention.h   paged attention
 *
 * Compile with -std=gnu11 -O3 -ffp-contract=off and without relaxed floating-point flags: the sum orders
 * and subnormal numbers that the headers promise are part of the results. Little-endian machines only.
 */
#ifndef DILU_KERNELS_H
#define DILU_KERNELS_H

#include "attention.h"
#include "elementary.h"
#include "experts.h"
#include "formats.h"
#include "group.h"
#include "isa.h"
#include "matmul.h"
#include "matmul_kn.h"
#include "pool.h"

#endif
