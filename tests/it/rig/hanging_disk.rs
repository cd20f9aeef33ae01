//! A file system that hangs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds a library for `LD_PRELOAD` that makes a file system hang: saving and reading a record block
/// while the file named by `HANG` exists.
pub(crate) fn build_hanging_disk_library(folder: &Path) -> PathBuf {
    const SOURCE: &str = r#"
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <stdarg.h>
        #include <stdlib.h>
        #include <string.h>
        #include <sys/types.h>
        #include <unistd.h>
        static void hang(const char *path) {
            const char *marker = getenv("HANG");
            size_t length = strlen(path);
            if (marker && length > 8 && !strcmp(path + length - 8, ".parapet"))
                while (!access(marker, F_OK)) usleep(20000);
        }
        int rename(const char *from, const char *to) {
            hang(to);
            int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
            return real(from, to);
        }
        int open64(const char *path, int flags, ...) {
            va_list rest;
            va_start(rest, flags);
            mode_t mode = va_arg(rest, mode_t);
            va_end(rest);
            hang(path);
            int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
            return real(path, flags, mode);
        }"#;
    let (source, library) = (folder.join("hang.c"), folder.join("hang.so"));
    fs::write(&source, SOURCE).unwrap();
    let mut compiler = Command::new("cc");
    let compiled = compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    assert!(compiled.unwrap().success());
    library
}
