//! Links the image as a kernel: static, at a fixed physical address, with nothing of a C library.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_IMAGE").is_some() {
        let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo::rerun-if-changed=image.ld");
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{here}/image.ld");
        for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"] {
            println!("cargo::rustc-link-arg-bins={argument}");
        }
    }
}
