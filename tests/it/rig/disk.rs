//! A file system that hangs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A library for `LD_PRELOAD` with which a file system hangs: `rename` waits as long as the file named by `HANG` exists.
pub(crate) fn hanging_disk(folder: &Path) -> PathBuf {
    const SOURCE: &str = r#"
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <stdlib.h>
        #include <string.h>
        #include <unistd.h>
        int rename(const char *from, const char *to) {
            const char *marker = getenv("HANG");
            size_t length = strlen(to);
            if (marker && length > 8 && !strcmp(to + length - 8, ".parapet"))
                while (!access(marker, F_OK)) usleep(20000);
            int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
            return real(from, to);
        }"#;
    let (source, library) = (folder.join("hang.c"), folder.join("hang.so"));
    fs::write(&source, SOURCE).unwrap();
    let mut compiler = Command::new("cc");
    let compiled = compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    assert!(compiled.unwrap().success());
    library
}
