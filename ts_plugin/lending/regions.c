/* Stands before torch's OpenMP runtime: a borrower gives a core back at its next parallel region, inside its request.

   All of torch's CPU work passes through two functions of libgomp: GOMP_parallel starts a parallel region,
   omp_get_max_threads is asked before most of them. `regions_hook` puts `look_parallel` and `look_max` in their place, in
   the libraries that call torch's libgomp and nowhere else. In the thread that computes a request they look whether an
   owner wants its slice back. If so the team of threads ends, the slice goes back, and the request goes on with fewer
   threads from this region on.

   Narrower in the middle of a request is safe: OpenMP may give fewer threads than there were before. Wider is not: code
   that sized a buffer by omp_get_max_threads() would then be run by more threads. So cores are taken at a request's
   start only.

   Where a thread may run. The thread that computes a request, its children, and whatever it starts keep the worker's own
   slice. So do as many threads of a team as the slice has; the others run on borrowed CPUs alone, or the kernel would
   at times leave two of them on one core beside an idle one, for tens of milliseconds. Each sets its own mask in a
   region of its own before the first of the larger team. What is not seen here (another runtime, a pool of its own) so
   stays on the slice.

   Shared words. All workers map one file: for each worker (slot) the words of its slice. They change by compare-and-swap.
     user    slot + 1 of who computes on the slice, | BUSY while it is inside a parallel region there; 0: nobody
     wanted  1 from the arrival of its owner's request to the end; for good where the owner lends nothing
     asked   slot + 1 of a worker with less than its share that asks the borrower for the slice
   A borrower sets BUSY when a region starts and clears it when it ends; if the word is no longer its own, the slice is
   lost. An owner takes any slice of its own that is not BUSY, and otherwise waits for the end of that one region. Words
   do not know that a process died. The kernel does: every worker holds a record lock on the byte of its slot.

   A generation counts the plans. What was borrowed under another plan goes back at the next region, and where the new
   plan has made the own slice smaller, the request goes on with fewer threads. Whoever made the plan sets the masks.

   One struct worker is used by one thread at a time: the one that runs the model. Times are CLOCK_MONOTONIC, in ns. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#define IS_CALL(type) ((type) == R_X86_64_JUMP_SLOT || (type) == R_X86_64_GLOB_DAT)
#elif defined(__aarch64__)
#define IS_CALL(type) ((type) == R_AARCH64_JUMP_SLOT || (type) == R_AARCH64_GLOB_DAT)
#else
#error "regions.c knows the relocations of x86-64 and aarch64 only"
#endif

#define SLOTS 1024
#define BUSY 0x80000000u
#define PAUSE_SOFT 1           /* omp_pause_resource_t: keep what the program has set */
#define GRACE 1000000          /* a slice is idle when its owner's last request ended that long ago */
#define SHORT_PAUSE 5000000    /* after a pause up to that between two requests, the slice is kept twice as long as it; */
#define PAUSE_PART 8           /* so it is after one up to that part of a request: the frontend is slow under full load */
#define PATIENCE 10000000      /* that long an owner waits for the end of one region of a borrower that lives */
#define LOOK_AFTER_DEATH 2000000
#define ASK_FOR 1000000        /* that long a request waits for slices that it asked for */
#define ASK_FROM 10000000      /* only requests that take longer ask */
#define SHORT_REGION 1000000   /* regions up to that are short against any request */
#define SHORT_PART 8           /* longer ones are short if a request of the lender takes that many times as long */
#define LENT_MEMORY 1000000000 /* so long after a loan an owner ends its idle team, which would spin on lent cores */

struct slot {
  _Atomic uint32_t user, wanted, asked;
  int32_t pid;
  uint64_t start_time;
  _Atomic uint64_t idle_since; /* or a little later, where the next request may follow soon */
  _Atomic uint64_t lent_at;    /* a borrower took the slice */
  _Atomic uint64_t request;    /* ns that a request takes on the slice alone; 0: not known */
  char pad[16];
};

struct words {
  _Atomic uint64_t generation;
  _Atomic uint64_t joined; /* how many workers ever did */
  char pad[48];
  struct slot slots[SLOTS];
};

struct lender {
  int slot, threads;
  const unsigned long *mask;
};

struct answer { /* what one request did; times in ns */
  uint64_t seconds, waited, longest_region, borrowed; /* borrowed: threads x ns */
  int32_t began, ended; /* with how many threads */
  int32_t handed_back, lost, late, stale;
  int32_t regions, forced, why;
};

enum why { FREE, NOBODY_IDLE, LONG_REGIONS, OTHER_PLAN }; /* what kept the request from borrowing */

struct worker {
  struct words *words;
  int locks, slot;
  uint64_t generation;
  int threads, lenders, mask_bytes; /* mask_bytes 0: not pinned, only threads are lent */
  struct lender *lender;
  unsigned long *own, *borrowed; /* CPUs */
  int *held, held_count; /* indices of lenders */
  int most, width, team;
  uint64_t deadline, began, since, ended, pause; /* pause: between the last request and this one */
  uint64_t longest; /* region of a wide request, averaged over some: one that another program delays says little */
  int forced;
  struct answer answer;
};

static void (*real_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*real_max)(void), (*in_parallel)(void), (*number_in_team)(void), (*pause_all)(int);
static void (*set_omp)(int), (*set_mkl)(int);
static _Thread_local struct worker *computing;

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static struct slot *slot_of(struct worker *w, int lender) { return &w->words->slots[w->lender[lender].slot]; }

static int swap(_Atomic uint32_t *word, uint32_t from, uint32_t to) { return atomic_compare_exchange_strong(word, &from, to); }

/* ---- how wide ---------------------------------------------------------------------------------------------------- */

static int rounded(struct worker *w, int threads) {
  /* oneDNN prepares its primitives anew for every number of threads, so few are used: 1, 2, 3, 4, 6, 8, 12, 16, ...,
     the slice's own and the whole domain's. */
  int all = w->threads, best = w->threads;
  for (int i = 0; i < w->lenders; i++) all += w->lender[i].threads;
  if (threads >= all) return all;
  for (int n = 1; n <= threads; n *= 2) {
    if (n > best) best = n;
    if (n / 2 * 3 <= threads && n / 2 * 3 > best) best = n / 2 * 3;
  }
  return best;
}

static void set_threads(int threads) {
  set_omp(threads);
  if (set_mkl) set_mkl(threads);
}

static void account(struct worker *w, uint64_t t) {
  if (w->width > w->threads) w->answer.borrowed += (uint64_t)(w->width - w->threads) * (t - w->since);
  w->since = t;
}

static void fit(struct worker *w, int *given) {
  /* Keep as many held slices as the rounded width needs; append the others to `given`, which ends with -1. */
  int sum = w->threads, kept = 0;
  for (int i = 0; i < w->held_count; i++) sum += w->lender[w->held[i]].threads;
  w->width = rounded(w, sum < w->most ? sum : w->most);
  while (*given >= 0) given++;
  for (int i = 0, covered = w->threads; i < w->held_count; i++) {
    if (covered < w->width) w->held[kept++] = w->held[i], covered += w->lender[w->held[i]].threads;
    else *given++ = w->held[i];
  }
  *given = -1;
  w->held_count = kept;
  if (!w->mask_bytes) return;
  memset(w->borrowed, 0, (size_t)w->mask_bytes);
  for (int i = 0; i < kept; i++)
    for (int word = 0; word < w->mask_bytes / (int)sizeof(long); word++) w->borrowed[word] |= w->lender[w->held[i]].mask[word];
}

/* ---- a borrower -------------------------------------------------------------------------------------------------- */

static void enter(struct worker *w, int busy) {
  /* A region starts: keep what nobody wants, give the rest back. */
  uint64_t t = now();
  uint32_t me = (uint32_t)w->slot + 1;
  int given[w->held_count + 1], kept = 0, lost = 0, back = 0;
  int late = w->deadline && t > w->deadline, stale = atomic_load(&w->words->generation) != w->generation;
  for (int i = 0; i < w->held_count; i++) {
    struct slot *s = slot_of(w, w->held[i]);
    if (late || stale || atomic_load(&s->wanted) || atomic_load(&s->asked)) given[back++] = w->held[i];
    else if (busy ? swap(&s->user, me, me | BUSY) : atomic_load(&s->user) == me) w->held[kept++] = w->held[i];
    else lost++; /* its owner took it between two regions */
  }
  if (!back && !lost) return;
  account(w, t);
  w->held_count = kept;
  given[back] = -1;
  fit(w, given);
  w->answer.handed_back += back;
  w->answer.lost += lost;
  w->answer.late |= late;
  w->answer.stale |= stale;
  pause_all(PAUSE_SOFT); /* or its threads would spin for 20 ms on cores that go back */
  w->team = 1;
  set_threads(w->width);
  for (int *i = given; *i >= 0; i++) {
    struct slot *s = slot_of(w, *i);
    if (!swap(&s->user, me, 0)) swap(&s->user, me | BUSY, 0); /* BUSY: kept at first, but more than the width needs */
    atomic_store(&s->asked, 0);
  }
}

static int outdated(struct worker *w) {
  return w->mask_bytes && !w->held_count && atomic_load(&w->words->generation) != w->generation;
}

static void shrink(struct worker *w) {
  /* Another plan holds. If it has taken CPUs of the slice itself, the threads would get in each other's way on the rest. */
  unsigned long mask[128];
  int cpus = 0;
  if (sched_getaffinity(0, sizeof mask, (cpu_set_t *)mask)) return;
  for (int i = 0; i < 128; i++) cpus += __builtin_popcountl(mask[i]);
  if (cpus >= w->width) return;
  account(w, now());
  w->width = cpus;
  w->answer.stale = 1;
  pause_all(PAUSE_SOFT);
  set_threads(cpus);
}

static void leave(struct worker *w, uint64_t started) {
  uint32_t me = (uint32_t)w->slot + 1;
  for (int i = 0; i < w->held_count; i++) swap(&slot_of(w, w->held[i])->user, me | BUSY, me); /* fails: taken by force */
  uint64_t took = now() - started;
  if (took > w->answer.longest_region) w->answer.longest_region = took;
}

static void bind(void *worker) {
  struct worker *w = worker;
  int number = number_in_team();
  if (number) sched_setaffinity(0, (size_t)w->mask_bytes, (cpu_set_t *)(number < w->threads ? w->own : w->borrowed));
}

static void look_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags) {
  struct worker *w = computing;
  if (w) w->answer.regions++;
  if (w && outdated(w) && !in_parallel()) shrink(w);
  if (!w || !w->held_count || in_parallel()) {
    real_parallel(function, data, threads, flags);
    return;
  }
  enter(w, 1);
  int wanted = threads ? (int)threads : w->width;
  uint64_t started = now();
  if (w->mask_bytes && w->held_count && wanted > w->team) real_parallel(bind, w, (unsigned)wanted, 0);
  real_parallel(function, data, threads, flags);
  if (wanted > 1) w->team = wanted; /* libgomp lets those go that a smaller team does not need */
  leave(w, started);
}

static int look_max(void) {
  struct worker *w = computing;
  if (w && w->held_count && !in_parallel()) enter(w, 0);
  if (w && outdated(w) && !in_parallel()) shrink(w);
  return real_max();
}

static int borrow(struct worker *w, int lender, uint64_t t) {
  uint32_t me = (uint32_t)w->slot + 1;
  struct slot *s = slot_of(w, lender);
  if (atomic_load(&s->wanted) || !swap(&s->user, 0, me)) return 0;
  uint64_t request = atomic_load(&s->request);
  if (!request) request = atomic_load(&w->words->slots[w->slot].request); /* it has answered none: as ours, then */
  if (request && w->longest > SHORT_REGION && w->longest > request / SHORT_PART) {
    swap(&s->user, me, 0);
    w->answer.why = LONG_REGIONS;
    return 0;
  }
  atomic_store(&s->asked, 0);
  atomic_store(&s->lent_at, t);
  w->held[w->held_count++] = lender;
  return w->lender[lender].threads;
}

static int held_by(struct worker *w, uint32_t who) {
  /* How many threads of the lenders' slices `who` computes with. */
  int sum = 0;
  for (int i = 0; i < w->lenders; i++)
    if ((atomic_load(&slot_of(w, i)->user) & ~BUSY) == who) sum += w->lender[i].threads;
  return sum;
}

static void ask(struct worker *w, int missing, int share) {
  /* Ask those that hold more than `share` for borrowed slices, and take what comes within a moment. */
  uint32_t me = (uint32_t)w->slot + 1;
  int asked[w->lenders + 1], count = 0;
  for (int i = 0; i < w->lenders && missing > 0; i++) {
    struct slot *s = slot_of(w, i);
    uint32_t user = atomic_load(&s->user) & ~BUSY;
    if (!user || user == me || user == (uint32_t)w->lender[i].slot + 1 || atomic_load(&s->wanted)) continue;
    int others = 0;
    for (int k = 0; k < count; k++)
      if ((atomic_load(&slot_of(w, asked[k])->user) & ~BUSY) == user) others += w->lender[asked[k]].threads;
    if (held_by(w, user) - others - w->lender[i].threads < share || !swap(&s->asked, 0, me)) continue;
    asked[count++] = i;
    missing -= w->lender[i].threads;
  }
  for (uint64_t end = now() + ASK_FOR; count && now() < end;) {
    for (int k = 0; k < count; k++)
      if (!atomic_load(&slot_of(w, asked[k])->user) && borrow(w, asked[k], now())) asked[k--] = asked[--count];
    if (count) nanosleep(&(struct timespec){0, 20000}, 0);
  }
  for (int k = 0; k < count; k++) swap(&slot_of(w, asked[k])->asked, me, 0);
}

/* ---- an owner ---------------------------------------------------------------------------------------------------- */

static int alive(struct worker *w, uint32_t user) {
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)user - 1, .l_len = 1};
  return fcntl(w->locks, F_GETLK, &lock) || lock.l_type != F_UNLCK;
}

static int take_own(struct worker *w, uint64_t arrived) {
  /* Returns the slot of a borrower whose threads must be driven off by force, or -1. */
  struct slot *s = &w->words->slots[w->slot];
  uint32_t me = (uint32_t)w->slot + 1;
  atomic_store(&s->wanted, 1);
  for (uint64_t look = arrived + LOOK_AFTER_DEATH;;) {
    uint32_t user = atomic_load(&s->user);
    if (!(user & BUSY) || user == (me | BUSY)) {
      if (swap(&s->user, user, me | BUSY)) return -1;
      continue;
    }
    uint64_t t = now();
    if (t > look) {
      int lives = alive(w, user & ~BUSY);
      if ((!lives || t > arrived + PATIENCE) && swap(&s->user, user, me | BUSY)) return lives ? (int)(user & ~BUSY) - 1 : -1;
      look = t + LOOK_AFTER_DEATH;
    }
    nanosleep(&(struct timespec){0, 20000}, 0); /* no spinning: the region that ends may need this core for it */
  }
}

/* ---- what Python calls ------------------------------------------------------------------------------------------- */

static void forget(void) { /* in a forked child: it owns nothing and holds no lock */
  if (computing && set_omp) set_threads(computing->threads);
  computing = 0;
}

struct worker *worker_open(struct words *words, int locks, int slot, int pid, uint64_t start_time) {
  static int forks;
  struct worker *w = calloc(1, sizeof *w);
  if (!w) return 0;
  w->words = words, w->locks = locks, w->slot = slot;
  uint32_t me = (uint32_t)slot + 1;
  for (int i = 0; i < SLOTS; i++) /* what a predecessor in this slot was using when it died */
    if (!swap(&w->words->slots[i].user, me, 0)) swap(&w->words->slots[i].user, me | BUSY, 0);
  struct slot *s = &w->words->slots[slot];
  atomic_store(&s->wanted, 1);
  atomic_store(&s->user, me | BUSY);
  atomic_store(&s->asked, 0);
  atomic_store(&s->request, 0);
  atomic_store(&s->lent_at, 0);
  s->pid = pid, s->start_time = start_time;
  atomic_fetch_add(&words->joined, 1);
  if (!forks++) pthread_atfork(0, 0, forget);
  return w;
}

/* The plan: the worker's own threads and CPUs, and who lends to it, nearest first. `masks`: own, then each lender's, of
   `mask_bytes` bytes, a multiple of 8; none where slices are not pinned. Returns 0, or -1 without memory. */
int worker_plan(struct worker *w, uint64_t generation, int threads, int lenders, const int *slots, const int *lent,
                int mask_bytes, const unsigned long *masks) {
  size_t words = (size_t)mask_bytes / sizeof(long), count = (size_t)lenders;
  struct lender *lender = calloc(count + 1, sizeof *lender);
  unsigned long *copy = calloc((count + 2) * words + 1, sizeof *copy);
  int *held = calloc(count + 1, sizeof *held);
  if (!lender || !copy || !held) {
    free(lender), free(copy), free(held);
    return -1;
  }
  if (mask_bytes) memcpy(copy, masks, (count + 1) * (size_t)mask_bytes);
  for (int i = 0; i < lenders; i++)
    lender[i] = (struct lender){slots[i], lent[i], copy + (size_t)(i + 1) * words};
  free(w->lender), free(w->own), free(w->held);
  w->lender = lender, w->own = copy, w->held = held;
  w->borrowed = copy + (count + 1) * words;
  w->generation = generation, w->threads = threads, w->lenders = lenders, w->mask_bytes = mask_bytes;
  return 0;
}

/* A request arrives: take the own slice, then idle ones up to `most` threads. Returns the number of threads. Once
   `budget` ns have passed, what is borrowed goes back; 0: no limit. `worker_forced` tells whom to drive off. */
int worker_begin(struct worker *w, int most, uint64_t budget) {
  uint64_t arrived = now();
  w->pause = arrived - w->ended;
  w->answer = (struct answer){0};
  w->forced = take_own(w, arrived);
  uint64_t t = now();
  w->answer.waited = t - arrived;
  w->answer.forced = w->forced >= 0;
  w->held_count = 0;
  w->width = w->threads;
  w->most = most;
  if (most > w->threads && w->lenders && real_parallel) {
    int width = w->threads, all = w->threads, with_request = 1;
    if (atomic_load(&w->words->generation) != w->generation) w->answer.why = OTHER_PLAN;
    else {
      w->answer.why = NOBODY_IDLE;
      for (int i = 0; i < w->lenders; i++) {
        struct slot *s = slot_of(w, i);
        all += w->lender[i].threads;
        with_request += atomic_load(&s->wanted) != 0;
        if (width < most && !atomic_load(&s->user) && atomic_load(&s->idle_since) + GRACE <= t) width += borrow(w, i, t);
      }
      int share = all / with_request < most ? all / with_request : most;
      if (width < share && budget > ASK_FROM) ask(w, share - width, share);
    }
  }
  if (w->held_count) {
    int given[w->held_count + 1];
    given[0] = -1;
    fit(w, given);
    for (int *i = given; *i >= 0; i++) swap(&slot_of(w, *i)->user, (uint32_t)w->slot + 1, 0);
  }
  if (w->held_count) {
    w->answer.why = FREE;
    w->team = w->threads; /* those may be there, on the own slice */
    set_threads(w->width);
  }
  w->answer.began = w->width;
  w->began = w->since = now();
  w->deadline = budget ? w->began + budget : 0;
  computing = w;
  return w->width;
}

int worker_forced(const struct worker *w) { return w->forced; }

/* The request has ended: everything that is held goes back, the own slice is idle. */
void worker_end(struct worker *w, struct answer *answer) {
  struct slot *own = &w->words->slots[w->slot];
  uint32_t me = (uint32_t)w->slot + 1;
  uint64_t t = now();
  computing = 0;
  account(w, t);
  w->answer.seconds = t - w->began;
  w->answer.ended = w->width;
  int wide = w->answer.began > w->threads;
  /* Fades in narrow requests, where regions are not timed, so that it is tried again. */
  w->longest += wide ? w->answer.longest_region / 8 - w->longest / 8 : -(w->longest / 16);
  if (pause_all && (wide || (w->lenders && atomic_load(&own->lent_at) + LENT_MEMORY > t))) pause_all(PAUSE_SOFT);
  for (int i = 0; i < w->held_count; i++) swap(&slot_of(w, w->held[i])->user, me, 0);
  w->held_count = 0;
  w->width = w->threads;
  if (wide) set_threads(w->threads);
  w->ended = now();
  int soon = w->pause < SHORT_PAUSE || w->pause < atomic_load(&own->request) / PAUSE_PART;
  atomic_store(&own->idle_since, w->ended + (soon ? 2 * w->pause : 0));
  swap(&own->user, me | BUSY, 0);
  atomic_store(&own->wanted, 0);
  if (answer) *answer = w->answer;
}

void worker_typical(struct worker *w, uint64_t request) { atomic_store(&w->words->slots[w->slot].request, request); }

/* How many threads compute the present request, for other threads of the process to judge by. */
int worker_width(const struct worker *w) { return *(volatile const int *)&w->width; }

/* Leaves: its slice is not lent any more. */
void worker_close(struct worker *w) {
  struct slot *s = &w->words->slots[w->slot];
  atomic_store(&s->wanted, 1);
  s->pid = 0;
  free(w->lender), free(w->own), free(w->held), free(w);
}

/* ---- before the runtime ------------------------------------------------------------------------------------------ */

struct search { /* through one loaded library's pointers to functions of other libraries */
  const char *library;                                  /* part of its path; 0: all */
  void (*found)(const char *symbol, void **pointer, struct search *);
  const struct dl_phdr_info *info;
  void *libgomp;                                        /* where torch's is loaded */
  int hooked, strange;
};

static int visit(struct dl_phdr_info *info, size_t size, void *data) {
  struct search *search = data;
  (void)size;
  if (search->library && !(info->dlpi_name && strstr(info->dlpi_name, search->library))) return 0;
  const ElfW(Dyn) *dynamic = 0;
  for (int i = 0; i < info->dlpi_phnum; i++)
    if (info->dlpi_phdr[i].p_type == PT_DYNAMIC) dynamic = (void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
  const char *names = 0, *symbols = 0, *table[2] = {0, 0};
  size_t bytes[2] = {0, 0};
  for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
    /* glibc has put addresses here where it loads a library; others leave offsets. */
    const char *at = (char *)(dynamic->d_un.d_ptr < info->dlpi_addr ? info->dlpi_addr + dynamic->d_un.d_ptr : dynamic->d_un.d_ptr);
    switch (dynamic->d_tag) {
      case DT_STRTAB: names = at; break;
      case DT_SYMTAB: symbols = at; break;
      case DT_JMPREL: table[0] = at; break;
      case DT_PLTRELSZ: bytes[0] = dynamic->d_un.d_val; break;
      case DT_RELA: table[1] = at; break;
      case DT_RELASZ: bytes[1] = dynamic->d_un.d_val; break;
    }
  }
  search->info = info;
  for (int t = 0; t < 2 && names && symbols; t++)
    for (size_t i = 0; table[t] && i < bytes[t] / sizeof(ElfW(Rela)); i++) {
      const ElfW(Rela) *entry = (const ElfW(Rela) *)table[t] + i;
      if (!IS_CALL(ELF64_R_TYPE(entry->r_info))) continue;
      const ElfW(Sym) *symbol = (const ElfW(Sym) *)symbols + ELF64_R_SYM(entry->r_info);
      const char *name = names + symbol->st_name;
      if (!strncmp(name, "GOMP_", 5) || !strcmp(name, "omp_get_max_threads"))
        search->found(name, (void **)(info->dlpi_addr + entry->r_offset), search);
    }
  return 0;
}

static int count_added(struct dl_phdr_info *info, size_t size, void *added) {
  (void)size;
  *(unsigned long long *)added = info->dlpi_adds;
  return 1; /* the first tells it */
}

static void *base_of(void *function) {
  Dl_info where;
  return dladdr(function, &where) ? where.dli_fbase : 0;
}

static void find_parallel(const char *symbol, void **pointer, struct search *search) {
  if (!strcmp(symbol, "GOMP_parallel")) search->libgomp = *pointer;
}

static void redirect(const char *symbol, void **pointer, struct search *search) {
  void *to = 0;
  if (!strcmp(symbol, "GOMP_parallel") && *pointer == (void *)real_parallel) to = (void *)look_parallel;
  else if (!strcmp(symbol, "omp_get_max_threads") && *pointer == (void *)real_max) to = (void *)look_max;
  /* A region that is started in another way is not seen; it would compute on borrowed cores that were given back. */
  else if (!strncmp(symbol, "GOMP_parallel_", 14) && base_of(*pointer) == search->libgomp)
    search->strange += (void *)search->info->dlpi_addr != search->libgomp;
  if (!to) return;
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)pointer & -page;
  int read_only = 0;
  for (int i = 0; i < search->info->dlpi_phnum; i++) {
    const ElfW(Phdr) *part = &search->info->dlpi_phdr[i];
    uintptr_t first = search->info->dlpi_addr + part->p_vaddr;
    if (part->p_type == PT_GNU_RELRO && (uintptr_t)pointer >= first && (uintptr_t)pointer < first + part->p_memsz) read_only = 1;
  }
  if (mprotect((void *)start, page, PROT_READ | PROT_WRITE)) {
    search->strange++;
    return;
  }
  __atomic_store_n(pointer, to, __ATOMIC_SEQ_CST);
  if (read_only) mprotect((void *)start, page, PROT_READ);
  search->hooked++;
}

/* Returns how many calls of the libraries loaded by now pass through here, those of earlier calls included; -1: torch's
   CPU library is not loaded or calls no libgomp; -2: libgomp lacks something; -3: some library starts regions in a way
   that is not watched. Cheap where no library was loaded since the last call. */
int regions_hook(void) {
  static unsigned long long added; /* libraries that were loaded when it looked last */
  static int hooked, strange;
  struct search search = {.library = "/libtorch_cpu.so", .found = find_parallel};
  if (!real_parallel) {
    dl_iterate_phdr(visit, &search);
    Dl_info where;
    if (!search.libgomp || !dladdr(search.libgomp, &where)) return -1;
    const char *file = strrchr(where.dli_fname, '/');
    if (strncmp(file ? file + 1 : where.dli_fname, "libgomp", 7)) return -1;
    void *omp = dlopen(where.dli_fname, RTLD_NOW | RTLD_NOLOAD), *torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
    if (!omp || dlsym(omp, "GOMP_parallel") != search.libgomp) return -2;
    real_max = (int (*)(void))dlsym(omp, "omp_get_max_threads");
    in_parallel = (int (*)(void))dlsym(omp, "omp_in_parallel");
    number_in_team = (int (*)(void))dlsym(omp, "omp_get_thread_num");
    pause_all = (int (*)(int))dlsym(omp, "omp_pause_resource_all");
    set_omp = (void (*)(int))dlsym(omp, "omp_set_num_threads");
    if (torch) set_mkl = (void (*)(int))dlsym(torch, "MKL_Set_Num_Threads_Local"); /* lower case takes a pointer */
    if (!real_max || !in_parallel || !number_in_team || !pause_all || !set_omp) return -2;
    real_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))search.libgomp;
  }
  unsigned long long loaded = 0;
  dl_iterate_phdr(count_added, &loaded);
  if (loaded != added) {
    struct search all = {.found = redirect, .libgomp = base_of((void *)real_parallel)};
    dl_iterate_phdr(visit, &all);
    added = loaded;
    hooked += all.hooked;
    strange = all.strange;
  }
  return strange ? -3 : hooked;
}
