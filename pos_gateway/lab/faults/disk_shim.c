/* Preloaded into a real process: records what it does to the files of one folder, makes calls fail, and
 * sets its clock wrong.
 *
 * Environment:
 *   POS_GATEWAY_DISK_FOLDER   absolute path; only files in it (and the folder itself) are seen
 *   POS_GATEWAY_DISK_LOG      where the recording goes (outside the folder); none: nothing is recorded
 *   POS_GATEWAY_DISK_FAIL     "CALL NTH ERRNO TIMES PREFIX": CALL is sync, write or truncate; from the NTH
 *                             such call (counted from 1) on a file whose name begins with PREFIX on, the
 *                             next TIMES of them fail with ERRNO
 *   POS_GATEWAY_CLOCK_FILE    a file of 8 bytes, native byte order: nanoseconds by which the process's wall
 *                             clock is ahead, read at every look at it; steady clocks are left alone
 *
 * One entry per call, native byte order: u32 call, u32 length of the name, i64 offset or size,
 * u64 bytes that follow, i32 errno (0: done), u32 length of a second name (rename), name, second name, bytes.
 * The order of the entries is the order in which the calls took effect: one lock is held over both.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum call { WRITE = 1, TRUNCATE = 2, SYNC = 3, UNLINK = 4, RENAME = 5 };

struct entry {
    uint32_t call, name_length;
    int64_t offset;
    uint64_t bytes;
    int32_t error;
    uint32_t second_length;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];
static size_t folder_length;
static int log_file = -1;
static char failing[16], fail_prefix[64];
static long fail_at, fail_times, calls_seen;
static int fail_errno;
static volatile int64_t *ahead_ns;

static void begin_clock(void) {
    const char *where = getenv("POS_GATEWAY_CLOCK_FILE");
    int file = where == NULL ? -1 : open(where, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *page = mmap(NULL, sizeof *ahead_ns, PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) ahead_ns = page;
    close(file);
}

__attribute__((constructor)) static void begin(void) {
    begin_clock();
    const char *where = getenv("POS_GATEWAY_DISK_FOLDER"), *log = getenv("POS_GATEWAY_DISK_LOG");
    const char *fail = getenv("POS_GATEWAY_DISK_FAIL");
    if (where == NULL || realpath(where, folder) == NULL) return;
    folder_length = strlen(folder);
    if (log != NULL) log_file = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fail != NULL) sscanf(fail, "%15s %ld %d %ld %63s", failing, &fail_at, &fail_errno, &fail_times, fail_prefix);
}

/* The name inside the folder ("" for the folder itself), or NULL for what is none of our business. */
static const char *inside(const char *path) {
    if (folder_length == 0 || strncmp(path, folder, folder_length) != 0) return NULL;
    if (path[folder_length] == 0) return path + folder_length;
    return path[folder_length] == '/' ? path + folder_length + 1 : NULL;
}

static const char *name_of(int fd, char *buffer) {
    char link[64];
    if (folder_length == 0) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return inside(buffer);
}

static const char *name_at(int at, const char *path, char *buffer) {
    char parent[PATH_MAX];
    if (folder_length == 0) return NULL;
    if (path[0] != '/' && at != AT_FDCWD) return NULL;
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    const char *last = slash ? slash + 1 : parent;
    if (realpath(slash == NULL ? "." : slash == parent ? "/" : (*slash = 0, parent), buffer) == NULL) return NULL;
    size_t length = strlen(buffer);
    snprintf(buffer + length, PATH_MAX - length, "/%s", last);
    return inside(buffer);
}

static void put(const void *data, size_t length) {
    for (const char *at = data; length > 0;) {
        ssize_t written = syscall(SYS_write, log_file, at, length);
        if (written <= 0) abort(); /* a recording with a hole proves nothing */
        at += written;
        length -= written;
    }
}

static void record(enum call call, const char *name, int64_t offset, const void *data, size_t bytes, int error,
                   const char *second) {
    if (log_file < 0) return;
    struct entry entry = {call, strlen(name), offset, bytes, error, second ? strlen(second) : 0};
    put(&entry, sizeof entry);
    put(name, entry.name_length);
    if (second) put(second, entry.second_length);
    put(data, bytes);
}

/* With the lock held: should this call fail? */
static int fails(const char *call, const char *name) {
    if (fail_at == 0 || strcmp(call, failing) != 0) return 0;
    if (strncmp(name, fail_prefix, strlen(fail_prefix)) != 0) return 0;
    calls_seen++;
    return calls_seen >= fail_at && calls_seen < fail_at + fail_times;
}

static ssize_t wrote(int fd, const char *name, int64_t offset, const void *data, size_t length, int at) {
    int failed = fails("write", name);
    ssize_t done = -1;
    if (failed) errno = fail_errno;
    else done = at ? syscall(SYS_pwrite64, fd, data, length, offset) : syscall(SYS_write, fd, data, length);
    int error = errno;
    record(WRITE, name, offset, data, done > 0 ? done : 0, done < 0 ? error : 0, NULL);
    errno = error;
    return done;
}

ssize_t write(int fd, const void *data, size_t length) {
    char buffer[PATH_MAX];
    int before = errno;
    const char *name = name_of(fd, buffer);
    errno = before;
    if (name == NULL) return syscall(SYS_write, fd, data, length);
    pthread_mutex_lock(&lock);
    struct stat status;
    int64_t offset = lseek(fd, 0, SEEK_CUR);
    if ((fcntl(fd, F_GETFL) & O_APPEND) && fstat(fd, &status) == 0) offset = status.st_size;
    ssize_t done = wrote(fd, name, offset, data, length, 0);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) {
    char buffer[PATH_MAX];
    const char *name = name_of(fd, buffer);
    if (name == NULL) return syscall(SYS_pwrite64, fd, data, length, offset);
    pthread_mutex_lock(&lock);
    ssize_t done = wrote(fd, name, offset, data, length, 1);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return pwrite64(fd, data, length, offset); }

/* Short writes are allowed: the caller comes again for the rest. */
ssize_t writev(int fd, const struct iovec *parts, int count) {
    for (int part = 0; part < count; part++)
        if (parts[part].iov_len > 0) return write(fd, parts[part].iov_base, parts[part].iov_len);
    return 0;
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    for (int part = 0; part < count; part++)
        if (parts[part].iov_len > 0) return pwrite64(fd, parts[part].iov_base, parts[part].iov_len, offset);
    return 0;
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return pwritev(fd, parts, count, offset);
}

int ftruncate64(int fd, off64_t size) {
    char buffer[PATH_MAX];
    const char *name = name_of(fd, buffer);
    if (name == NULL) return syscall(SYS_ftruncate, fd, size);
    pthread_mutex_lock(&lock);
    int done = -1;
    if (fails("truncate", name)) errno = fail_errno;
    else done = syscall(SYS_ftruncate, fd, size);
    int error = errno;
    record(TRUNCATE, name, size, NULL, 0, done < 0 ? error : 0, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

static int synced(int fd, long number) {
    char buffer[PATH_MAX];
    const char *name = name_of(fd, buffer);
    if (name == NULL) return syscall(number, fd);
    pthread_mutex_lock(&lock);
    int done = -1;
    if (fails("sync", name)) errno = fail_errno;
    else done = syscall(number, fd);
    int error = errno;
    record(SYNC, name, 0, NULL, 0, done < 0 ? error : 0, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

int unlinkat(int at, const char *path, int flags) {
    char buffer[PATH_MAX];
    const char *name = name_at(at, path, buffer);
    if (name == NULL) return syscall(SYS_unlinkat, at, path, flags);
    pthread_mutex_lock(&lock);
    int done = syscall(SYS_unlinkat, at, path, flags), error = errno;
    record(UNLINK, name, 0, NULL, 0, done < 0 ? error : 0, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    char from_buffer[PATH_MAX], to_buffer[PATH_MAX];
    const char *name = name_at(from_at, from, from_buffer), *second = name_at(to_at, to, to_buffer);
    if (name == NULL || second == NULL) return syscall(SYS_renameat2, from_at, from, to_at, to, flags);
    pthread_mutex_lock(&lock);
    int done = syscall(SYS_renameat2, from_at, from, to_at, to, flags), error = errno;
    record(RENAME, name, 0, NULL, 0, done < 0 ? error : 0, second);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

int renameat(int from_at, const char *from, int to_at, const char *to) { return renameat2(from_at, from, to_at, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int clock_gettime(clockid_t clock, struct timespec *time) {
    int done = syscall(SYS_clock_gettime, clock, time);
    if (done == 0 && ahead_ns != NULL && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t nanoseconds = time->tv_sec * 1000000000LL + time->tv_nsec + *ahead_ns;
        time->tv_sec = nanoseconds / 1000000000LL;
        time->tv_nsec = nanoseconds % 1000000000LL;
    }
    return done;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now) != 0) return -1;
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where != NULL) *where = now.tv_sec;
    return now.tv_sec;
}
