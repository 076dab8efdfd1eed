// A stand-in libcuda on host memory: work on streams is put off and then done in
// any order that streams and events allow, kernels included, so that a missing wait
// gives a wrong result. It says nothing about speed.
//
// RTFOCUS_STANDIN_KERNELS  library with the kernels as host functions
// RTFOCUS_STANDIN_SEED     of the order
// RTFOCUS_STANDIN_MEMORY   bytes of memory of every device
// RTFOCUS_STANDIN_DEVICES  how many there are, 2 if it is not set
//
// What belongs to one device is refused by another: streams, kernels, memory, graphs.
#include <dlfcn.h>
#include <time.h>

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

enum {
  OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, STUB = 34, UNAVAILABLE = 46,
  INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
  ALREADY_REGISTERED = 712, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700,
  CAPTURE_UNSUPPORTED = 900
};
enum { MOST_DEVICES = 8 };

struct Event {
  int device = 0;
  uint64_t recorded = 0, done = 0;
  double ms = 0;
};

struct Op {
  std::string name;
  std::function<void()> run;
  Event* wait = nullptr;
  uint64_t wait_for = 0;
};

struct Stream {
  int number = 0, device = 0;
  std::deque<Op> queue;
  bool busy = false;
  std::vector<Op>* capture = nullptr;
};

struct Recording {
  int device = 0;
  std::vector<Op> ops;
};

struct Memory {
  size_t size = 0;
  int device = 0;
};

// A card, as the tests make it be.
struct Device {
  size_t used = 0, peak = 0;
  long executed = 0, lose_after = -1;
  int lost = 0;  // the status of every call; 0: it answers
  int open_status = 0, opened_before = 0, lost_status = ILLEGAL_ADDRESS;
};

static std::mutex gate;
static std::condition_variable changed;
static std::set<Stream*> streams;
static std::map<uint64_t, Memory> device_memory;
static std::map<uint64_t, size_t> pinned, registered;
static Device devices[MOST_DEVICES];
static long live_objects = 0;
static int next_stream = 0;
static long refuse_in = -1;
static std::string executed_log;
static std::mt19937 order;
static thread_local std::vector<void*> contexts;
static int primary[MOST_DEVICES];

static long long variable(const char* name, long long otherwise) {
  const char* text = getenv(name);
  return text ? atoll(text) : otherwise;
}

static int device_count() { return (int)variable("RTFOCUS_STANDIN_DEVICES", 2); }

// The device whose context is current in this thread; -1: none is.
static int current() {
  return contexts.empty() ? -1 : (int)((int*)contexts.back() - primary);
}

static double now_ms() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

// Does one op of any stream that may go on. The gate is open while it runs, because
// a host function may need Python's lock, whose holder may be waiting at the gate.
static bool step(std::unique_lock<std::mutex>& lock) {
  std::vector<Stream*> ready;
  for (Stream* stream : streams) {
    if (stream->busy || stream->queue.empty() || devices[stream->device].lost) continue;
    Op& head = stream->queue.front();
    if (head.wait && head.wait->done < head.wait_for) continue;
    ready.push_back(stream);
  }
  if (ready.empty()) return false;
  Stream* stream = ready[order() % ready.size()];
  Op op = stream->queue.front();
  stream->busy = true;
  lock.unlock();
  if (op.run) op.run();
  lock.lock();
  stream->queue.pop_front();
  stream->busy = false;
  executed_log += op.name + "@" + std::to_string(stream->number) + "\n";
  Device& device = devices[stream->device];
  if (++device.executed == device.lose_after) device.lost = device.lost_status;
  changed.notify_all();
  return true;
}

static int work_until(int number, const std::function<bool()>& reached) {
  std::unique_lock<std::mutex> lock(gate);
  Device& device = devices[number];
  while (!reached()) {
    if (device.lost) return device.lost;
    if (step(lock)) continue;
    bool busy = false;
    for (Stream* stream : streams) busy |= stream->busy;
    if (!busy) {
      fprintf(stderr, "stand-in libcuda: waiting for what nothing will bring\n");
      abort();
    }
    changed.wait(lock);
  }
  return device.lost;
}

static int enqueue(Stream* stream, Op op) {
  std::lock_guard<std::mutex> lock(gate);
  if (!stream || !streams.count(stream)) return INVALID_VALUE;
  if (stream->device != current()) return INVALID_HANDLE;
  if (int lost = devices[stream->device].lost) return lost;
  if (stream->capture) stream->capture->push_back(op);
  else stream->queue.push_back(op);
  return OK;
}

// Host memory of an asynchronous copy must be pinned.
static bool is_pinned(const void* host, size_t size) {
  uint64_t address = (uint64_t)host;
  for (auto* map : {&pinned, &registered})
    for (auto& [start, length] : *map)
      if (address >= start && address + size <= start + length) return true;
  return false;
}

static bool on_device(uint64_t address, size_t size) {
  auto after = device_memory.upper_bound(address);
  if (after == device_memory.begin()) return false;
  auto& [start, memory] = *--after;
  return memory.device == current() && address + size <= start + memory.size;
}

// What the tests ask of the stand-in itself.
API long standin_live() {
  std::lock_guard<std::mutex> lock(gate);
  return live_objects + (long)(device_memory.size() + pinned.size() + registered.size());
}
// Plans of the transforms and networks are counted too.
API void standin_count(long more) {
  std::lock_guard<std::mutex> lock(gate);
  live_objects += more;
}
// The so-many-th reservation from now on and all after it are refused; negative: none.
API void standin_refuse_memory(long number) { refuse_in = number; }
API long standin_peak() {
  long peak = (long)devices[0].peak;
  devices[0].peak = devices[0].used;
  return peak;
}
API void standin_recover() {
  for (Device& device : devices) {
    device.lost = device.open_status = 0;
    device.lose_after = -1;
  }
}
// After so many more steps every call of a device fails with a status.
API void standin_lose_after(int number, long ops, int status) {
  Device& device = devices[number];
  device.lose_after = device.executed + ops;
  device.lost_status = status;
}
// What a device answers to whoever wants its context, the next few left out.
API void standin_refuse_context(int number, int status, int next) {
  devices[number].open_status = status;
  devices[number].opened_before = next;
}
API long standin_executed(int number) { return devices[number].executed; }
API const char* standin_log() {
  static std::string copy;
  std::lock_guard<std::mutex> lock(gate);
  copy = executed_log;
  executed_log.clear();
  return copy.c_str();
}
API int standin_enqueue(Stream* stream, void (*function)(void*), void* data) {
  return enqueue(stream, {"library", [=] { function(data); }});
}

API int cuInit(unsigned) {
  order.seed((unsigned)variable("RTFOCUS_STANDIN_SEED", 1));
  return OK;
}
API int cuDriverGetVersion(int* v) { *v = 13000; return OK; }
API int cuGetErrorString(int e, const char** p) {
  *p = e == OUT_OF_MEMORY ? "out of memory"
       : e == ILLEGAL_ADDRESS ? "an illegal memory access was encountered"
       : e == UNAVAILABLE ? "CUDA-capable device(s) is/are busy or unavailable"
                          : "stand-in libcuda error";
  return OK;
}
API int cuGetErrorName(int, const char** p) { *p = "CUDA_ERROR"; return OK; }
API int cuDeviceGetCount(int* n) { *n = device_count(); return OK; }
API int cuDeviceGet(int* d, int i) { *d = i; return i < device_count() ? OK : INVALID_DEVICE; }
API int cuDeviceGetName(char* b, int n, int) { strncpy(b, "stand-in", n); return OK; }
API int cuDeviceTotalMem_v2(size_t* n, int) {
  *n = (size_t)variable("RTFOCUS_STANDIN_MEMORY", 1ll << 32);
  return OK;
}
API int cuDeviceGetAttribute(int* v, int a, int) {
  *v = a == 75 ? 8 : a == 76 ? 6 : a == 16 ? 4 : 0;  // capability, multiprocessors
  return OK;
}
API int cuDeviceComputeCapability(int* a, int* b, int) { *a = 8; *b = 6; return OK; }
API int cuDevicePrimaryCtxRetain(void** c, int device) {
  *c = &primary[device];
  Device& wanted = devices[device];
  if (wanted.open_status && --wanted.opened_before < 0) return wanted.open_status;
  return variable("RTFOCUS_STANDIN_MEMORY", 1) ? OK : OUT_OF_MEMORY;
}
API int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
API int cuDevicePrimaryCtxRelease(int) { return OK; }
API int cuCtxAttach(void** c, unsigned) {
  *c = contexts.empty() ? nullptr : contexts.back();
  return OK;
}
API int cuCtxDetach(void*) { return OK; }
API int cuCtxDestroy_v2(void*) { return OK; }
API int cuCtxPushCurrent_v2(void* c) { contexts.push_back(c); return OK; }
API int cuCtxPopCurrent_v2(void** c) {
  if (contexts.empty()) return INVALID_CONTEXT;
  if (c) *c = contexts.back();
  contexts.pop_back();
  return OK;
}
API int cuCtxGetDevice(int* d) {
  *d = current();
  return contexts.empty() ? INVALID_CONTEXT : OK;
}
API int cuCtxSynchronize() {
  int device = current();
  if (device < 0) return INVALID_CONTEXT;
  return work_until(device, [=] {
    for (Stream* s : streams)
      if (s->device == device && !s->queue.empty()) return false;
    return true;
  });
}

API int cuMemAlloc_v2(uint64_t* p, size_t n) {
  if (contexts.empty()) return INVALID_CONTEXT;
  std::lock_guard<std::mutex> lock(gate);
  if (refuse_in == 1) return OUT_OF_MEMORY;  // PyCUDA tries again
  if (refuse_in > 1) --refuse_in;
  Device& device = devices[current()];
  if (device.lost) return device.lost;
  if (device.used + n > (size_t)variable("RTFOCUS_STANDIN_MEMORY", 1ll << 32))
    return OUT_OF_MEMORY;
  void* memory = aligned_alloc(512, (n + 511) / 512 * 512);
  memset(memory, 0xA5, n);
  *p = (uint64_t)memory;
  device_memory[*p] = {n, current()};
  device.used += n;
  device.peak = std::max(device.peak, device.used);
  return OK;
}
API int cuMemFree_v2(uint64_t p) {
  if (contexts.empty()) return INVALID_CONTEXT;
  std::lock_guard<std::mutex> lock(gate);
  auto found = device_memory.find(p);
  if (found == device_memory.end()) return INVALID_VALUE;
  if (found->second.device != current()) return INVALID_VALUE;
  memset((void*)p, 0x5A, found->second.size);
  devices[current()].used -= found->second.size;
  device_memory.erase(found);
  free((void*)p);
  return OK;
}
API int cuMemGetInfo_v2(size_t* a, size_t* b) {
  *b = (size_t)variable("RTFOCUS_STANDIN_MEMORY", 1ll << 32);
  *a = *b - devices[std::max(current(), 0)].used;
  return OK;
}
API int cuMemHostAlloc(void** p, size_t n, unsigned) {
  if (contexts.empty()) return INVALID_CONTEXT;
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  memset(*p, 0xA5, n);
  std::lock_guard<std::mutex> lock(gate);
  pinned[(uint64_t)*p] = n;
  return OK;
}
API int cuMemFreeHost(void* p) {
  std::lock_guard<std::mutex> lock(gate);
  if (!pinned.erase((uint64_t)p)) return INVALID_VALUE;
  free(p);
  return OK;
}
API int cuMemHostRegister_v2(void* p, size_t n, unsigned) {
  if (contexts.empty()) return INVALID_CONTEXT;
  std::lock_guard<std::mutex> lock(gate);
  if (registered.count((uint64_t)p)) return ALREADY_REGISTERED;
  registered[(uint64_t)p] = n;
  return OK;
}
API int cuMemHostUnregister(void* p) {
  std::lock_guard<std::mutex> lock(gate);
  return registered.erase((uint64_t)p) ? OK : INVALID_VALUE;
}

API int cuStreamCreate(Stream** s, unsigned) {
  if (contexts.empty()) return INVALID_CONTEXT;
  std::lock_guard<std::mutex> lock(gate);
  *s = new Stream{next_stream++, current()};
  streams.insert(*s);
  ++live_objects;
  return OK;
}
API int cuStreamDestroy_v2(Stream* s) {
  if (contexts.empty()) return INVALID_CONTEXT;
  work_until(s->device, [=] { return s->queue.empty(); });
  std::lock_guard<std::mutex> lock(gate);
  streams.erase(s);
  delete s;
  --live_objects;
  return OK;
}
API int cuStreamSynchronize(Stream* s) {
  if (s->device != current()) return INVALID_HANDLE;
  return work_until(s->device, [=] { return s->queue.empty(); });
}
API int cuStreamWaitEvent(Stream* s, Event* e, unsigned) {
  Op op{"wait", nullptr, e, e->recorded};
  return s->capture ? CAPTURE_UNSUPPORTED : enqueue(s, op);
}
API int cuEventCreate(Event** e, unsigned) {
  if (contexts.empty()) return INVALID_CONTEXT;
  *e = new Event;
  (*e)->device = current();
  ++live_objects;
  return OK;
}
API int cuEventDestroy_v2(Event* e) {
  if (contexts.empty()) return INVALID_CONTEXT;
  delete e;
  --live_objects;
  return OK;
}
API int cuEventRecord(Event* e, Stream* s) {
  if (s->capture) return CAPTURE_UNSUPPORTED;
  uint64_t number;
  {
    std::lock_guard<std::mutex> lock(gate);
    number = ++e->recorded;
  }
  return enqueue(s, {"record", [=] {
    std::lock_guard<std::mutex> lock(gate);
    e->done = number;
    e->ms = now_ms();
  }});
}
API int cuEventQuery(Event* e) { return e->done >= e->recorded ? OK : 600; }
API int cuEventSynchronize(Event* e) {
  uint64_t number = e->recorded;
  return work_until(e->device, [=] { return e->done >= number; });
}
API int cuEventElapsedTime_v2(float* t, Event* a, Event* b) {
  *t = (float)(b->ms - a->ms);
  return OK;
}
API int cuEventElapsedTime(float* t, Event* a, Event* b) {
  return cuEventElapsedTime_v2(t, a, b);
}

API int cuMemcpyHtoD_v2(uint64_t d, const void* s, size_t n) {
  if (!on_device(d, n)) return INVALID_VALUE;
  memcpy((void*)d, s, n);
  return OK;
}
API int cuMemcpyDtoH_v2(void* d, uint64_t s, size_t n) {
  if (!on_device(s, n)) return INVALID_VALUE;
  int status = cuCtxSynchronize();
  memcpy(d, (void*)s, n);
  return status;
}
API int cuMemcpyHtoDAsync_v2(uint64_t d, const void* s, size_t n, Stream* t) {
  if (!on_device(d, n) || !is_pinned(s, n)) return INVALID_VALUE;
  return enqueue(t, {"H2D", [=] { memcpy((void*)d, s, n); }});
}
API int cuMemcpyDtoHAsync_v2(void* d, uint64_t s, size_t n, Stream* t) {
  if (!on_device(s, n) || !is_pinned(d, n)) return INVALID_VALUE;
  return enqueue(t, {"D2H", [=] { memcpy(d, (void*)s, n); }});
}
API int cuMemcpyDtoDAsync_v2(uint64_t d, uint64_t s, size_t n, Stream* t) {
  if (!on_device(d, n) || !on_device(s, n)) return INVALID_VALUE;
  return enqueue(t, {"D2D", [=] { memcpy((void*)d, (void*)s, n); }});
}
API int cuMemsetD8Async(uint64_t d, unsigned char v, size_t n, Stream* t) {
  if (!on_device(d, n)) return INVALID_VALUE;
  return enqueue(t, {"memset", [=] { memset((void*)d, v, n); }});
}

struct Launch {
  unsigned grid_x, grid_y, block_x, cooperative_threads;
};
typedef void (*Kernel)(const Launch*, const void*);
// Of the bench, which measures how many products a card does.
API void host_multiply(const Launch*, const void*) {}
struct Function {
  Kernel kernel;
  std::string name;
  int device;
};
static std::map<std::pair<int, std::string>, Function*> functions;

API int cuModuleLoadDataEx(void** m, const void*, unsigned, void*, void*) {
  *m = dlopen(getenv("RTFOCUS_STANDIN_KERNELS"), RTLD_NOW | RTLD_LOCAL);
  return *m ? OK : NOT_FOUND;
}
API int cuModuleLoadData(void** m, const void* image) {
  return cuModuleLoadDataEx(m, image, 0, nullptr, nullptr);
}
API int cuModuleUnload(void*) { return OK; }
API int cuModuleGetFunction(Function** f, void* m, const char* name) {
  std::string entry = "host_" + std::string(name);
  Kernel kernel = (Kernel)dlsym(m, entry.c_str());
  if (!kernel) kernel = (Kernel)dlsym(RTLD_DEFAULT, entry.c_str());
  if (!kernel) return NOT_FOUND;
  if (contexts.empty()) return INVALID_CONTEXT;
  std::lock_guard<std::mutex> lock(gate);
  Function*& known = functions[{current(), name}];
  if (!known) known = new Function{kernel, name, current()};
  *f = known;
  return OK;
}
API int cuFuncSetBlockShape(void*, int, int, int) { return OK; }
API int cuLaunchKernel(
    Function* f, unsigned gx, unsigned gy, unsigned, unsigned bx, unsigned, unsigned,
    unsigned, Stream* s, void**, void** extra) {
  if (f->device != s->device) return INVALID_HANDLE;
  const char* data = nullptr;
  size_t size = 0;
  for (; extra && *extra; extra += 2) {
    if ((uintptr_t)extra[0] == 1) data = (const char*)extra[1];
    if ((uintptr_t)extra[0] == 2) size = *(size_t*)extra[1];
  }
  // Aligned as the struct the kernel reads it through.
  auto buffer = std::make_shared<std::vector<double>>(size / 8 + 1);
  memcpy(buffer->data(), data, size);
  Launch launch{gx, gy, bx, 1};
  return enqueue(s, {f->name, [=] { f->kernel(&launch, buffer->data()); }});
}
API int cuLaunchHostFunc(Stream* s, void (*function)(void*), void* data) {
  return enqueue(s, {"network", [=] { function(data); }});
}

API int cuStreamBeginCapture_v2(Stream* s, int) {
  s->capture = new std::vector<Op>;
  return OK;
}
API int cuStreamEndCapture(Stream* s, Recording** g) {
  if (!s->capture) return CAPTURE_UNSUPPORTED;
  *g = new Recording{s->device, std::move(*s->capture)};
  delete s->capture;
  s->capture = nullptr;
  ++live_objects;
  return OK;
}
API int cuGraphInstantiateWithFlags(Recording** e, Recording* g, uint64_t) {
  *e = new Recording(*g);
  ++live_objects;
  return OK;
}
API int cuGraphDestroy(Recording* g) { delete g; --live_objects; return OK; }
API int cuGraphExecDestroy(Recording* e) { delete e; --live_objects; return OK; }
API int cuGraphLaunch(Recording* e, Stream* s) {
  if (e->device != s->device) return INVALID_HANDLE;
  auto ops = std::make_shared<std::vector<Op>>(e->ops);
  return enqueue(s, {"graph", [=] { for (Op& op : *ops) op.run(); }});
}
