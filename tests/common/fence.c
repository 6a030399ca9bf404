/* Memory of torch's CPU tensors with a page behind it that nobody may touch, and addresses that are never given twice:
   who reads or writes past a tensor, or one that is gone, gets a segmentation fault where it happens. What is written
   in front of a tensor, or into the up to 63 bytes by which torch aligns it, aborts when the tensor is freed.

     cc -O2 -shared -fPIC tests/common/fence.c -o /tmp/fence.so
     LD_PRELOAD=/tmp/fence.so PYTHONFAULTHANDLER=1 pytest ...

   torch allocates by posix_memalign; every block costs three pages and system calls. vm.max_map_count (65,530) ends it
   at 20 thousand tensors. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
#define SPACE (1UL << 44) /* addresses, not memory */
#define FILL 0xA5

/* In a page of its own that can only be read, then the block's pages, the block at their end, then the fence. */
struct head {
  uint64_t pages, size;
};

static char *space;
static uint64_t used;
static void (*libc_free)(void *);
static void *(*libc_realloc)(void *, size_t);

__attribute__((constructor)) static void start(void) {
  if (space) return;
  libc_free = dlsym(RTLD_NEXT, "free");
  libc_realloc = dlsym(RTLD_NEXT, "realloc");
  space = mmap(NULL, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) abort();
}

static int fenced(const void *p) {
  return space && (const char *)p >= space && (const char *)p < space + SPACE;
}

static struct head *head_of(const void *p) { /* a block begins in the first of its pages */
  return (struct head *)(((uintptr_t)p & ~(PAGE - 1)) - PAGE);
}

int posix_memalign(void **out, size_t alignment, size_t size) {
  start();
  size_t length = (size + alignment - 1) / alignment * alignment;
  uint64_t pages = length ? (length + PAGE - 1) / PAGE : 1;
  char *head = space + __atomic_fetch_add(&used, (pages + 2) * PAGE, __ATOMIC_RELAXED);
  if (alignment > PAGE || head + (pages + 2) * PAGE > space + SPACE) return ENOMEM;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
  if (mmap(head, (pages + 1) * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return ENOMEM;
  memset(head + PAGE, FILL, pages * PAGE);
  *(struct head *)head = (struct head){pages, size};
  mprotect(head, PAGE, PROT_READ);
  *out = head + (pages + 1) * PAGE - length;
  return 0;
}

static void check(const unsigned char *from, const unsigned char *to, const char *where) {
  while (from < to && *from == FILL) from++;
  if (from == to) return;
  if (write(2, where, strlen(where)) < 0) abort();
  abort();
}

void free(void *p) {
  if (!fenced(p)) {
    start();
    libc_free(p);
    return;
  }
  struct head *head = head_of(p);
  unsigned char *pages = (unsigned char *)head + PAGE, *end = pages + head->pages * PAGE;
  check(pages, p, "fence: written in front of a tensor\n");
  check((unsigned char *)p + head->size, end, "fence: written behind a tensor\n");
  mmap(head, end - (unsigned char *)head, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

void *realloc(void *p, size_t size) {
  if (!fenced(p)) {
    start();
    return libc_realloc(p, size);
  }
  size_t before = head_of(p)->size;
  void *moved = malloc(size);
  if (moved) {
    memcpy(moved, p, before < size ? before : size);
    free(p);
  }
  return moved;
}
