// libstdc++ counts references without atomics while glibc's flag says that there is one thread. The flag came with
// glibc 2.32; torch's own wheels want 2.28. This one says that there are more, and nothing later than 2.14 is needed.
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}
